"""What benchmarks/remote.py measures DVC against: azure-storage-blob alone, as its manual shows it.

python benchmarks/peer_blobs.py upload|download|list CONTAINER FOLDER CONNECTIONS
"""

import os
import sys
from pathlib import Path

from azure.storage.blob import ContainerClient


def upload(client: ContainerClient, folder: Path, connections: int) -> None:
    """Send every file of a folder."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            name = str(file.relative_to(folder))
            client.upload_blob(name, stream, max_concurrency=connections)


def download(client: ContainerClient, folder: Path, connections: int) -> None:
    """Fetch every blob of a container."""
    for blob in client.list_blobs():
        file = folder / blob.name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            client.download_blob(blob.name, max_concurrency=connections).readinto(stream)


def look(client: ContainerClient, folder: Path, connections: int) -> None:
    """List every blob of a container."""
    list(client.list_blobs())


if __name__ == "__main__":
    part, container, folder, connections = sys.argv[1:]
    work = {"upload": upload, "download": download, "list": look}[part]
    words = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    with ContainerClient.from_connection_string(words, container) as client:
        work(client, Path(folder), int(connections))
