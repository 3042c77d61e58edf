"""The fused LoRA product gives PEFT's outputs and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear

from stages.training.lora_product import FusedLinear, fuse_products


def adapted(fused: bool, **options) -> torch.nn.Module:
    """Two linears, with and without bias, adapted by random matrices."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 16, bias=False))
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["0", "1"], init_lora_weights=False, **options
    )
    if fused:
        fuse_products(config)
    return get_peft_model(layers, config)


def gradients(model: torch.nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, the gradient of the inputs and those of all adapter matrices."""
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    output.square().sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [output.detach(), inputs.grad, *trained]


def kinds(model: torch.nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, PeftLinear)}


@pytest.mark.parametrize("shape", [(5, 24), (1, 7, 24), (2, 3, 24)])
def test_outputs_and_gradients_are_those_of_peft(shape):
    model, fused = adapted(fused=False), adapted(fused=True)
    assert kinds(fused) == {FusedLinear}
    inputs = torch.randn(shape)
    for ours, theirs in zip(gradients(fused, inputs), gradients(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_layer_with_dropout_stays_as_peft_made_it():
    model = adapted(fused=True, lora_dropout=0.1)
    assert kinds(model) == {PeftLinear}
