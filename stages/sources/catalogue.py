"""Base models from an Azure ML registry, such as Microsoft's own catalogue (registry `azureml`).

    dvc exp run -S model=phi35_mini_azureml          # signed in: az login

A version of a registry never changes, so the URI is the pin. The catalogue stores models in folders of
its own making (MLflow); weights, config and tokenizer are found in there, and no code is taken along.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

from stages.core import azure
from stages.core.errors import UserError
from stages.core.settings import CatalogueSource


def from_catalogue(source: CatalogueSource, folder: Path, patterns: list[str]) -> None:
    """Download a registered model; move the files that match `patterns` to `folder`."""
    # inside the folder, which the next fetch clears should this one be killed
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        download(source, Path(downloads))
        weights = folder_with("*.safetensors", Path(downloads), source)
        tokenizer = folder_with("tokenizer.json", Path(downloads), source)
        for origin in (
            tokenizer,
            weights,
        ):  # where both have a file, the one beside the weights stays
            for file in (file for pattern in patterns for file in origin.glob(pattern)):
                shutil.move(file, folder / file.name)


def download(source: CatalogueSource, downloads: Path) -> None:
    """Download all files of a version of a registry."""
    azure.need_azure()
    from azure.ai.ml import MLClient
    from azure.core.exceptions import ResourceNotFoundError

    _, registry, _, model, _, version = source.uri.removeprefix("azureml://").split("/")
    with azure.translate_errors(), contextlib.redirect_stderr(io.StringIO()):
        client = MLClient(azure.credential(), registry_name=registry, **azure.OPTIONS)
        try:
            client.models.download(model, version, download_path=downloads)
        except ResourceNotFoundError:
            raise UserError(
                f"no {source.uri}: ml.azure.com/models shows what registry {registry} has"
            ) from None


def folder_with(pattern: str, downloads: Path, source: CatalogueSource) -> Path:
    """Return the folder that holds the files; the topmost where several do."""
    folders = sorted({file.parent for file in downloads.rglob(pattern)}, key=lambda f: len(f.parts))
    if not folders:
        raise UserError(f"{source.uri} holds no {pattern}: choose a model in Hugging Face format")
    return folders[0]
