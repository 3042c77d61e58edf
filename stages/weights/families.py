"""The model families, an entry each: what of their settings PyTorch and the exported graph both follow.

Asked by fetch (stages/sources/loadable.py), quantize (stages/quantization/architecture.py) and optimize
(stages/graph/genai_builder.py). A family whose layers are those of another needs no more than its entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# one table of angles for every length up to max_position_embeddings: PyTorch's is put into the graph
ONE_TABLE = ("default", "dynamic", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """What a family, a model_type of transformers, does otherwise than Llama."""

    rope_types: tuple[str, ...] = ONE_TABLE
    # in which layers PyTorch's attention slides, where config.json names a window
    windows: Literal["none", "all", "by layer"] = "none"
    partial_rotation: bool = False
    # whether q, k and v, and gate and up, are one linear each
    fused: bool = False
    # a norm multiplies by its weight plus this
    norm_offset: float = 0.0
    # the model type and the architecture that ONNX Runtime GenAI's builder makes it from, if not its own
    built_as: tuple[str, str] | None = None
    # settings that change attention or logits in only one of PyTorch and the graph: refused where set
    refused: tuple[str, ...] = ()


FAMILIES = {
    "ernie4_5": Family(),
    "gemma3_text": Family(
        windows="by layer",
        norm_offset=1.0,
        built_as=("gemma2", "Gemma3ForCausalLM"),
        refused=("attn_logit_softcapping", "use_bidirectional_attention"),
    ),
    "granite": Family(),
    "llama": Family(),
    "ministral": Family(windows="by layer", built_as=("mistral", "MistralForCausalLM")),
    "mistral": Family(windows="all"),
    "olmo2": Family(built_as=("olmo", "OlmoForCausalLM")),  # stages/graph/olmo2.py
    "olmo3": Family(windows="by layer", built_as=("olmo", "OlmoForCausalLM")),
    "phi3": Family(("default", "longrope"), "all", partial_rotation=True, fused=True),
    "qwen2": Family(windows="by layer"),
    "qwen3": Family(windows="by layer"),
    "smollm3": Family(windows="by layer"),
}


def rope_settings(config: Any) -> dict[str, dict[str, Any]]:
    """Return a model's rope settings by the kind of layer that they are for, "" where for all layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = {kind: settings for kind, settings in rope.items() if isinstance(settings, dict)}
    return by_kind or {"": rope}
