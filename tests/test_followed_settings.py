"""What fetch lets through of a family's settings, the exported graph computes as PyTorch does."""

import pytest

from stages.answers.generation import OnnxModel
from stages.sources.loadable import ROPE_TYPES
from stages.weights.checkpoint import load_dequantized
from support.tiny_models import FACTORS, checkpoint, exported, greedy, logits, same, tokens

ROPE = {
    "default": {"rope_theta": 5e5},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"short_factor": FACTORS, "long_factor": FACTORS[::-1]},
}
LAYERS = {"use_sliding_window": True, "sliding_window": 16}
OTHERS = {
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama gelu": {"model_type": "llama", "hidden_act": "gelu"},
    "llama head size": {"model_type": "llama", "head_dim": 32},
    "llama one key": {"model_type": "llama", "num_key_value_heads": 1},
    "llama linear, trained on less": {
        "model_type": "llama",
        "rope_scaling": {
            "type": "linear",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral no window": {"model_type": "mistral", "sliding_window": None},
    "qwen2 window": {"model_type": "qwen2", "max_window_layers": 0, **LAYERS},
    "qwen2 window above": {"model_type": "qwen2", "max_window_layers": 1, **LAYERS},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True, "head_dim": 32},
    "qwen3 window above": {
        "model_type": "qwen3",
        "max_window_layers": 1,
        "head_dim": 16,
        **LAYERS,
    },
    "phi3 part of the head": {
        "model_type": "phi3",
        "hidden_size": 256,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
    },
}


def rotated(family: str, kind: str) -> dict:
    """Return a family's settings with a rope type."""
    size = {"qwen3": {"head_dim": 16}, "phi3": {"original_max_position_embeddings": 64}}
    rope = {"rope_theta": 10000.0, "rope_type": kind, **ROPE[kind]}
    return {"model_type": family, "rope_parameters": rope, **size.get(family, {})}


TYPES = {f"{f} {kind}": rotated(f, kind) for f, kinds in ROPE_TYPES.items() for kind in kinds}


@pytest.mark.parametrize("name", TYPES | OTHERS)
@pytest.mark.slow
def test_the_graph_answers_as_pytorch_does(name, tmp_path):
    architecture = {"tie_word_embeddings": False, **(TYPES | OTHERS)[name]}
    packed = checkpoint(tmp_path, architecture)
    expected, graph = load_dequantized(packed), OnnxModel(exported(packed, tmp_path / "onnx"))
    for count in (12, 100):
        same(graph.logits(tokens(count)), logits(expected, tokens(count)))
    answer = graph.generate(tokens(30), 12)
    assert answer == greedy(expected, tokens(30), len(answer))
