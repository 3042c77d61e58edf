"""A base model from the Hugging Face hub, pinned to a commit: weights as safetensors only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.settings import (
    HubSource,
)
from stages.sources import headers
from stages.sources.folder import TEXT_FILES


def from_hub(source: HubSource, folder: Path) -> None:
    """Download the pinned commit of a hub repository: weights as safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError

    where: dict[str, Any] = {
        "revision": source.revision,
        "local_dir": folder,
        "ignore_patterns": ["*/*"],
    }
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
