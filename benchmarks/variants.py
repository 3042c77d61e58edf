"""Ways to quantize, side by side: bytes against perplexity and decode speed.

python -m benchmarks.variants [NAME ...]      # conf/quantize/NAME.yaml; in a workspace after `dvc repro`
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import keep
from benchmarks.workplace import run_stage, write_params
from stages.decode_speed import measure_in_own_process
from stages.running import read_json, size_of

NAMES = ["rtn", "awq", "awq_group32", "awq_symmetric", "awq_down8", "awq_head4", "awq_head16"]
SPEED = {"new_tokens": 64, "warmup": 1, "repeats": 5}


def main() -> None:
    """Quantize, export and time every variant, and keep the figures."""
    figures = {name: variant(name) for name in sys.argv[1:] or NAMES}
    keep("quantize_variants_cpu", figures)
    print(json.dumps(figures, indent=2))


def variant(name: str) -> dict[str, Any]:
    """Return bytes, perplexity and tokens per second of one way to quantize."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "models").mkdir()
        (folder / "data").mkdir()
        for given in ("models/base", "data/prepared"):
            (folder / given).symlink_to(Path(given).absolute())
        write_params(folder, f"quantize={name}")
        cost = run_stage("quantize", folder)
        run_stage("optimize", folder)
        metrics = read_json(folder / "metrics/raw/quantize.json")
        prompt = list(range(10, 138))
        speed = measure_in_own_process(folder / "models/onnx", None, prompt, SPEED)
        return {
            "perplexity": metrics["perplexity_quantized"],
            "bytes_onnx": size_of(folder / "models/onnx"),
            "decode_tokens_per_s": speed["decode_tokens_per_s_p50"],
            "quantize_seconds": cost["seconds"],
        }


if __name__ == "__main__":
    main()
