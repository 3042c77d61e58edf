"""LoRA on the CPU: ours beside `olive finetune`, same weights, same rows, same rank.

    python -m benchmarks.lora [STEPS]      # in a workspace after `dvc repro`; a step of Olive takes 10 s

Tokens are those of the rows: padding, which Olive adds up to 1024 a row, is no work done. The
validation loss is that of the answers' tokens, measured alike for both adapters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from benchmarks.machine import ROOT, keep
from stages.core.files import read_json
from stages.core.settings import load
from stages.text.chats import answer_ids, load_tokenizer, prompt_ids
from stages.text.conversation import read_conversations
from stages.weights.checkpoint import load_dequantized

QUANTIZED, TRAIN, VALIDATION = (
    Path("models/quantized"),
    Path("data/prepared/train.jsonl"),
    Path("data/prepared/validation.jsonl"),
)


def main() -> None:
    """Train both ways, measure both adapters, keep the figures."""
    steps = int(sys.argv[1]) if sys.argv[1:] else 20
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = {"olive": olive(folder, steps), "ours": ours(folder)}
    reached = figures["olive"]["validation_loss"]
    figures["ours"]["seconds_to_that_loss"] = seconds_to(reached, figures["ours"])
    speeds = [figures[name]["tokens_per_second"] for name in ("ours", "olive")]
    figures["speedup"] = round(speeds[0] / speeds[1], 1)
    keep("lora_cpu", figures)
    print(json.dumps(figures, indent=2))


def olive(folder: Path, steps: int) -> dict[str, Any]:
    """Run `olive finetune` on the dequantized weights for some steps."""
    tokenizer, options = load_tokenizer(QUANTIZED), load().finetune
    load_dequantized(QUANTIZED).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = read_conversations(TRAIN)
    texts = [tokenizer.decode(prompt_ids(tokenizer, r) + answer_ids(tokenizer, r)) for r in rows]
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "olive"), "finetune", "--method", "lora"]
    command += ["-m", str(folder / "base"), "-o", str(folder / "olive"), "-d", "json"]
    command += ["--data_files", str(folder / "train.jsonl"), "--text_field", "text"]
    command += ["--lora_r", str(options.rank), "--lora_alpha", str(int(options.alpha))]
    command += ["--torch_dtype", "bfloat16", "--max_steps", str(steps), "--logging_steps", "1"]
    command += ["--per_device_train_batch_size", str(options.batch_size)]
    command += ["--gradient_accumulation_steps", "1", "--learning_rate", str(options.lr)]
    done, peak = run_and_watch([*command, "--disable_telemetry"], folder)
    seconds = float(done.split("'train_runtime': ")[1].split(",")[0].strip("'"))
    mean_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(texts)
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": round(steps * options.batch_size * mean_tokens / seconds),
        "peak_memory_gib": peak,
        "validation_loss": validation_loss(folder / "olive/adapter"),
    }


def run_and_watch(command: list[str], folder: Path) -> tuple[str, float]:
    """Run a command; return what it printed and its peak resident memory in GiB."""
    environment = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    if status:
        raise RuntimeError(f"{command[0]} failed:\n{said[-2000:]}")
    return said, round(usage.ru_maxrss / 2**20, 2)


def ours(folder: Path) -> dict[str, Any]:
    """Run our stage as params.yaml says, in a folder of its own."""
    for name in ("params.yaml", "data", "models"):
        (folder / name).symlink_to(Path(name).absolute()) if name != "models" else None
    (folder / "models").mkdir()
    (folder / QUANTIZED).symlink_to(QUANTIZED.absolute())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    command = [sys.executable, "-m", "stages.finetune"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    training = read_json(folder / "metrics/speed/training.json")
    return {
        "steps": load().finetune.max_steps,
        "wall_seconds": round(time.monotonic() - started, 1),
        **training,
        "validation_loss": validation_loss(folder / "models/adapter"),
        "curve": read_json(folder / "metrics/raw/finetune.json")["validation"],
    }


def seconds_to(loss: float, ours: dict[str, Any]) -> float | None:
    """Return our seconds to the first evaluation at or below a loss, None if it was never reached."""
    per_step = ours["seconds"] / ours["steps"]
    return next((round(p["step"] * per_step, 1) for p in ours["curve"] if p["loss"] <= loss), None)


@torch.no_grad()
def validation_loss(adapter: Path) -> float:
    """Return the cross entropy of the answers' tokens in a sample of validation rows."""
    tokenizer, rows = load_tokenizer(QUANTIZED), read_conversations(VALIDATION)
    model = PeftModel.from_pretrained(load_dequantized(QUANTIZED), adapter).eval()
    total, count = 0.0, 0
    for row in rows[:: max(1, len(rows) // load().finetune.validation_rows)]:
        prompt, answer = prompt_ids(tokenizer, row), answer_ids(tokenizer, row)
        logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0]
        total += cross_entropy(logits[:-1], torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return round(total / count, 4)


if __name__ == "__main__":
    main()
