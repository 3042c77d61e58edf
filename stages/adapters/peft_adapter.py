"""A PEFT adapter read from disk: A and B of every module, or one line that says why it is no plain LoRA."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from stages.adapters.names import A, B
from stages.core.errors import UserError

Pair = tuple[np.ndarray, np.ndarray]  # A, [in, rank], and B, [rank, out], scaling included


# what a whole family of tensors is called, by a part of their names
NOT_LORA = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on the embedding",
    "bias": "biases",
    "": "whole matrices (modules_to_save)",
}
# options of PEFT's that the tensors themselves show, that `rank_and_scaling` reads, or that only training
# reads; any other that is set may mean that the same tensors are used in another way. Not derived from
# LoraConfig, whose import takes seconds of PyTorch, and which knows no option of a newer PEFT
UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}
# how A and B may begin; every other way changes the base's weights too, which are not in the adapter
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_adapter(folder: Path) -> dict[str, Pair]:
    """Return A and B of every module that is adapted. Raises `UserError` for what is not plain LoRA."""
    config = read_config(folder)
    tensors = read_tensors(folder)
    check_names(tensors, folder)
    modules = {}
    for name in sorted(name for name in tensors if name.endswith(A)):
        stem = name.removesuffix(A)
        module = stem.removeprefix("base_model.model.")
        rank, scaling = rank_and_scaling(module, config)
        found = (tensors[name].shape[0], tensors[stem + B].shape[1])
        if found != (rank, rank):
            raise UserError(
                f"{folder}: the rank of {module} is {found[0]} in lora_A and {found[1]} in lora_B, but "
                f"{rank} in adapter_config.json: take both files from the same training run"
            )
        modules[module] = (tensors[name].T, tensors[stem + B].T * np.float32(scaling))
    return modules


def read_config(folder: Path) -> dict:
    """Return PEFT's configuration of an adapter. Raises `UserError` for methods other than LoRA."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no adapter_config.json: it must be a PEFT adapter's folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}: save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}: must be LORA")
    check_initialisation(config, path)
    for key, value in config.items():
        if value and key not in UNDERSTOOD:
            raise UserError(
                f"{path}: {key} is set, and only plain LoRA can be an input of the graph: "
                "merge the adapter into the base model, or train without"
            )
    return config


def check_initialisation(config: dict, path: Path) -> None:
    """Raise `UserError` for PiSSA and the like: such an adapter belongs to a base that they changed."""
    way = config.get("init_lora_weights")
    if (way.lower() if isinstance(way, str) else way) not in INITIALISATIONS:  # as PEFT reads it
        raise UserError(
            f"{path}: init_lora_weights is {way!r}, which changes the base's weights too: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return an adapter's tensors by name, float32. Raises `UserError` where one is not finite."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name}: save the adapter with safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}: copy or save it again") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{path}: {name} holds NaN or infinity: train it again, with a lower lr"
            )
    return tensors


def check_names(tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Raise `UserError` unless there are an A and a B for every module, and nothing else."""
    others = sorted(name for name in tensors if not name.endswith((A, B)))
    if others:
        what = next(what for part, what in NOT_LORA.items() if any(part in n for n in others))
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UserError(
            f"{folder} holds {what}, which the graph has no inputs for: {names}; "
            "merge the adapter into the base model, or train without"
        )
    stems = {
        suffix: {n.removesuffix(suffix) for n in tensors if n.endswith(suffix)} for suffix in (A, B)
    }
    for stem in sorted(stems[A] ^ stems[B]):
        raise UserError(
            f"{folder}: {stem} has only one of lora_A and lora_B: save the adapter again"
        )
    if not stems[A]:
        raise UserError(f"{folder} adapts no module: choose another adapter")


def rank_and_scaling(module: str, config: dict) -> tuple[int, float]:
    """Return a module's rank, and alpha / rank or alpha / √rank; patterns may give it values of its own."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(matching(ranks, module, config["r"]))
    alpha = matching(alphas, module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matching(patterns: dict[str, float], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that is the end of a module's name, as PEFT looks it up."""
    fits = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(fits, otherwise)
