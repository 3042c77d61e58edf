"""How much disk a run of the pipeline fills, as far as that is known before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# Parts of the base model's size, by what SmolLM2-135M (0.27 GB) and Phi-3.5-mini (7.6 GB) came to.
LARGE = {"models/base": 1.0, "models/quantized": 0.35, "models/onnx": 0.35}
REST = 200e6  # bytes of adapters and all else
BYTES_PER_PARAMETER = 2  # a base model is kept in bfloat16


def of_a_run() -> float | None:
    """Return the bytes of the outputs that a run of params.yaml's model adds, None if nothing tells.

    Known are a model that has been fetched, by dvc.lock, a local folder, and random weights. Of any other
    the size is not known before it has been fetched, and no name is a size.
    """
    source = read("params.yaml").get("model", {}).get("source")
    fetch = read("dvc.lock").get("stages", {}).get("fetch", {})
    if source is None:
        return None
    if source == fetch.get("params", {}).get("params.yaml", {}).get("model.source"):
        base = next(out["size"] for out in fetch["outs"] if out["path"] == "models/base")
        missing = [part for folder, part in LARGE.items() if not Path(folder).exists()]
    else:
        base, missing = size_of(source), list(LARGE.values())
    return None if base is None else base * sum(missing) + REST


def read(file: str) -> dict[str, Any]:
    """Return what a YAML file holds; nothing where it is absent or not YAML, which others tell."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def size_of(source: dict[str, Any]) -> float | None:
    """Return the bytes of a base model that has not been fetched, None where they are not known."""
    if source.get("kind") == "path":
        files = Path(source["path"]).expanduser().glob("*.safetensors")
        return sum(file.stat().st_size for file in files) or None
    if source.get("kind") == "random":
        return (
            parameters({"vocab_size": source["vocab_size"], **source["architecture"]})
            * BYTES_PER_PARAMETER
        )
    return None


def parameters(architecture: dict[str, Any]) -> int:
    """Count the parameters of an architecture, without memory for them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    return sum(weights.numel() for weights in model.parameters())
