"""On an NVIDIA GPU: the same numbers as on the CPU. Run with `pytest -m gpu`."""

import json

import pytest
import torch

from stages.sources import random_model
from stages.weights.checkpoint import load_float

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS = [[5, 17, 33, 101, 7], [64, 80, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}


@pytest.fixture(params=["llama", "phi3", "mistral", "qwen2"])
def model(request, tmp_path):
    """A tiny model in bfloat16 on the GPU."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "what is the capital of France?"}) + "\n")
    random_model.make({"model_type": request.param, **SHAPE}, 320, corpus, tmp_path / "base")
    return load_float(tmp_path / "base", torch.bfloat16)


def packed(rows):
    tokens = torch.tensor([[token for row in rows for token in row]], device="cuda")
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].cuda()
    return {"input_ids": tokens, "position_ids": positions}


def test_packed_rows_with_fused_kernels_equal_each_row_alone(model):
    from transformers.integrations.liger import apply_liger_kernel

    from stages.training.packed_attention import PACKED, boundaries
    from stages.training.trainer import LIGER

    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [model(torch.tensor([row], device="cuda")).logits[0].float() for row in ROWS]
    model.set_attn_implementation(PACKED)
    apply_liger_kernel(model, LIGER)
    inputs = packed(ROWS)
    logits = model(**inputs, **boundaries(inputs["position_ids"])).logits[0].float()
    expected = torch.cat(alone)
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
