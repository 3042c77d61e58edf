"""The tensors of a file that ONNX Runtime loads as an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from stages.adapters.names import A, B


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return an adapter's tensors by name. Raises what the binding does for a file that is none."""
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
    # copies: what numpy() gives is the adapter's own memory, which goes with it
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


def in_pairs(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A, [in, rank], and B, [rank, out], by projection. Raises `ValueError` for what is no pair."""
    pairs = {}
    for name in sorted(tensors):
        projection = name.removesuffix(A).removesuffix(B)
        a, b = tensors.get(projection + A), tensors.get(projection + B)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            shape = list(tensors[name].shape)
            raise ValueError(f"{name} {shape} has no partner of its rank")
        pairs[projection] = a, b
    return pairs
