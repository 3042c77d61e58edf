"""The base and its adapters, of which some may come and go while others answer.

models = Models(Path("models/onnx"), {"travel": Path("travel.onnx_adapter")})
models.generator(models.adapters["travel"], 512)

The base has a graph without LoRA inputs, which is faster; all adapters share the other one. With `one_graph`
the base answers by that one too: its weights are then there once, not twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.answers.generation import OnnxModel
from stages.core.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter. `key` is never used again, so that a new file under an old name is another one."""

    name: str
    file: Path
    key: str


class Models:
    """One folder's models. Only one thread at a time may call its methods."""

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[str, Path],
        one_graph: bool = False,
        device: str | None = None,
    ):
        self.folder, self.device = folder, device
        self.adapters: dict[str, Adapter] = {}
        self._tuned: OnnxModel | None = None  # opened for the first adapter
        self._numbers = itertools.count(1)
        if not one_graph:
            self.base = OnnxModel(folder, device=device)
        for name, file in adapters.items():
            self.load(name, file)
        if one_graph:
            self.base = self._tuned or OnnxModel(folder, device=device)

    def load(self, name: str, file: Path) -> None:
        """Load an adapter under a name that is free. Raises `UserError` for a file that does not fit."""
        if name in self.adapters:
            raise UserError(f"adapter {name} is loaded already: unload it first")
        adapter = Adapter(name, file, f"{name}#{next(self._numbers)}")
        try:
            if self._tuned is None:
                self._tuned = OnnxModel(self.folder, {adapter.key: file}, self.device)
            else:
                self._tuned.load(adapter.key, file)
        except UserError as error:  # name it as the user does
            raise UserError(str(error).replace(adapter.key, name)) from None
        # another mapping, not a change of this one: other threads may be reading it
        self.adapters = self.adapters | {name: adapter}

    def retire(self, name: str) -> Adapter:
        """Take an adapter out of the list; `unload` frees it when its last answer is done."""
        if name not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise UserError(f"adapter {name} is not loaded; loaded: {there}")
        adapter = self.adapters[name]
        self.adapters = {other: each for other, each in self.adapters.items() if other != name}
        return adapter

    def unload(self, adapter: Adapter) -> None:
        """Free an adapter of which no generator is left."""
        if self._tuned is not None:
            self._tuned.unload(adapter.key)

    def generator(
        self, adapter: Adapter | None, length: int, search: Mapping[str, Any] | None = None
    ) -> Any:
        """Return a generator for up to `length` tokens."""
        if adapter is None or self._tuned is None:
            return self.base.generator(length, search=search)
        return self._tuned.generator(length, adapter.key, search=search)
