"""What fetch lets through of a family's settings, the exported graph computes as PyTorch does."""

import pytest

from stages.answers.generation import OnnxModel
from stages.weights.checkpoint import load_dequantized
from stages.weights.families import FAMILIES
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
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    "longrope": {"short_factor": FACTORS, "long_factor": FACTORS[::-1]},
}
LAYERS = {"use_sliding_window": True, "sliding_window": 16}
GEMMA = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20, "rms_norm_eps": 1e-2}
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
    "gemma3 kinds of layers by default": {"model_type": "gemma3_text", **GEMMA},
    "gemma3 biases, capped logits": {
        "model_type": "gemma3_text",
        "attention_bias": True,
        "final_logit_softcapping": 3.0,
        **GEMMA,
    },
    "gemma3 local rotation": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        **GEMMA,
    },
    "ernie4_5 biases": {"model_type": "ernie4_5", "use_bias": True},
    "granite biases": {"model_type": "granite", "attention_bias": True, "mlp_bias": True},
    "olmo2 biases": {"model_type": "olmo2", "attention_bias": True, "rms_norm_eps": 1e-2},
    "olmo2 every head its key": {"model_type": "olmo2", "num_key_value_heads": 4},
    "smollm3 biases": {"model_type": "smollm3", "attention_bias": True, "mlp_bias": True},
    "smollm3 window": {"model_type": "smollm3", "no_rope_layers": [1, 0], **LAYERS},
    "smollm3 layers by default": {"model_type": "smollm3", "num_hidden_layers": 4},
    "phi3 part of the head": {
        "model_type": "phi3",
        "hidden_size": 256,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
    },
}


def rotated(family: str, kind: str) -> dict:
    """Return a family's settings with a rope type."""
    sizes = {
        "gemma3_text": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
        "ernie4_5": {"head_dim": 16},
        "ministral": {"head_dim": 16},
        "olmo3": {"layer_types": ["full_attention", "sliding_attention"]},
        "phi3": {"original_max_position_embeddings": 64},
        "qwen3": {"head_dim": 16},
    }
    rope: dict = {"rope_theta": 10000.0, "rope_type": kind, **ROPE[kind]}
    if family in ("gemma3_text", "olmo3"):  # each kind of layer has its own
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    return {"model_type": family, "rope_parameters": rope, **sizes.get(family, {})}


TYPES = {
    f"{name} {kind}": rotated(name, kind)
    for name, family in FAMILIES.items()
    for kind in family.rope_types
}


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
