"""Is a base model one that every later stage can work on? Asked at fetch, not at the first chat.

Names and shapes of all tensors are compared with what the config asks for, on the meta device: no weight is
read. A tensor that is missing would otherwise be random, or a tied one by accident, with a mere warning.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from stages.architecture import FAMILIES
from stages.errors import UserError
from stages.running import read_json

INDEX = "model.safetensors.index.json"
QUESTION = [{"role": "user", "content": "?"}]


def check(folder: Path) -> None:
    """Raise `UserError` in one line for what quantize, finetune, optimize or chat could not take."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"config.json at model.source: {first_line(error)}") from None
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {config.model_type!r} at model.source is not one of {known}")
    check_shards(folder)
    check_tensors(folder, config)
    check_chat_template(folder)


def check_shards(folder: Path) -> None:
    """Raise unless every file that the index names is there."""
    if not (folder / INDEX).is_file():
        return
    named = set(read_json(folder / INDEX).get("weight_map", {}).values())
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise UserError(
            f"{missing[0]} is missing at model.source, which {INDEX} names: copy it again"
        )


def check_tensors(folder: Path, config) -> None:
    """Raise unless the weights are exactly those of the model that config.json describes."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = shapes_in(folder)
    for name, shape in expected.items():
        if name not in found and name not in tied:
            raise UserError(f"{name} is missing from the weights at model.source: {remedy(name)}")
        if name in found and found[name] != shape:
            raise UserError(
                f"{name} at model.source is {list(found[name])}, but config.json asks for {list(shape)}"
            )


def remedy(name: str) -> str:
    """Say what to do about a missing tensor."""
    if name == "lm_head.weight":
        return (
            "set tie_word_embeddings to true in config.json if the head is tied, or copy it again"
        )
    return "copy the model again"


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a folder's safetensors files."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()  # a handle is no mapping
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return shapes


def check_chat_template(folder: Path) -> None:
    """Raise unless the chat template renders a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's errors, and whatever a template raises
        raise UserError(f"the chat template at model.source fails: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
