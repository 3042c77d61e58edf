"""Which Azure ML workspace, and the client of it.

    workspace = find()          # None if none is named
    client = workspace.connect()

In this order: AZUREML_ARM_SUBSCRIPTION, AZUREML_ARM_RESOURCEGROUP and AZUREML_ARM_WORKSPACE_NAME, as Azure
ML's own nodes set them; DVC's settings, `dvc config --local db.azureml.url azureml://subscriptions/…`;
the config.json that the portal offers, here, in .azureml/ or in a folder above.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

VARIABLES = (
    "AZUREML_ARM_SUBSCRIPTION",
    "AZUREML_ARM_RESOURCEGROUP",
    "AZUREML_ARM_WORKSPACE_NAME",
)
URL = re.compile(
    r"azureml://subscriptions/([^/]+)/resourcegroups/([^/]+)/workspaces/([^/]+)/?", re.IGNORECASE
)
HOW = (
    "set AZUREML_ARM_SUBSCRIPTION, AZUREML_ARM_RESOURCEGROUP and AZUREML_ARM_WORKSPACE_NAME, or put "
    "the workspace's config.json (Download config file, in the portal) here"
)


@dataclass(frozen=True)
class Workspace:
    """A workspace by its three names."""

    subscription: str
    group: str
    name: str

    def connect(self) -> MLClient:
        """Return a client of a workspace that is there. Raises `UserError` within seconds if not."""
        azure.need_azure()
        from azure.ai.ml import MLClient
        from azure.core.exceptions import ResourceNotFoundError

        with azure.translate_errors():
            names = (self.subscription, self.group, self.name)
            client = MLClient(azure.credential(), *names, **azure.OPTIONS)
            try:
                client.workspaces.get(self.name)
            except ResourceNotFoundError:
                raise UserError(
                    f"no workspace {self.name} in resource group {self.group} of subscription "
                    f"{self.subscription}: az ml workspace list shows yours; {HOW}"
                ) from None
        return client


def find() -> Workspace | None:
    """Return the workspace that environment, DVC's settings or config.json name, if any does."""
    return from_environment() or from_dvc() or from_file()


def need() -> Workspace:
    """Return the workspace; raises `UserError` when none is named."""
    if found := find():
        return found
    raise UserError(f"no Azure ML workspace is named: {HOW}")


def from_environment() -> Workspace | None:
    """Return the workspace that the environment names; half a name is an error."""
    values = [os.environ.get(name) for name in VARIABLES]
    if any(values) and not all(values):
        missing = [name for name, value in zip(VARIABLES, values, strict=True) if not value]
        raise UserError(f"{' and '.join(missing)} must be set too, to name an Azure ML workspace")
    subscription, group, name = (value or "" for value in values)
    return Workspace(subscription, group, name) if name else None


def from_dvc() -> Workspace | None:
    """Return the workspace of DVC's setting db.azureml.url."""
    from dvc.config import Config, ConfigError

    try:
        url = Config.from_cwd(validate=True).get("db", {}).get("azureml", {}).get("url")
    except ConfigError as error:
        raise UserError(f"DVC's settings: {' '.join(str(error).split())}") from None
    if url is None:
        return None
    if not (match := URL.fullmatch(url)):
        raise UserError(
            f"db.azureml.url is {url!r}: must be "
            "azureml://subscriptions/ID/resourcegroups/GROUP/workspaces/NAME"
        )
    return Workspace(*match.groups())


def from_file() -> Workspace | None:
    """Return the workspace of the nearest config.json that is Azure ML's."""
    here = Path.cwd()
    for folder in [here, *here.parents]:
        for file in (folder / "config.json", folder / ".azureml/config.json"):
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
                return Workspace(
                    *(config[k] for k in ("subscription_id", "resource_group", "workspace_name"))
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # absent, or another program's config.json
    return None
