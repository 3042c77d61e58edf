"""AWQ: its grid is Olive's, its folding changes nothing in float, its search beats plain rounding."""

import pytest
import torch
from olive.common.quant.utils import WeightQuantizer
from transformers import AutoConfig, AutoModelForCausalLM

from stages.architecture import linear_groups
from stages.passes.awq_search import (
    Grid,
    clip,
    diagonal_blocks,
    groups_error,
    output_error,
    search_scales,
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def tiny_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def planted(outliers: int = 4):
    """Return a weight, [64, 128], and inputs, [512, 128], some of whose channels are far larger."""
    torch.manual_seed(1)
    inputs = torch.randn(512, 128)
    inputs[:, :outliers] *= 50
    return torch.randn(64, 128), inputs


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_rounds_as_olive_does(bits, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    expected = WeightQuantizer(bits, symmetric, 32).fake_quantize(weight)
    torch.testing.assert_close(Grid(bits, symmetric, 32).round(weight), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_folded_scales_leave_the_float_model_as_it_was(family):
    model, tokens = tiny_model(family), torch.arange(20)[None]
    before = model(tokens).logits
    for layer in model.model.layers:
        for group in linear_groups(layer, model.config):
            channels = group.consumers[0].in_features // group.repeat
            group.fold(torch.rand(channels) + 0.5)
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)


def test_scales_beat_rounding_where_channels_stand_out():
    weight, inputs = planted()
    gram, grid = inputs.T @ inputs, Grid(4, False, 32)
    scales = search_scales([weight], gram, grid, steps=20)
    plain = (inputs @ (grid.round(weight) - weight).T).pow(2).sum()
    scaled = (inputs @ (grid.round(weight * scales) / scales - weight).T).pow(2).sum()
    assert scaled < 0.5 * plain


def test_clipping_never_makes_a_group_worse():
    weight, inputs = planted()
    grid, blocks = Grid(4, False, 32), diagonal_blocks(inputs.T @ inputs, 32)
    groups = weight.view(64, -1, 32)
    clipped = clip(weight, inputs.T @ inputs, grid, steps=8, least=0.5).view_as(groups)

    def error(kept):
        return groups_error(
            groups, kept.amin(-1, keepdim=True), kept.amax(-1, keepdim=True), blocks, grid
        )

    assert (error(clipped) <= error(groups) * (1 + 1e-5)).all()
    assert error(clipped).sum() < error(groups).sum()


def test_the_gram_matrix_gives_the_error_of_the_output():
    weight, inputs = planted()
    inputs = inputs.double()
    error = (Grid(4, False, 32).round(weight) - weight).double()
    by_gram = output_error(error, inputs.T @ inputs)
    torch.testing.assert_close(by_gram.double(), (inputs @ error.T).pow(2).sum(), rtol=1e-5, atol=0)


def test_bfloat16_ranks_candidates_as_float64_does():
    weight, inputs = planted()
    gram, errors = inputs.T @ inputs, []
    for bits in (4, 8):
        for size in (16, 32, 64, 128):
            error = Grid(bits, False, size).round(weight) - weight
            exact = output_error(error.double(), gram.double()).item()
            errors.append((exact, output_error(error, gram.bfloat16()).item()))
    assert sorted(errors) == sorted(errors, key=lambda pair: pair[1])
    assert all(abs(fast / exact - 1) < 0.01 for exact, fast in errors)


def test_attention_heads_that_share_values_share_scales():
    model = tiny_model("llama")
    group = linear_groups(model.model.layers[0], model.config)[1]
    channels = torch.arange(32.0)
    assert group.spread(channels).shape == (64,)
    torch.testing.assert_close(group.gather(group.spread(channels)), channels)
