"""A toy pipeline of the real one's shape: real DVC, stages of a few lines, figures that are known beforehand.

The stages write what they ran into a file outside, which counts them over all copies of the repository.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

from stages.scoring.predictions import as_jsonl
from support.predictions import predictions
from support.project import Project

STAGES = {
    "params": {
        "cmd": "echo > params.ok",
        "deps": ["conf"],
        "outs": [{"params.ok": {"cache": False}}],
    },
    "quantize": {"params": ["quantize"], "outs": ["models/quantized", "metrics/raw/quantize.json"]},
    "finetune": {
        "params": ["finetune"],
        "deps": ["models/quantized"],
        "outs": ["models/adapter"],
    },
    "optimize": {"deps": ["models/quantized"], "outs": ["models/onnx"]},
    "evaluate": {
        "params": ["evaluate.split"],
        "deps": ["models/onnx", "models/adapter"],
        "outs": ["metrics/raw/evaluate.json"],
    },
    "report": {
        "deps": ["metrics/raw/quantize.json", "metrics/raw/evaluate.json"],
        "outs": [
            {f"metrics/{name}": {"cache": False}}
            for name in ("quality.json", "size.json", "costs.json", "predictions.jsonl")
        ],
    },
}
DEFAULTS = {"quantize": "awq", "finetune": "lora"}
CONF = {
    "config.yaml": {"defaults": [*({k: v} for k, v in DEFAULTS.items()), "_self_"]}
    | {"evaluate": {"split": "test", "gates": {}}, "finetune": {"lr": 0.5}},
    "quantize/awq.yaml": {"method": "awq", "mb": 1},
    "quantize/rtn.yaml": {"method": "rtn", "mb": 2},
    "finetune/lora.yaml": {"rank": 8, "seed": 42},
}
WORK = """
import json, os, sys, time
from pathlib import Path
import yaml

stage = sys.argv[1]
settings = yaml.safe_load(Path("params.yaml").read_text())
with open(os.environ.get("RAN", os.devnull), "a") as log:
    split = settings["evaluate"]["split"] if stage == "evaluate" else ""
    log.write(" ".join([stage, split]).strip() + "\\n")
time.sleep(float(os.environ.get("TAKES", 0)))
if stage == os.environ.get("FAILS") and settings["finetune"]["rank"] == 16:
    sys.exit(f"{stage}: rank 16 is not my size")

def folder(name, size, **holds):
    Path("models", name).mkdir(parents=True, exist_ok=True)
    Path("models", name, "weights").write_bytes(bytes(int(size * 1e6)))
    Path("models", name, "holds.json").write_text(json.dumps(holds).ljust(1000))

def write(name, value):
    Path("metrics", name).parent.mkdir(parents=True, exist_ok=True)
    Path("metrics", name).write_text(json.dumps(value))

def read(name):
    return json.loads(Path(name).read_text())

quantize, finetune = settings["quantize"], settings["finetune"]
if stage == "quantize":
    folder("quantized", quantize["mb"], **quantize)
    write("raw/quantize.json", {"perplexity_quantized": 10.0 + quantize["mb"]})
elif stage == "finetune":
    folder("adapter", 0, **finetune, method=read("models/quantized/holds.json")["method"])
elif stage == "optimize":
    size = read("models/quantized/holds.json")["mb"]
    folder("onnx", size)
elif stage == "evaluate":
    made = read("models/adapter/holds.json")
    value = made["rank"] - 20 * abs(made["lr"] - 0.5) + (made["method"] == "rtn")
    chrf = value - (settings["evaluate"]["split"] == "test") / 2
    right = int(min(max(value, 0), 20))
    write("raw/evaluate.json", {"chrf": chrf, "recall_exact_match": right / 20})
else:
    raw = read("metrics/raw/quantize.json") | read("metrics/raw/evaluate.json")
    write("quality.json", raw)
    answers = Path("answers", f"{round(raw['recall_exact_match'] * 20)}.jsonl")
    Path("metrics/predictions.jsonl").write_text(answers.read_text())
    size = sum(file.stat().st_size for file in Path("models/onnx").iterdir())
    write("size.json", {"onnx_mb": round(size / 1e6, 1)})
    timed = ("quantize", "finetune", "optimize", "evaluate")
    write("costs.json", {name: {"seconds": 60, "machine": "toy"} for name in timed})
"""


def make(root: Path) -> Project:
    """Make the toy in a folder, run it, commit it."""
    project = Project(root)
    root.mkdir()
    for name, values in CONF.items():
        (root / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "conf" / name).write_text(yaml.safe_dump(values))
    (root / "work.py").write_text(WORK)
    stages = {
        name: {
            "cmd": f"python work.py {name}",
            **stage,
            "deps": ["work.py", *stage.get("deps", [])],
        }
        for name, stage in STAGES.items()
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (root / "answers").mkdir()
    for right in range(21):
        answers = as_jsonl(predictions([1] * right + [0] * (20 - right)))
        (root / f"answers/{right}.jsonl").write_text(answers)
    (root / ".gitignore").write_text("/models\n/metrics/raw\n__pycache__\n")
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    (root / ".dvc/config").write_text("[hydra]\n enabled = true\n[core]\n check_update = false\n")
    (root / "params.yaml").write_text(yaml.safe_dump(composed(), sort_keys=False))
    project.dvc("repro")
    project.commit()
    return project


def composed() -> dict:
    """What conf/ composes to."""
    sections = {name: dict(CONF[f"{name}/{option}.yaml"]) for name, option in DEFAULTS.items()}
    return sections | {
        "finetune": sections["finetune"] | {"lr": 0.5},
        "evaluate": {"split": "test", "gates": {}},
    }


def ran(log: Path) -> Counter[str]:
    """Return how often each stage ran, evaluate by the split that it was asked."""
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()
