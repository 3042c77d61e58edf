"""Convert the PEFT adapter to the file that ONNX Runtime loads: models/adapter to models/onnx_adapter.

    python -m stages.adapt

Every weight is checked against the inputs of the graph in models/onnx before anything is written.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
from olive.common.utils import WeightsFileFormat, save_weights
from peft import LoraConfig, load_peft_weights

from stages.errors import UserError
from stages.merge import export_merged
from stages.passes.lora_inputs import FUSED, Site, read_sites
from stages.places import place
from stages.running import in_megabytes, quietly, run, size_of, written_beside
from stages.settings import Optimize, Settings

QUANTIZED = Path("models/quantized")
ADAPTER = place("models/adapter")
ONNX = Path("models/onnx")
ONNX_ADAPTER = place("models/onnx_adapter")
Pair = tuple[np.ndarray, np.ndarray]


def adapt(settings: Settings) -> str:
    """Read the adapter, lay it out as the graph wants it, check, save; merge it where that is wanted."""
    modules = read_adapter(ADAPTER)
    weights = lay_out(modules, read_sites(ONNX))
    weights = fit_to_graph(weights, ONNX / "model.onnx")
    with written_beside(ONNX_ADAPTER) as folder:
        folder.mkdir()
        save_weights(weights, folder / "adapter", WeightsFileFormat.ONNX_ADAPTER)
        if settings.optimize.merge:
            merge(settings.optimize, folder / "merged")
    return f"{ONNX_ADAPTER} ({in_megabytes(size_of(ONNX_ADAPTER))}, {len(weights)} inputs)"


def merge(options: Optimize, target: Path) -> None:
    """Export the base with the adapter baked in."""
    with tempfile.TemporaryDirectory(dir=ONNX.parent) as scratch, quietly():
        export_merged(QUANTIZED, ADAPTER, options, Path(scratch), target)


def read_adapter(folder: Path) -> dict[str, Pair]:
    """Return (A, [in, rank], and B, [rank, out], scaling included) of every module that is adapted."""
    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise UserError(f"{folder} uses DoRA or per-module ranks, which the ONNX graph cannot take")
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = load_peft_weights(str(folder), device="cpu")
    modules = {}
    for name in sorted(weights):
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a = weights[name].float().numpy().T
            b = weights[f"{module}.lora_B.weight"].float().numpy().T * scaling
            modules[module.removeprefix("base_model.model.")] = (a, b)
    return modules


def lay_out(modules: dict[str, Pair], sites: list[Site]) -> dict[str, np.ndarray]:
    """Return the graph's inputs by name. Raises if a module of the adapter has no place in the graph."""
    weights, placed = {}, set()
    for site in sites:
        found = pairs_at(site, modules)
        if found:
            a, b = side_by_side(site, [pair for _, pair, _ in found], [c for _, _, c in found])
            weights.update(zip(site.input_names, (a, b), strict=True))
            placed |= {name for name, _, _ in found}
    if missing := sorted(set(modules) - placed):
        raise UserError(
            f"the adapter targets {missing[0]}, which has no LoRA input in {ONNX}: "
            "run `dvc repro optimize` with the same finetune.target_modules"
        )
    return weights


def pairs_at(site: Site, modules: dict[str, Pair]) -> list[tuple[str, Pair, slice]]:
    """Return (module, its A and B, its columns of the site) for every module that acts at a site.

    A module may be the whole site, a part of it (q_proj of qkv_proj), or a fused module that the graph
    splits (gate_up_proj): then its sites share A, and each takes its part of B's columns.
    """
    whole = f"{site.prefix}.{site.projection}"
    if whole in modules:
        return [(whole, modules[whole], slice(0, site.out_features))]
    fused = f"{site.prefix}.{FUSED.get(site.projection, '')}"
    if fused in modules:
        a, b = modules[fused]
        first = first_column(site, b.shape[1])
        share = (a, b[:, first : first + site.out_features])
        return [(fused, share, slice(0, site.out_features))]
    return [
        (f"{site.prefix}.{part}", modules[f"{site.prefix}.{part}"], slice(first, last))
        for part, (first, last) in site.parts.items()
        if f"{site.prefix}.{part}" in modules
    ]


def first_column(site: Site, total: int) -> int:
    """Return where a part begins in its fused module, [.., total]; k and v are as wide as each other."""
    from_the_end = {"k_proj": 2, "v_proj": 1, "up_proj": 1}
    parts_left = from_the_end.get(site.projection)
    return total - parts_left * site.out_features if parts_left else 0


def side_by_side(site: Site, pairs: list[Pair], columns: list[slice]) -> Pair:
    """Join the adapters of a fused projection: A's beside each other, B's on a block diagonal."""
    a = np.concatenate([a for a, _ in pairs], axis=1)
    b = np.zeros((a.shape[1], site.out_features), dtype=np.float32)
    first = 0
    for (_, part), where in zip(pairs, columns, strict=True):
        b[first : first + part.shape[0], where] = part
        first += part.shape[0]
    return np.ascontiguousarray(a), b


def fit_to_graph(weights: dict[str, np.ndarray], graph: Path) -> dict[str, np.ndarray]:
    """Return the weights in the graph's dtype. Raises unless each is an input with the same shape."""
    inputs = {
        value.name: value.type.tensor_type
        for value in onnx.load(graph, load_external_data=False).graph.input
    }
    for name, weight in weights.items():
        shape = [d.dim_value for d in inputs[name].shape.dim] if name in inputs else []
        if [d or s for d, s in zip(shape, weight.shape, strict=False)] != list(weight.shape):
            raise UserError(
                f"{name} is {list(weight.shape)} in the adapter, but {graph} wants "
                f"{shape or 'no such input'}: run `dvc repro` to build both from one model"
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(inputs[name].elem_type)
        weights[name] = weight.astype(dtype)
    return weights


if __name__ == "__main__":
    run(adapt)
