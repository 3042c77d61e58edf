"""Proof that the graphs compute what PyTorch computes with the same weights, before a stage hands them on.

    off = prove_graph(Path("models/quantized"), folder, settings.optimize)        # in optimize
    prove_adapter(Path("models/quantized"), Path("models/adapter"), onnx, file)   # in adapt

An exporter that does not know a rotation, a bias or a window drops it without a word, and the answers that
come out are plausible. So logits are compared after a few, after some and after many tokens: what a wrong
rotation does grows with the position. This decides only whether there is a result; no result depends on it.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PretrainedConfig

from stages.answers.devices import exported_for, in_software, why_not
from stages.answers.generation import OnnxModel
from stages.answers.runtime import GRAPH, plain, read_config
from stages.core.errors import UserError
from stages.core.settings import Optimize
from stages.weights.checkpoint import load_dequantized
from stages.weights.hardware import device, fast_dtype

# More tokens find nothing new on a CPU, and attention's cost grows with their square. On a GPU they reach
# beyond 4096, where the rotations of Phi-3's longrope change.
LONGEST = {"cpu": 1024, "cuda": 4352, "software": 64}
# How far logits may be off, RMS, in standard deviations of PyTorch's at that place. Float32 differs in the
# order of sums only (1e-5 was seen). Float16, and int8 activations (accuracy_level 4), round in every layer:
# 0.06 was seen at 30 layers. Unrelated logits are off by 1.4.
EXACT, ROUNDED = 0.01, 0.3
# The part of PEFT's change of the logits that the graph's must have. Rounding averages out over the
# vocabulary where the change is several times larger: 1.00 in float32, 1.02 with int8 activations were seen.
SHARE = (0.8, 1.25)
LARGE = 4  # times the rounding


def prove_graph(checkpoint: Path, onnx: Path, options: Optimize) -> str:
    """Compare model.onnx with PyTorch on the checkpoint's weights; say how far it is off.

    Raises `UserError` if that is beyond rounding.
    """
    provider = options.execution_provider
    if reason := cannot_run(provider):
        return f"not compared with PyTorch: {reason}"
    model = load_dequantized(checkpoint, reference_dtype())
    places = places_in(model.config, provider)
    tokens = probe(model.config.vocab_size, places[-1])
    expected = torch_logits(model, tokens, places)
    del model  # a GPU may not hold both
    make_room()
    try:
        found = OnnxModel(onnx).logits(tokens)[[place - 1 for place in places]]
    except Exception as error:  # the binding raises plain Exception
        if isinstance(error, UserError):
            raise
        raise UserError(f"the exported graph does not run: {plain(error)}") from None
    tolerance = EXACT if options.accuracy_level == 1 else ROUNDED
    return f"off PyTorch's logits by {widest_gap(expected, found, places, tolerance):.1g} sd"


def prove_adapter(checkpoint: Path, peft: Path, onnx: Path, file: Path) -> str:
    """Compare what the adapter changes in lora.onnx with what it changes in PEFT; say how much of it.

    Raises `UserError` if it is another change.
    """
    if reason := cannot_run(exported_for(read_config(onnx, GRAPH))):
        return f"not compared with PEFT: {reason}"
    model = PeftModel.from_pretrained(load_dequantized(checkpoint, reference_dtype()), peft).eval()
    tokens, places = probe(model.config.vocab_size, 64), [8, 64]
    tuned = torch_logits(model, tokens, places)
    with model.disable_adapter():
        base = torch_logits(model, tokens, places)
    del model
    make_room()
    wanted = tuned - base
    if not wanted.any():
        return "it changes no logit: nothing was learned"
    graph = OnnxModel(onnx, {"adapter": file})
    rows = [place - 1 for place in places]
    graph_base = graph.logits(tokens)[rows]
    change = graph.logits(tokens, "adapter")[rows] - graph_base
    if wanted.std() < LARGE * (graph_base - base).std():
        return "it changes the logits hardly more than rounding does"
    share = float((change * wanted).sum() / (wanted * wanted).sum())
    if not SHARE[0] <= share <= SHARE[1]:
        raise UserError(
            f"the graph in {onnx} does not apply the adapter as PEFT does: of PEFT's change of the "
            f"logits it makes {share:.2f}; please report adapter_config.json and the model's config.json"
        )
    return f"{share:.2f} of PEFT's change of the logits"


def cannot_run(provider: str) -> str:
    """Say why a graph for a provider does not run here, or nothing."""
    if provider == "cuda" and device() != "cuda":
        return "this machine has no CUDA"
    return why_not(provider)


def reference_dtype() -> torch.dtype:
    """Return float32 on a CPU; on a GPU what fits beside the activations, for the graph's are float16."""
    return fast_dtype() if device() == "cuda" else torch.float32


def places_in(config: PretrainedConfig, provider: str = "cpu") -> list[int]:
    """Return after how many tokens to compare: a few, some, many."""
    most = LONGEST["software"] if provider == "webgpu" and in_software() else LONGEST[device()]
    longest = min(most, config.max_position_embeddings - 1)
    return sorted({min(8, longest), longest // 4 or 1, longest})


def probe(vocabulary: int, count: int) -> list[int]:
    """Return seeded tokens, [count], from behind the first few, which are control tokens in many models."""
    first = min(16, vocabulary - 1)
    return np.random.default_rng(0).integers(first, vocabulary, count).tolist()


@torch.no_grad()
def torch_logits(model: torch.nn.Module, tokens: list[int], places: list[int]) -> np.ndarray:
    """Return PyTorch's logits after so many tokens, [places, vocabulary], float32."""
    kept = torch.tensor([place - 1 for place in places], device=model.device)
    row = torch.tensor([tokens], device=model.device)
    logits = model(input_ids=row, use_cache=False, logits_to_keep=kept).logits
    return logits[0].float().cpu().numpy()


def widest_gap(
    expected: np.ndarray, found: np.ndarray, places: list[int], tolerance: float
) -> float:
    """Return how far logits, [places, vocabulary], are off, RMS, in standard deviations of the expected.

    One constant more on all logits changes no probability, and does not count. Raises `UserError` beyond the
    tolerance.
    """
    gaps = (found - expected).std(axis=1) / expected.std(axis=1)
    for place, gap in zip(places, gaps, strict=True):
        if not gap <= tolerance:  # NaN is not, either
            raise UserError(
                "the exported graph does not compute what PyTorch does with the same weights: after "
                f"{place} tokens its logits are off by {gap:.2g} standard deviations, and rounding makes at "
                f"most {tolerance:g}; use another base model, and please report this one's config.json"
            )
    return float(gaps.max())


def make_room() -> None:
    """Give memory back that a deleted model held."""
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
