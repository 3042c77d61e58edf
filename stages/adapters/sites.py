"""The sites of a graph that take an adapter: which modules act at each, and their A and B joined."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.adapters.lora_inputs import FUSED
from stages.adapters.names import A, B
from stages.adapters.peft_adapter import Pair
from stages.core.errors import UserError


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
    # x·[A1 A2] = [h1 h2], and the block diagonal of B1 and B2 keeps each h to its own columns
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
