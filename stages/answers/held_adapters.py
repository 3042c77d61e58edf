"""The adapters beside a model, and how they come to act: three ways, of which a machine gets its fastest.

    held = hold_adapters(folder, {"travel": file}, "cpu")
    generator = og.Generator(held.model("travel", captured=True), params)
    held.activate(generator, "travel")

By our operator (stages/lora_op) one model answers with any adapter. Where that cannot be compiled, a CPU has
them as inputs of lora.onnx, and an NVIDIA GPU as weights beside those that its models share. WebGPU, which
cannot have our operator, has them as inputs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stages.adapters.names import LORA_GRAPH, OPERATOR_GRAPH
from stages.adapters.tensors import in_pairs, read_tensors
from stages.answers.runtime import GRAPH, og, open_model
from stages.core.errors import UserError
from stages.lora_op import NUMBER
from stages.lora_op.library import Operator, open_operator, why_not

if TYPE_CHECKING:
    from stages.answers.gpu_weights import Entry


class Held(Protocol):
    """Adapters by name, and the models that answer with them. Without a name it is the base that answers."""

    def add(self, name: str, file: Path) -> None:
        """Load an adapter. Raises `UserError` for a damaged file or one of another model."""

    def remove(self, name: str) -> None:
        """Forget an adapter, of which no generator may be left."""

    def model(self, name: str | None, captured: bool) -> og.Model:
        """Return the model to make a generator of; on a GPU for one prompt, if `captured`, or for batches."""

    def activate(self, generator: og.Generator, name: str | None) -> None:
        """Let a new generator of that model answer with the adapter."""


def hold_adapters(folder: Path, files: dict[str, Path], device: str) -> Held:
    """Open a folder's model on a device with adapters, in the fastest way that this machine has."""
    held: Held
    operator, on_gpu = None, device == "cuda"
    if files and device != "webgpu" and (folder / OPERATOR_GRAPH).is_file():
        operator = open_operator(on_gpu)
        if operator is None:
            say_once(f"adapters run in ONNX Runtime's own way, which is slower: {why_not(on_gpu)}")
    if operator is not None:
        held = ByOperator(folder, operator)
    elif on_gpu:
        held = AsWeights(folder, bool(files))
    else:
        held = AsInputs(folder, bool(files), device)
    for name, file in files.items():
        held.add(name, file)
    return held


@cache
def say_once(remark: str) -> None:
    """Print a line on stderr, at its first call."""
    print(remark, file=sys.stderr)


class ByOperator:
    """In our operator, which a model asks for the adapter of a number."""

    def __init__(self, folder: Path, operator: Operator):
        self._folder, self._operator = folder, operator
        self._numbers: dict[str | None, int] = {None: 0}
        weakref.finalize(self, remove_all, operator, self._numbers)
        self._models: dict[bool, og.Model] = {}
        self._weights = shared_weights(folder, OPERATOR_GRAPH) if operator.on_gpu else None
        before = operator.kernels()
        self.model(None, captured=operator.on_gpu)
        # of each projection that takes an adapter
        self._kinds = {
            name: kind
            for name, (count, kind) in operator.kernels().items()
            if count > before.get(name, (0,))[0]
        }

    def add(self, name: str, file: Path) -> None:
        """Read the file and hand its tensors to the operator."""
        try:
            tensors = read_tensors(file)
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            raise not_an_adapter(name, file) from None
        kind = np.float16 if self._operator.on_gpu else np.float32
        for tensor, array in sorted(tensors.items()):
            if array.dtype != kind:
                raise misfit(
                    name, file, f"{tensor} is {array.dtype}, the graph's is {kind.__name__}"
                )
        try:
            pairs = in_pairs(tensors)
            for projection in pairs:
                if projection not in self._kinds:
                    raise ValueError(f"there is no {projection} in {OPERATOR_GRAPH} that takes one")
            number = self._operator.add(pairs, max(self._kinds.values()))
        except ValueError as error:
            raise misfit(name, file, str(error)) from None
        self._numbers[name] = number

    def remove(self, name: str) -> None:
        """Free its memory."""
        self._operator.remove(self._numbers.pop(name))

    def model(self, name: str | None, captured: bool) -> og.Model:
        """Return the one model, or on a GPU one of the two."""
        captured = captured and self._operator.on_gpu
        if captured not in self._models:
            self._models[captured] = open_model(
                self._folder, OPERATOR_GRAPH, self._weights, captured, self._operator.name
            )
        return self._models[captured]

    def activate(self, generator: og.Generator, name: str | None) -> None:
        """Give the adapter's number."""
        generator.set_model_input(NUMBER, as_input(self._numbers[name]))


def remove_all(operator: Operator, numbers: dict[str | None, int]) -> None:
    """Free the memory of all adapters that a model had."""
    for number in numbers.values():
        operator.remove(number)


@cache
def as_input(number: int) -> np.ndarray:
    """Return a number as a model's input, [1]. The runtime keeps no copy, so it stays for good."""
    return np.array([number], np.int64)


class AsInputs:
    """On the CPU or by WebGPU, as inputs of lora.onnx; without any, model.onnx is faster."""

    def __init__(self, folder: Path, any_adapter: bool, device: str):
        self._model = open_model(folder, LORA_GRAPH if any_adapter else GRAPH, device=device)
        self._adapters = og.Adapters(self._model) if any_adapter else None

    def add(self, name: str, file: Path) -> None:
        """Let the runtime read the file."""
        if self._adapters is None:
            raise ValueError("the model was opened without adapters")
        try:
            self._adapters.load(str(file), name)
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            raise not_an_adapter(name, file) from None

    def remove(self, name: str) -> None:
        """Let the runtime forget it."""
        if self._adapters is not None:
            self._adapters.unload(name)

    def model(self, name: str | None, captured: bool) -> og.Model:
        """Return the one model."""
        return self._model

    def activate(self, generator: og.Generator, name: str | None) -> None:
        """Name the adapter."""
        if name is not None:
            generator.set_active_adapter(self._adapters, name)


class AsWeights:
    """On a GPU, as weights of a model for each adapter, all of which share the base's."""

    def __init__(self, folder: Path, any_adapter: bool):
        self._folder = folder
        self._entries: dict[str | None, list[Entry]] = {None: shared_weights(folder, GRAPH)}
        self._models: dict[Hashable, og.Model] = {}
        self._graph: Any = None  # lora.onnx, read with the first adapter
        self._any_adapter = any_adapter
        self.model(None, captured=True)

    def add(self, name: str, file: Path) -> None:
        """Find where the file has its tensors; a model is opened when it is asked for."""
        from stages.answers.gpu_weights import adapter_weights, base_weights, read_graph

        if not self._any_adapter:
            raise ValueError("the model was opened without adapters")
        if self._graph is None:
            self._graph = read_graph(self._folder, LORA_GRAPH)
        try:
            tensors = adapter_weights(file, self._folder, self._graph)
        except UserError as error:
            raise misfit(name, file, str(error)) from None
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            raise not_an_adapter(name, file) from None
        self._entries[name] = base_weights(self._graph) + tensors

    def remove(self, name: str) -> None:
        """Close its models."""
        del self._entries[name]
        for captured in (True, False):
            self._models.pop((name, captured), None)

    def model(self, name: str | None, captured: bool) -> og.Model:
        """Return the adapter's model."""
        if (name, captured) not in self._models:
            graph = GRAPH if name is None else LORA_GRAPH
            opened = open_model(self._folder, graph, self._entries[name], captured)
            self._models[name, captured] = opened
        return self._models[name, captured]

    def activate(self, generator: og.Generator, name: str | None) -> None:
        """Do nothing: it is in the model."""


def shared_weights(folder: Path, graph: str) -> list[Entry]:
    """Describe the weights of a folder's graph, for a GPU to hold once."""
    from stages.answers.gpu_weights import base_weights, read_graph

    return base_weights(read_graph(folder, graph))


def refuse_no_file(name: str, file: Path) -> None:
    """Raise `UserError` where an adapter's path names no file."""
    if not file.is_file():
        wrong = "is a folder: name the file in it" if file.is_dir() else "does not exist"
        raise UserError(f"adapter {name}: {file} {wrong}")


def not_an_adapter(name: str, file: Path) -> UserError:
    """Return the error for a file that the runtime does not read."""
    return UserError(
        f"adapter {name}: {file} is not an ONNX Runtime adapter, or is damaged: "
        "`lab adapt PEFT_DIR` makes one, `dvc checkout --force` brings ours back"
    )


def misfit(name: str, file: Path, why: str) -> UserError:
    """Return the error for an adapter of another model."""
    return UserError(
        f"adapter {name}: {file} is not made for this model ({why}): "
        "convert it for this one with `lab adapt PEFT_DIR --model FOLDER`"
    )
