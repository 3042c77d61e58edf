"""Decoder layers as compiled code: a GPU that waits for Python's launches trains faster.

    compile_layers(trainer.model)        # finetune.compile=true; after PEFT has put its layers in

Each layer is compiled by itself, and all share the code: minutes for a whole model become seconds. The number
of tokens, another in every step, is a variable of that code.
"""

from __future__ import annotations

from peft import PeftModel
from torch._dynamo.exc import TorchDynamoException as NotCompiled

__all__ = ["NotCompiled", "compile_layers"]


def compile_layers(model: PeftModel, backend: str = "inductor") -> None:
    """Compile every decoder layer at its first call, which raises `NotCompiled` where it fails."""
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=True, backend=backend)
