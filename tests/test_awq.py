"""AWQ: its grid is Olive's, folding changes nothing in float, and it beats rounding to nearest."""

import json
import pickle

import pytest
import torch
from olive.common.quant.utils import WeightQuantizer
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from stages.core.errors import UserError
from stages.quantization import awq
from stages.quantization.architecture import linear_groups
from stages.quantization.awq import Awq
from stages.quantization.compensation import (
    Factor,
    compensate,
    factorize,
    find_range,
    inverse_factor,
    round_block,
    round_columns,
    try_ranges,
)
from stages.quantization.scale_search import Grid, output_error, search_scales
from stages.quantize import check_group_size
from stages.sources.random_model import train_tokenizer
from stages.weights import families
from stages.weights.checkpoint import load_dequantized
from support.project import ROOT
from support.tiny_models import GRANITE

FAMILIES = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "phi3": {"model_type": "phi3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": GRANITE,
    "ministral": {"model_type": "ministral", "head_dim": 32, "sliding_window": 16},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 16},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 32, "use_bias": True},
}
GRID = Grid(4, False, 32)


def tiny_model(family: str, **options) -> torch.nn.Module:
    """A seeded model with grouped-query attention and biases that are not zero."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(**shape | FAMILIES[family] | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def planted(outliers: int = 4):
    """Return a weight, [64, 128], and inputs, [512, 128], some of whose channels are far larger."""
    torch.manual_seed(1)
    inputs = torch.randn(512, 128) @ torch.randn(128, 128) * 0.3 + torch.randn(512, 128)
    inputs[:, :outliers] *= 50
    return torch.randn(64, 128), inputs


@torch.no_grad()
def with_outliers(model: torch.nn.Module) -> torch.nn.Module:
    """Give every layer channels with large activations, as trained models have them."""
    offset = families.FAMILIES[model.config.model_type].norm_offset
    for layer in model.model.layers:
        for norm in (part for name, part in layer.named_children() if name.endswith("layernorm")):
            norm.weight[::16] = 30 * (norm.weight[::16] + offset) - offset
    return model


def packed(model, folder, tokens, method, **more) -> torch.nn.Module:
    """Quantize a model by one of Olive's passes and read it back as the float weights that it encodes."""
    model.save_pretrained(folder / "base")
    train_tokenizer(ROOT / "data/travel.jsonl", 300).save_pretrained(folder / "base")
    options = {"bits": 4, "group_size": 32, "sym": False}
    if method is Awq:
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        options |= {"calibration": str(folder / "tokens.safetensors"), **more}
    handler = HfModelHandler(str(folder / "base"), load_kwargs={"torch_dtype": "float32"})
    target = folder / method.__name__
    create_pass_from_dict(method, options, disable_search=True).run(handler, str(target))
    return load_dequantized(target)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_beats_rounding_where_channels_stand_out(family, tmp_path):
    model, tokens = with_outliers(tiny_model(family)), torch.randint(97, (24, 64))
    unseen = torch.randint(97, (4, 64))
    expected = model(unseen).logits
    errors = {
        method: (packed(model, tmp_path, tokens, method)(unseen).logits - expected).norm()
        for method in (Awq, Rtn)
    }
    assert errors[Awq] < 0.8 * errors[Rtn]


@pytest.mark.slow
def test_the_same_calibration_gives_the_same_bytes(tmp_path):
    tokens = torch.arange(2 * 64).remainder(97).view(2, 64)
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        packed(tiny_model("llama"), tmp_path / run, tokens, Awq)
    one, two = (tmp_path / run / "Awq/model.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_another_process_sends_is_written_as_ones_own(family, tmp_path, monkeypatch):
    def as_sent(layers):
        for number, layer in enumerate(layers):
            layers[number] = pickle.loads(pickle.dumps(layer))

    tokens = torch.randint(97, (2, 64))
    for run, collect in (("one", awq.collect), ("two", as_sent)):
        monkeypatch.setattr(awq, "collect", collect)
        (tmp_path / run).mkdir()
        packed(tiny_model(family), tmp_path / run, tokens, Awq)
    one, two = (tmp_path / run / "Awq" for run in ("one", "two"))
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@torch.no_grad()
def test_tuning_brings_predictions_nearer_and_leaves_the_integers_alone(family, tmp_path):
    model, tokens = with_outliers(tiny_model(family)), torch.randint(97, (24, 64))
    unseen = torch.randint(97, (8, 64))
    expected = model(unseen).logits.log_softmax(-1)
    divergences, weights = {}, {}
    for steps in (0, 30, 30):
        again = packed(with_outliers(tiny_model(family)), tmp_path, tokens, Awq, tuning_steps=steps)
        found = again(unseen).logits.log_softmax(-1)
        divergence = kl_div(found, expected, log_target=True, reduction="batchmean")
        assert divergences.setdefault(steps, divergence) == divergence
        weights[steps] = load_file(tmp_path / "Awq/model.safetensors")
    assert divergences[30] < 0.9 * divergences[0]
    for name, tensor in weights[0].items():
        if name.endswith(("qweight", "qzeros")):
            assert torch.equal(weights[30][name], tensor), name
    scales = "model.layers.1.mlp.down_proj.scales"
    assert not torch.equal(weights[30][scales], weights[0][scales])


@torch.no_grad()
def test_where_bfloat16_is_fast_the_gram_matrices_can_still_be_inverted(monkeypatch):
    monkeypatch.setattr(awq, "fast_dtype", lambda: torch.bfloat16)
    model, tokens = tiny_model("llama", hidden_size=256, head_dim=64), torch.randint(97, (8, 64))
    model.model.embed_tokens.weight += 3  # inputs share a direction, as those of trained models do
    layer, arguments = model.model.layers[0], awq.layer_arguments(model, tokens[:1])[0]
    groups = linear_groups(layer, model.config)
    hidden = [model.model.embed_tokens(tokens)]
    _, grams = awq.run_and_watch(layer, groups, hidden, arguments)
    for gram in grams:
        least = torch.linalg.eigvalsh(gram.double())[0]
        assert least > -1e-4 * gram.diagonal().mean()  # 0 but for float32's last digits
        assert inverse_factor(gram).isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_rounds_as_olive_does(bits, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    expected = WeightQuantizer(bits, symmetric, 32).fake_quantize(weight)
    torch.testing.assert_close(Grid(bits, symmetric, 32).round(weight), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_olive_packs_the_very_integers_that_were_chosen(symmetric):
    from olive.common.quant.nn import QuantLinear

    weight, inputs = planted()
    grid = Grid(4, symmetric, 32)
    rounded = compensate(weight, factorize(inputs.T @ inputs, 32), grid)
    linear = torch.nn.Linear(128, 64, bias=False)
    linear.weight.data = rounded.weight
    module = QuantLinear.from_module(linear, 4, symmetric, 32, rounded.steps, rounded.zeros)
    torch.testing.assert_close(module(torch.eye(128)).T, rounded.weight)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_folded_scales_leave_the_float_model_as_it_was(family):
    model, tokens = tiny_model(family), torch.arange(40)[None]
    before = model(tokens).logits
    for layer in model.model.layers:
        for group in linear_groups(layer, model.config):
            if group.producer is not None:
                channels = group.consumers[0].in_features // group.repeat
                group.fold(torch.rand(channels) + 0.5)
    largest = before.abs().max().item()
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-4 * largest, rtol=0)


def test_only_olmo_reads_what_no_norm_has_scaled():
    """It norms what a block gives: what q, k, v, gate and up read is the sum of all layers before."""
    for family in FAMILIES:
        model = tiny_model(family)
        groups = linear_groups(model.model.layers[0], model.config)
        free = [group.producer is None for group in groups]
        assert free == [family.startswith("olmo"), False] * 2


@pytest.mark.parametrize("family", ["gemma3", "granite"])
@torch.no_grad()
def test_layers_are_calibrated_on_what_the_model_gives_them(family):
    """Both multiply the embedding before the first layer, each in another place."""
    model, tokens, seen = tiny_model(family), torch.arange(40)[None], []
    first = model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(tokens)
    hook.remove()
    torch.testing.assert_close(awq.first_hidden(model, tokens), seen[0])


def test_scales_beat_rounding_where_one_weight_meets_large_inputs():
    weight, inputs = planted()
    scales = search_scales([weight], inputs.T @ inputs, GRID, steps=10)
    plain = (inputs @ (GRID.round(weight) - weight).T).pow(2).sum()
    scaled = (inputs @ (GRID.round(weight * scales) / scales - weight).T).pow(2).sum()
    assert scaled < 0.5 * plain


def test_compensation_lowers_the_error_of_the_output_below_that_of_rounding():
    weight, inputs = planted()
    gram = inputs.T @ inputs
    rounded = compensate(weight, factorize(gram, 32), GRID)
    plain = output_error(GRID.round(weight) - weight, gram)
    assert output_error(rounded.weight - weight, gram) < 0.6 * plain


def test_columns_with_large_inputs_come_first_and_groups_stay_whole():
    weight, inputs = planted()
    inputs[:, 70] *= 200
    gram = inputs.T @ inputs
    factor = factorize(gram, 32)
    assert factor.order[0] == 70
    assert set(factor.order[:32].tolist()) == set(range(64, 96))
    in_line = Factor(torch.arange(128), inverse_factor(gram))
    ordered, plain = (
        output_error(compensate(weight, f, GRID).weight - weight, gram) for f in (factor, in_line)
    )
    assert ordered < plain


def test_the_gram_matrix_gives_the_error_of_the_output():
    weight, inputs = planted()
    inputs = inputs.double()
    error = (GRID.round(weight) - weight).double()
    by_gram = output_error(error, inputs.T @ inputs)
    torch.testing.assert_close(by_gram.double(), (inputs @ error.T).pow(2).sum(), rtol=1e-5, atol=0)


def test_attention_heads_that_share_values_share_scales():
    model = tiny_model("llama")
    group = linear_groups(model.model.layers[0], model.config)[1]
    channels = torch.arange(32.0)
    assert group.spread(channels).shape == (64,)
    torch.testing.assert_close(group.gather(group.spread(channels)), channels)


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does():
    config = tiny_model("llama", intermediate_size=336).config
    with pytest.raises(UserError, match=r"mlp\.down_proj's input 336: 16 does$"):
        check_group_size(config, 64)
    check_group_size(config, 16)
    assert json.loads(config.to_json_string())["intermediate_size"] == 336


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_finds_the_ranges_that_the_loop_does(symmetric):
    for bits, width, rows in ((4, 32, 64), (4, 128, 1000), (8, 64, 75)):
        torch.manual_seed(rows)
        grid = Grid(bits, symmetric, width)
        block, cost = torch.randn(width, rows).cuda(), torch.rand(width, 1).cuda()
        found, expected = find_range(block, cost, grid), try_ranges(block, cost, grid)
        errors = [
            (grid.round_to(block, *each) - block).square().mul(cost).sum(0)
            for each in (found, expected)
        ]
        # sums in another order may prefer another of two ranges that are as good
        torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_rounds_as_the_loop_does():
    for width, rows in ((32, 64), (64, 75), (128, 1000)):  # rows that fill no tile, too
        torch.manual_seed(rows)
        inputs = torch.randn(512, width) * torch.rand(width) * 3
        upper, block = inverse_factor(inputs.T @ inputs).cuda(), torch.randn(width, rows).cuda()
        step, zero = GRID.range(block.amin(0), block.amax(0))
        expected, _ = round_columns(block.clone(), upper, step, zero, GRID.top)
        rounded, _ = round_block(block, upper, step, zero, GRID.top)
        # a last digit may tip a weight halfway between two integers, and with it the rest of its row
        assert (rounded != expected).any(0).float().mean() < 0.02
