"""Files in a datastore, by default the workspace's default one: sent once, resumed, checked by MD5."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.storage.blob import BlobProperties, ContainerClient


class Datastore:
    """A datastore of Blob Storage, reached with the person's own sign-in."""

    def __init__(self, client: MLClient, name: str | None = None) -> None:
        """Look up a datastore, the default one without a name. Raises `UserError` for another kind."""
        from azure.core.exceptions import ResourceNotFoundError
        from azure.storage.blob import ContainerClient

        with azure.translate_errors():
            try:
                stores = client.datastores
                store = stores.get_default() if name is None else stores.get(name)
            except ResourceNotFoundError:
                raise UserError(f"the workspace has no datastore {name}") from None
        if not hasattr(store, "container_name"):
            raise UserError(f"datastore {store.name} is a {store.type}, not Blob Storage")
        self.name = store.name
        self.container: ContainerClient = ContainerClient(
            f"https://{store.account_name}.blob.core.windows.net",
            store.container_name,
            azure.credential(),
            connection_timeout=azure.PATIENCE,
            # the library's own waits add up to more than a minute of silence
            retry_total=2,
            initial_backoff=1,
            increment_base=2,
            random_jitter_range=1,
        )

    def uri(self, prefix: str) -> str:
        """Return a folder's address as Azure ML writes it."""
        return f"azureml://datastores/{self.name}/paths/{prefix}"

    def upload(self, files: dict[str, Path], prefix: str) -> None:
        """Send files under their names below `prefix`, but for those that are there already."""
        with azure.translate_errors():
            there = {blob.name: blob for blob in self.container.list_blobs(f"{prefix}/")}
            missing = {
                f"{prefix}/{name}": file
                for name, file in files.items()
                if not is_same(file, there.get(f"{prefix}/{name}"))
            }
            total = sum(file.stat().st_size for file in missing.values())
            with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
                for name, file in missing.items():
                    self.send(name, file)
                    bar.update(file.stat().st_size)

    def send(self, name: str, file: Path) -> None:
        """Send one file; the blob appears when its last block has arrived, never in part."""
        from azure.storage.blob import ContentSettings

        with file.open("rb") as stream:
            self.container.upload_blob(
                name,
                stream,
                overwrite=True,
                max_concurrency=8,
                content_settings=ContentSettings(content_md5=bytearray(md5(file))),
            )

    def download(self, path: str, folder: Path) -> list[str]:
        """Stream the files below `path`, or the one file that it is, to `folder`; return their names."""
        with azure.translate_errors():
            found = list(self.container.list_blobs(path))
            # what only begins with the same letters is something else
            blobs = {b.name[len(path) + 1 :]: b for b in found if b.name.startswith(f"{path}/")}
            blobs = blobs or {Path(path).name: b for b in found if b.name == path}
            total = sum(blob.size for blob in blobs.values())
            with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
                for name, blob in blobs.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with (folder / name).open("wb") as stream:
                        self.container.download_blob(blob.name).readinto(stream)
                    bar.update(blob.size)
        return list(blobs)

    def read(self, prefix: str) -> dict[str, bytes]:
        """Return the (small) files below `prefix` by their names."""
        with azure.translate_errors():
            names = list(self.container.list_blob_names(name_starts_with=f"{prefix}/"))
            return {
                name.removeprefix(f"{prefix}/"): self.container.download_blob(name).readall()
                for name in names
            }

    def read_one(self, name: str) -> bytes | None:
        """Return a (small) file, None where there is none."""
        from azure.core.exceptions import ResourceNotFoundError

        with azure.translate_errors():
            try:
                return self.container.download_blob(name).readall()
            except ResourceNotFoundError:
                return None


def is_same(file: Path, blob: BlobProperties | None) -> bool:
    """Say whether a blob holds a file's bytes."""
    if blob is None or blob.size != file.stat().st_size:
        return False
    return bytes(blob.content_settings.content_md5 or b"") == md5(file)


def md5(file: Path) -> bytes:
    """Return the hash that Blob Storage keeps with a blob."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").digest()


def sha256(files: dict[str, Path]) -> str:
    """Return one hash of many files: of their names and contents."""
    whole = hashlib.sha256()
    for name in sorted(files):
        with files[name].open("rb") as stream:
            whole.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
