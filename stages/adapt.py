"""Convert the PEFT adapter to the file that ONNX Runtime loads: models/adapter to models/onnx_adapter.

    python -m stages.adapt           # for one trained elsewhere: lab adapt PEFT_DIR

Everything that the adapter holds is checked against the inputs of models/onnx/lora.onnx before a file is
written: an adapter either works as it does in PEFT, or is refused in one line.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from safetensors import SafetensorError, safe_open

from stages.adapters.lora_inputs import BASE_MODULES, FUSED, load_graph, lora_inputs
from stages.core.errors import UserError
from stages.core.running import in_megabytes, run, size_of, written_beside
from stages.core.settings import Settings

ADAPTER = Path("models/adapter")
QUANTIZED = Path("models/quantized")  # what PEFT computes with, for the proof
ONNX = Path("models/onnx")
ONNX_ADAPTER = Path("models/onnx_adapter")
A, B = ".lora_A.weight", ".lora_B.weight"
Pair = tuple[np.ndarray, np.ndarray]  # A, [in, rank], and B, [rank, out], scaling included
# what a whole family of tensors is called, by a part of their names
NOT_LORA = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on the embedding",
    "bias": "biases",
    "": "whole matrices (modules_to_save)",
}
# options of PEFT's that the tensors themselves show, or that only training reads; any other that is set
# may mean that the same tensors are used in another way
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
    "velora_config",
}
# how A and B may begin; every other way changes the base's weights too, which are not in the adapter
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Piece:
    """A module of the adapter at a site of the graph.

    Its B has `total` columns, of which `width` from `taken` on go to the site's columns from `placed` on.
    """

    module: str
    total: int
    taken: int
    placed: int
    width: int


def adapt(settings: Settings) -> str:
    """Read the adapter, lay it out as the graph wants it, prove that it does what PEFT does, save."""
    from stages.answers.proof import (
        prove_adapter,  # `lab adapt` needs no PyTorch, which takes seconds
    )

    with written_beside(ONNX_ADAPTER) as folder:
        folder.mkdir()
        file = folder / "adapter.onnx_adapter"
        inputs = convert(ADAPTER, ONNX, file)
        proven = prove_adapter(QUANTIZED, ADAPTER, ONNX, file)
    return f"{ONNX_ADAPTER} ({in_megabytes(size_of(ONNX_ADAPTER))}, {inputs} inputs, {proven})"


def convert(peft: Path, onnx: Path, target: Path) -> int:
    """Write a PEFT adapter for the model in `onnx`; return the number of inputs that it fills.

    Raises `UserError` for an adapter that is more than LoRA, or made for another model.
    """
    model = load_graph(onnx)
    modules = read_adapter(peft)
    check_modules(modules, model.metadata_props[BASE_MODULES].split(","), onnx)
    weights = lay_out(modules, lora_inputs(model.graph), head_widths(onnx), onnx)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in sorted(weights)
    }
    adapter.set_parameters(values)
    adapter.export_adapter(str(target))
    return len(weights)


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
                f"{rank} in adapter_config.json: bring both files from one training"
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
    if way not in INITIALISATIONS:
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
            f"{folder} holds {what}, which cannot be inputs of the graph: {names}; "
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
        raise UserError(f"{folder} adapts no module")


def rank_and_scaling(module: str, config: dict) -> tuple[int, float]:
    """Return a module's rank, and alpha / rank or alpha / √rank; patterns may give it values of its own."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = matching(ranks, module, config["r"])
    alpha = matching(alphas, module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matching(patterns: dict[str, float], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that is the end of a module's name, as PEFT looks it up."""
    fits = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(fits, otherwise)


def check_modules(modules: dict[str, Pair], known: list[str], onnx: Path) -> None:
    """Raise `UserError` for modules that the base model does not have, whatever its graph looks like."""
    for module in modules:
        leaf = module.rpartition(".")[2]
        if leaf not in known:
            raise UserError(
                f"the adapter targets {module}, but the model in {onnx} has no {leaf}: "
                f"it has {', '.join(known)}"
            )


def head_widths(onnx: Path) -> list[int]:
    """Return the output columns of q_proj, k_proj and v_proj."""
    config = json.loads((onnx / "genai_config.json").read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    keys = decoder["num_key_value_heads"] * decoder["head_size"]
    return [decoder["num_attention_heads"] * decoder["head_size"], keys, keys]


def lay_out(
    modules: dict[str, Pair], inputs: dict[str, ir.Value], heads: list[int], onnx: Path
) -> dict[str, np.ndarray]:
    """Return the graph's inputs by name. Raises `UserError` for a module that has none, or another shape."""
    weights, placed = {}, set()
    for site in (name.removesuffix(A) for name in inputs if name.endswith(A)):
        pieces = pieces_at(site, inputs[site + B].shape[1], modules, heads)
        if pieces:
            for piece in pieces:
                check_shape(piece, modules, inputs[site + A].shape[0], onnx)
            weights[site + A], weights[site + B] = join(pieces, modules, inputs[site + B])
            placed |= {piece.module for piece in pieces}
    if missing := sorted(set(modules) - placed):
        raise UserError(
            f"the adapter targets {missing[0]}, which has no LoRA input in {onnx}/lora.onnx: "
            "build the graph with it in finetune.target_modules"
        )
    return weights


def pieces_at(site: str, width: int, modules: dict[str, Pair], heads: list[int]) -> list[Piece]:
    """Return which modules of the adapter act at a site that has `width` columns.

    A module may be the whole site, a part of it (q_proj of qkv_proj), or a fused module that the graph
    splits (gate_up_proj): then its sites share A, and each takes its part of B's columns.
    """
    stem, _, leaf = site.rpartition(".")
    if site in modules:
        return [Piece(site, width, 0, 0, width)]
    for whole, parts in FUSED.items():
        widths = heads if whole == "qkv_proj" else [width] * 2
        firsts = dict(zip(parts, np.cumsum([0, *widths]).tolist(), strict=False))
        if leaf == whole:
            split = zip(parts, widths, strict=True)
            pieces = [Piece(f"{stem}.{part}", n, 0, firsts[part], n) for part, n in split]
            return [piece for piece in pieces if piece.module in modules]
        if leaf in parts and f"{stem}.{whole}" in modules:
            return [Piece(f"{stem}.{whole}", sum(widths), firsts[leaf], 0, width)]
    return []


def check_shape(piece: Piece, modules: dict[str, Pair], in_features: int, onnx: Path) -> None:
    """Raise `UserError` unless a module's A and B have the widths that the model has there."""
    a, b = modules[piece.module]
    found = {A: list(a.T.shape), B: list(b.T.shape)}
    wanted = {A: [a.shape[1], in_features], B: [piece.total, a.shape[1]]}
    for name in (A, B):
        if found[name] != wanted[name]:
            raise UserError(
                f"{piece.module}{name} is {found[name]} in the adapter, but the model in {onnx} "
                f"takes {wanted[name]}: the adapter belongs to another model"
            )


def join(pieces: list[Piece], modules: dict[str, Pair], value: ir.Value) -> Pair:
    """Return a site's A and B: the pieces' A beside each other, their B on a block diagonal."""
    a = np.concatenate([modules[piece.module][0] for piece in pieces], axis=1)
    b = np.zeros((a.shape[1], value.shape[1]), np.float32)
    row = 0
    for piece in pieces:
        part = modules[piece.module][1][:, piece.taken : piece.taken + piece.width]
        b[row : row + len(part), piece.placed : piece.placed + piece.width] = part
        row += len(part)
    return fit(a, value), fit(b, value)


def fit(array: np.ndarray, value: ir.Value) -> np.ndarray:
    """Return an array in the element type of the graph's inputs."""
    fitted = np.ascontiguousarray(array, value.dtype.numpy())
    if not np.isfinite(fitted).all():
        raise UserError(
            f"{value.name} is too large for {fitted.dtype}: train with a lower lr or alpha"
        )
    return fitted


if __name__ == "__main__":
    run(adapt)
