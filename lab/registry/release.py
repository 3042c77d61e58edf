"""What is registered, the same in Azure ML and in git."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.core.files import in_megabytes


@dataclass(frozen=True)
class Release:
    """What is registered: files by their names in the version, their hash, and what is said of them."""

    files: dict[str, Path]
    content: str
    tags: dict[str, str]

    @property
    def size(self) -> str:
        """Return the size of all files, as people read it."""
        return in_megabytes(sum(file.stat().st_size for file in self.files.values()))
