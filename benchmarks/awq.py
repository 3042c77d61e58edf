"""AWQ on the CPU: ours beside llm-compressor's AWQModifier and Olive's AutoClip with Rtn.

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install llmcompressor
    python -m benchmarks.awq --peer .venv-peers/bin/python    # in a workspace after `dvc repro`

All get the same calibration tokens, bits, group size and zero points, leave embedding and lm_head in
float, and are judged by perplexity on the same held-out text. Olive's AutoClip, which had not ended after
25 minutes on two cores, stops at --clip-cap seconds, every other at --cap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.machine import ROOT, keep
from stages.core.settings import load
from stages.text.conversation import read_conversations

BASE = Path("models/base")


def main() -> None:
    """Run ours, plain rounding and the peers, each in a process of its own, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="the Python that has llm-compressor")
    parser.add_argument(
        "--sequences", type=int, help="of the calibration set; fewer: peers end sooner"
    )
    parser.add_argument("--cap", type=int, default=3600, help="seconds that each may take")
    parser.add_argument("--clip-cap", type=int, default=900, help="seconds of AutoClip")
    parser.add_argument("--only", nargs="*", choices=CONTEST, default=list(CONTEST))
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        name, folder = arguments.contestant
        print(json.dumps(CONTEST[name](Path(folder))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokens(folder, arguments.sequences)
        caps = {"olive_auto_clip": arguments.clip_cap}
        figures = {}
        for name in arguments.only:
            figures[name] = contest(name, folder, caps.get(name, arguments.cap))
            print(name, json.dumps(figures[name]), flush=True)
        if arguments.peer:
            figures["llm_compressor"] = llm_compressor(folder, arguments)
    keep("awq_cpu", figures)
    print(json.dumps(figures, indent=2))


def write_tokens(folder: Path, sequences: int | None) -> None:
    """Write the calibration set and the held-out text as the quantize stage draws them."""
    from stages.quantization.calibration import calibration_set, heldout_prose
    from stages.quantize import HELDOUT, PREPARED

    options = load().quantize
    rows = read_conversations(PREPARED / "calibration.jsonl")
    calibration = calibration_set(BASE, rows, options)[:sequences].clone()
    tokens = {"calibration": calibration, "validation": heldout_prose(BASE, HELDOUT, options)}
    save_file(tokens, folder / "tokens.safetensors")


def contest(name: str, folder: Path, cap: int) -> dict[str, Any]:
    """Run one contestant; return its figures, or that it did not end in time."""
    command = [sys.executable, "-m", "benchmarks.awq", "--contestant", name, str(folder)]
    return figures_of(command, cap)


def llm_compressor(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the peer's script, which needs nothing of this project."""
    script = ROOT / "benchmarks/peer_llm_compressor.py"
    size = str(load().quantize.group_size)
    return figures_of(
        [str(arguments.peer), str(script), str(BASE), str(folder), size], arguments.cap
    )


def figures_of(command: list[str], cap: int) -> dict[str, Any]:
    """Return what a command prints as JSON in its last line, with its peak memory."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(command, stdout=said, stderr=complained, env=os.environ)
        try:
            process.wait(timeout=cap)
        except subprocess.TimeoutExpired:
            process.kill()
            return {"not_finished_after_seconds": round(time.monotonic() - started)}
        said.seek(0)
        complained.seek(0)
        if process.returncode:
            return {"failed": complained.read()[-500:]}
        return json.loads(said.read().splitlines()[-1])


def ours(folder: Path) -> dict[str, Any]:
    """Quantize by our pass."""
    from stages.quantization.awq import Awq

    options = load().quantize
    tokens = {"tokens": load_file(folder / "tokens.safetensors")["calibration"]}
    save_file(tokens, folder / "calibration.safetensors")
    search = {key: getattr(options, key) for key in ("scale_grid",)}
    return quantized_by(
        folder, (Awq, search | {"calibration": str(folder / "calibration.safetensors")})
    )


def rtn(folder: Path) -> dict[str, Any]:
    """Round to nearest by Olive's pass."""
    from olive.passes.pytorch.rtn import Rtn

    return quantized_by(folder, (Rtn, {}))


def quantized_by(folder: Path, *passes: tuple[type, dict[str, Any]]) -> dict[str, Any]:
    """Run Olive passes on the base; return seconds, memory and perplexity."""
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from stages.core.running import peak_memory
    from stages.quantization.perplexity import perplexity
    from stages.weights.checkpoint import load_dequantized

    options = load().quantize
    grid = {"bits": options.bits, "group_size": options.group_size, "sym": options.symmetric}
    started = time.monotonic()
    model = HfModelHandler(str(BASE), load_kwargs={"torch_dtype": "float32"})
    for pass_class, config in passes:
        target = folder / f"by_{passes[0][0].__name__}" / pass_class.__name__
        olive_pass = create_pass_from_dict(pass_class, grid | config, disable_search=True)
        model = olive_pass.run(model, str(target))
    seconds, memory = round(time.monotonic() - started, 1), peak_memory()
    text = load_file(folder / "tokens.safetensors")["validation"]
    value = perplexity(load_dequantized(target), text, target.name)
    return {"seconds": seconds, **memory, "perplexity": round(value, 3)}


CONTEST = {"rtn": rtn, "ours": ours}

if __name__ == "__main__":
    main()
