"""Is everything that dvc.lock names in the remote, whole? What is not can be sent again from here.

lab fsck               # every object exists and has the right size
lab fsck --deep        # ... and the right hash: reads every byte
lab fsck --repair      # sends again what is wrong, where this machine has it

DVC itself believes what it once pushed: after a blob was lost, `dvc push` says "everything is up to date".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.remote import config
from lab.remote.blob import Remote, translate_errors
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.storage.blob import ContainerClient

THREADS = 8
PATIENT = {"connection_timeout": 5, "read_timeout": 30, "retry_total": 1, "initial_backoff": 1}


@dataclass(frozen=True)
class Blob:
    """An object that the remote must hold: its hash, its size if known, and the output it is part of."""

    md5: str
    size: int | None
    owner: str

    @property
    def path(self) -> str:
        """Where DVC keeps it, in the remote and in the cache alike."""
        return f"files/md5/{self.md5[:2]}/{self.md5[2:]}"


@dataclass
class Store:
    """The remote and this machine's cache."""

    client: ContainerClient
    remote: Remote
    cache: Path

    def local(self, blob: Blob) -> Path | None:
        """Return the cached copy if it is whole, None otherwise."""
        file = self.cache / blob.path
        return (
            file if file.is_file() and md5_of_file(file) == blob.md5.removesuffix(".dir") else None
        )

    def download(self, blob: Blob) -> Iterable[bytes]:
        """Yield a blob's bytes."""
        return self.client.download_blob(self.remote.path(blob.path), max_concurrency=1).chunks()

    def upload(self, blob: Blob, file: Path) -> None:
        """Write a blob over what is there."""
        with file.open("rb") as stream:
            self.client.upload_blob(self.remote.path(blob.path), stream, overwrite=True)


def fsck(
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare hashes too: reads every byte.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Send again what is wrong.")] = False,
) -> None:
    """Check that the remote holds all that dvc.lock names. Exit code 1 when it does not."""
    found = config.load()
    found.check()
    with found.client(**PATIENT) as client, translate_errors(found):
        store = Store(client, found, cache_folder())
        blobs, broken = look(store, deep)
        print(f"{found}: {len(blobs)} objects, {len(broken)} of them missing or damaged")
        left = [blob for blob, why in broken.items() if not settle(store, blob, why, repair)]
    if broken and not repair and not left:
        print("lab fsck --repair sends them again from this machine")
    if left or (broken and not repair):
        raise typer.Exit(1)


def look(store: Store, deep: bool) -> tuple[list[Blob], dict[Blob, str]]:
    """Return the objects that dvc.lock names, and what is wrong with which of them."""
    outputs = named_by_lock()
    broken = examine(store, outputs, deep)
    members: list[Blob] = []
    for folder in (blob for blob in outputs if is_list(blob)):
        files = contents(store, folder, broken)
        broken |= examine(store, files, deep)
        if not deep:
            broken |= suspects(store, folder, [file for file in files if file not in broken])
        members += files
    return [*outputs, *members], broken


def named_by_lock() -> list[Blob]:
    """Return the cached outputs of dvc.lock: files and the lists of directories."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            outs = [out for out in repo.index.outs if out.use_cache and out.hash_info.value]
            return [Blob(out.hash_info.value, out.meta.size, str(out)) for out in outs]
    except DvcException as error:
        raise UserError(f"DVC cannot read the pipeline: {error}") from None


def examine(store: Store, blobs: list[Blob], deep: bool) -> dict[Blob, str]:
    """Return what is wrong with which blob: absent, of another size, or with `deep` of another hash."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(blobs, pool.map(lambda blob: fault(store, blob, deep), blobs), strict=True)
        return {blob: why for blob, why in found if why}


def fault(store: Store, blob: Blob, deep: bool) -> str | None:
    """Say what is wrong with one blob, None when it is whole."""
    from azure.core.exceptions import ResourceNotFoundError

    try:
        size = store.client.get_blob_client(store.remote.path(blob.path)).get_blob_properties().size
        expected = None if is_list(blob) else blob.size
        read = deep or is_list(blob) or expected not in (size, None)
        right = not read or md5_of(store.download(blob)) == blob.md5.removesuffix(".dir")
    except ResourceNotFoundError:
        return "is missing"
    if right:
        return None
    return "is damaged" if expected in (size, None) else f"has {size} bytes instead of {expected}"


def is_list(blob: Blob) -> bool:
    """Say whether a blob lists a directory: small, and dvc.lock's size is that of the whole directory."""
    return blob.md5.endswith(".dir")


def contents(store: Store, folder: Blob, broken: dict[Blob, str]) -> list[Blob]:
    """Return the files of a directory; none when its list is nowhere to be had."""
    if file := store.local(folder):
        listed = file.read_bytes()
    elif folder not in broken:
        listed = b"".join(store.download(folder))
    else:
        return []
    return [
        Blob(entry["md5"], size_here(store, entry["md5"]), f"{folder.owner}/{entry['relpath']}")
        for entry in json.loads(listed)
    ]


def size_here(store: Store, md5: str) -> int | None:
    """Return a file's size as the cache has it: a directory's list names hashes only."""
    file = store.cache / Blob(md5, None, "").path
    return file.stat().st_size if file.is_file() else None


def suspects(store: Store, folder: Blob, files: list[Blob]) -> dict[Blob, str]:
    """Read the files of unknown size when the sizes do not add up to what dvc.lock says."""
    unknown = [blob for blob in files if blob.size is None]
    if not unknown or folder.size is None:
        return {}
    clients = (store.client.get_blob_client(store.remote.path(blob.path)) for blob in files)
    total = sum(client.get_blob_properties().size for client in clients)
    return {} if total == folder.size else examine(store, unknown, deep=True)


def settle(store: Store, blob: Blob, why: str, repair: bool) -> bool:
    """Say what is wrong with a blob, and send it again when asked; return whether this machine can."""
    file = store.local(blob)
    if file is None:
        print(
            f"  {blob.owner} ({blob.md5}) {why}, and this machine has no copy: lab fsck --repair where it has"
        )
    elif repair:
        store.upload(blob, file)
        print(f"  {blob.owner} ({blob.md5}) {why}: sent again")
    else:
        print(f"  {blob.owner} ({blob.md5}) {why}")
    return file is not None


def cache_folder() -> Path:
    """Return the folder of this machine's DVC cache."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return Path(repo.cache.legacy.path)
    except DvcException as error:
        raise UserError(config.complaint(error)) from None


def md5_of_file(file: Path) -> str:
    """Return a file's MD5."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def md5_of(chunks: Iterable[bytes]) -> str:
    """Return the MD5 of bytes that come in pieces."""
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
