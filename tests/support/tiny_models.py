"""Tiny seeded checkpoints of every family, packed to 4 bits and exported by the stages' own code."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

import numpy as np
import torch
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from stages.adapters.convert import convert
from stages.core.settings import Optimize
from stages.graph.export import export
from stages.sources import random_model
from stages.weights import families
from stages.weights.checkpoint import load_dequantized

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FACTORS = [1.0, 1.2, 1.6, 2.2, 3.0, 4.2, 6.0, 8.0]
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": FACTORS}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    # as Llama 3.2, whose rotations change within the head
    "llama3-rope": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
    },
    "llama-bias": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 48, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 256},
    "phi3-longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": LONG_ROPE,
    },
    # as Phi-4-mini: a part of every head, and a tied head
    "phi3-partial": {
        "model_type": "phi3",
        "hidden_size": 256,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": LONG_ROPE | {"short_factor": [1.0] * 24, "long_factor": FACTORS * 3},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 96,  # its root, by which the embedding is multiplied, is not two decimals long
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "granite": GRANITE | {"tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    # each kind of layer has its rotation: only those that look back on everything stretch it
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 32, "tie_word_embeddings": True},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 32,
        "sliding_window": 48,
        "layer_types": ["full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "qwen3-yarn": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
    },
}
EXACT = Optimize(execution_provider="cpu", accuracy_level=1)


def checkpoint(
    folder: Path, architecture: dict, head_bits: int = 8, bits: int = 4, symmetric: bool = False
) -> Path:
    """Make a random model and pack it; norms, biases and weights are away from their defaults."""
    base, packed = folder / "base", folder / "packed"
    corpus = folder / "corpus.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    corpus.write_text(json.dumps({"text": "what is the capital of France?"}) + "\n")
    random_model.make(SHAPE | architecture, 320, corpus, base)
    model = shaken(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    model.save_pretrained(base)
    sizes = {"lm_head": head_bits, "model.embed_tokens": head_bits}
    options = {
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "lm_head": head_bits < 16,
        "embeds": head_bits < 16,
        "overrides": {name: {"bits": size} for name, size in sizes.items() if size < 16},
    }
    handler = HfModelHandler(str(base), load_kwargs={"torch_dtype": "float32"})
    create_pass_from_dict(Rtn, options, disable_search=True).run(handler, str(packed))
    return packed


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter seeded noise, so that one that is dropped changes the logits."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:  # Gemma's multiply by 1 + weight
            offset = families.FAMILIES[model.config.model_type].norm_offset
            parameter.copy_(1 - offset + 0.1 * noise)
        else:
            width = 4 if name.endswith("bias") else parameter.shape[-1]
            parameter.copy_(noise * width**-0.5)
    model.tie_weights()
    return model


def exported(packed: Path, folder: Path, targets="all-linear", options: Optimize = EXACT) -> Path:
    """Export a packed checkpoint into a folder and return that."""
    export(packed, options, targets, folder)
    return folder


def trained(packed: Path, folder: Path, seed: int, **options) -> PeftModel:
    """Make an adapter with random weights, save it, and return PyTorch's model with it."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(load_dequantized(packed), LoraConfig(**defaults | options))
    model.save_pretrained(folder)
    return model.eval()


def laid_out(root: Path) -> Path:
    """Make a tiny model as a version is laid out, onnx/ and onnx_adapter/; return the folder of both."""
    packed = checkpoint(root, FAMILIES["llama"])
    onnx = exported(packed, root / "model/onnx")
    trained(packed, root / "peft", 1)
    (root / "model/onnx_adapter").mkdir()
    convert(root / "peft", onnx, root / "model/onnx_adapter/adapter.onnx_adapter")
    return root / "model"


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Return PyTorch's logits after every token, [tokens, vocabulary]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def greedy(
    model: torch.nn.Module, prompt: list[int], count: int, ends: Set[int] = frozenset()
) -> list[int]:
    """Return PyTorch's greedy answer, every token from the whole text before it, up to and with an end."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(model, text)[-1].argmax()))
        if text[-1] in ends:
            break
    return text[len(prompt) :]


def same(left: np.ndarray, right: np.ndarray) -> None:
    """Both are float32 with sums in another order: 1e-4 of the largest is tens of times what that makes."""
    np.testing.assert_allclose(left, right, atol=1e-4 * np.abs(right).max(), rtol=0)


def tokens(count: int) -> list[int]:
    """Return seeded tokens, none of them special."""
    return np.random.default_rng(0).integers(2, 280, count).tolist()
