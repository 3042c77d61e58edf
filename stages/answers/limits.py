"""What an exported graph needs to be told beyond genai_config.json: where its rotations change.

    limits = Limits.read(Path("models/onnx"))
    for length in limits.stretches(prompt=60, new_tokens=10): ...

A longrope model (Phi-3) turns keys and queries by its short factors up to `rope_switch` tokens. As soon as a
text is longer, all of it is turned by the long factors, also what came before. Keys in a cache have the old
ones, so a text that crosses the switch is read again from its start, as PyTorch does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stages.core.files import read_json, write_json

FILE = "limits.json"


@dataclass(frozen=True)
class Limits:
    """The limits of one exported folder."""

    rope_switch: int | None = None  # tokens; None: one rotation for texts of any length

    @classmethod
    def read(cls, folder: Path) -> Limits:
        """Read a folder's limits; other exporters' folders have none."""
        file = folder / FILE
        return cls(**read_json(file)) if file.is_file() else cls()

    def write(self, folder: Path) -> None:
        """Write them beside the graphs."""
        write_json(folder / FILE, asdict(self))

    def stretches(self, prompt: int, new_tokens: int) -> list[int]:
        """Return up to which lengths, in tokens, to generate with one cache of keys and values.

        The last token of a stretch is made from the text before it, and not read itself.
        """
        end = prompt + new_tokens
        if new_tokens == 0:
            return []
        if self.rope_switch is None or not prompt <= self.rope_switch < end - 1:
            return [end]
        return [self.rope_switch + 1, end]

    def divide(self, lengths: list[int]) -> bool:
        """Say whether texts lie on both sides of the switch: a batch is turned as its longest text is."""
        if self.rope_switch is None or len(lengths) < 2:
            return False
        return min(lengths) <= self.rope_switch <= max(lengths)

    def reach(self, length: int) -> bool:
        """Say whether one rotation serves a text of this length."""
        return self.rope_switch is None or length <= self.rope_switch
