"""Bake the adapter into the weights: one ONNX model as fast as the base, for people who ship only one.

The sum W + s·B·A is rounded to 4 bits again, each group to its own range. What that costs in
perplexity, and what it gains in speed, `evaluate` reports.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from peft import PeftModel

from stages.checkpoint import load_dequantized, load_tokenizer
from stages.export import export
from stages.settings import Optimize


def export_merged(
    quantized: Path, adapter: Path, options: Optimize, scratch: Path, target: Path
) -> None:
    """Merge, pack as the quantized checkpoint is packed, export to `target`."""
    merged = PeftModel.from_pretrained(load_dequantized(quantized), adapter).merge_and_unload()
    merged.save_pretrained(scratch / "merged")
    load_tokenizer(quantized).save_pretrained(scratch / "merged")
    rtn = create_pass_from_dict(Rtn, packing_of(quantized), disable_search=True)
    rtn.run(HfModelHandler(str(scratch / "merged")), str(scratch / "packed"))
    graph = export(scratch / "packed", options, scratch)
    shutil.move(Path(graph.model_path).parent, target)


def packing_of(quantized: Path) -> dict:
    """Return how a checkpoint is packed, as Olive's passes are told."""
    config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    packing = config["quantization_config"]
    kept = {key: packing[key] for key in ("bits", "group_size", "lm_head", "embeds", "overrides")}
    return kept | {"sym": packing["symmetric"]}
