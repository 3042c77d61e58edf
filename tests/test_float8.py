"""A checkpoint in FP8 becomes the floats that it stands for; one that is quantized otherwise is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.core.errors import UserError
from stages.sources import float8
from stages.sources.headers import INDEX

NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHT = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
BLOCKS = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
SPREAD = torch.ones(130, 200)
SPREAD[:128, 128:], SPREAD[128:, :128], SPREAD[128:, 128:] = 2.0, 0.5, 0.25
ROWS = torch.rand(130, 1) + 0.5
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def make(folder, tensors, embedding=torch.bfloat16, **config):
    """Write a checkpoint with an embedding and the tensors."""
    embedded = {"model.embed_tokens.weight": torch.ones(4, 4, dtype=embedding)}
    save_file({**embedded, **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


@pytest.mark.parametrize(
    ("kind", "scale", "factors"),
    [
        ("weight_scale_inv", BLOCKS, SPREAD),
        ("weight_scale_inv", torch.tensor([[3.0]]), 3.0),
        ("weight_scale", torch.tensor(3.0), 3.0),
        ("weight_scale", torch.tensor([3.0]), 3.0),
        ("weight_scale", ROWS, ROWS),
        ("weight_scale", ROWS[:, 0].contiguous(), ROWS),
    ],
)
@pytest.mark.parametrize("config", [{}, {"quantization_config": FP8}])
def test_weights_are_multiplied_by_their_scales(tmp_path, kind, scale, factors, config):
    module = NAME.removesuffix(".weight")
    more = {f"{module}.{kind}": scale, f"{module}.input_scale": torch.tensor(2.0)}
    folder = make(tmp_path, {NAME: WEIGHT, **more}, torch.float32, **config)
    assert float8.restore(folder) == ", from FP8 to float32"
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {NAME, "model.embed_tokens.weight"}
    assert torch.equal(tensors[NAME], WEIGHT.float() * factors)
    written = json.loads((folder / "config.json").read_text())
    assert written == {"model_type": "llama", "dtype": "float32"}


def test_weights_become_bfloat16_beside_other_bfloat16(tmp_path):
    folder = make(tmp_path, {NAME: WEIGHT})
    assert float8.restore(folder) == ", from FP8 to bfloat16"
    assert torch.equal(load_file(folder / "model.safetensors")[NAME], WEIGHT.bfloat16())


@pytest.mark.parametrize(("weights", "scales"), ["ab", "ba"])
def test_a_scale_is_found_in_another_shard_and_the_index_follows(tmp_path, weights, scales):
    weights, scales = (f"{name}.safetensors" for name in (weights, scales))
    folder = make(tmp_path, {NAME: WEIGHT})
    (folder / "model.safetensors").rename(folder / weights)
    scale = NAME.replace("weight", "weight_scale")
    save_file({scale: torch.tensor(2.0)}, folder / scales)
    (folder / INDEX).write_text(json.dumps({"weight_map": {NAME: weights, scale: scales}}))
    float8.restore(folder)
    assert torch.equal(load_file(folder / weights)[NAME], WEIGHT.bfloat16() * 2)
    assert scale not in json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({NAME: torch.ones(2, 2)}, {"quant_method": "bitsandbytes"}, "already, by bitsandbytes"),
        (
            {NAME.replace("weight", "qweight"): torch.ones(2, 2, dtype=torch.int32)},
            {"quant_method": "gptq"},
            "up_proj.qweight at model.source is I32: quantized already, by gptq",
        ),
        ({NAME: torch.ones(2, 2, dtype=torch.int8)}, None, "is I8: quantized already"),
        ({NAME: WEIGHT}, FP8, f"{NAME} at model.source is FP8 without its weight_scale_inv"),
        (
            {NAME: WEIGHT, f"{NAME}_scale_inv": torch.ones(3, 2)},
            FP8,
            "is [3, 2], which does not fit a weight of [130, 200] in blocks of [128, 128]",
        ),
    ],
)
def test_what_cannot_be_brought_back_is_refused_in_one_line(tmp_path, tensors, settings, message):
    config = {"quantization_config": settings} if settings else {}
    with pytest.raises(UserError) as error:
        float8.restore(make(tmp_path, tensors, **config))
    assert message in str(error.value)
    assert str(error.value).endswith("choose the float model")


def test_a_float_model_is_left_alone(tmp_path):
    folder = make(tmp_path, {NAME: torch.ones(2, 2)})
    before = (folder / "model.safetensors").read_bytes()
    assert float8.restore(folder) == ""
    assert (folder / "model.safetensors").read_bytes() == before
