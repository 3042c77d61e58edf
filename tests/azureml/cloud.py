"""Azure as the tests see it: one subscription, one workspace, two storage accounts, a registry.

with started(folder) as cloud:
    cloud.laptop        # what a signed-in person's environment holds
    cloud.relay.refused # hosts that somebody asked for and should not have
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import (
    BlobClient,
    BlobServiceClient,
    ContainerClient,
    ContainerSasPermissions,
    generate_container_sas,
)

from lab.remote import azurite
from support.project import ROOT

from . import certificates, service
from .endpoints import Endpoints
from .machine import Machines
from .relay import Relay
from .service import Service

STORE = "labworkspacestore"  # the workspace's own storage account
REMOTE = "labremotestore"  # the DVC remote's
CONTAINER = "olive-lab"  # and the container in it
KEY = "c2VjcmV0IG9mIHRoZSB0ZXN0cywgb3BlbnMgbm90aGluZyBlbHNlIQ=="
SECRET = "the laptop's own"
CLUSTER = "gpu-cluster"
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
HOSTS = [
    "management.azure.com",
    "login.microsoftonline.com",
    "*.api.azureml.ms",
    f"*.{service.REGION}.inference.ml.azure.com",
    "*.blob.core.windows.net",
]


@dataclass
class Cloud:
    """Everything that a test may look at or break."""

    service: Service
    relay: Relay
    certificate: Path
    blob_port: int
    folder: Path
    machines: Machines = field(init=False)

    def __post_init__(self) -> None:
        self.machines = Machines(self, self.folder / "machines")
        self.service.new_container = self.new_container
        self.service.read_sas = self.with_sas
        self.service.endpoints = Endpoints()

    @property
    def network(self) -> dict[str, str]:
        """The environment of whoever goes out through the relay."""
        pem = str(self.certificate)
        return {
            **dict.fromkeys(PROXIES, self.relay.url),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
            "REQUESTS_CA_BUNDLE": pem,
            "SSL_CERT_FILE": pem,
        }

    @property
    def signed_in(self) -> dict[str, str]:
        """The environment of the laptop's service principal."""
        return {
            "AZURE_TENANT_ID": service.TENANT,
            "AZURE_CLIENT_ID": "laptop",
            "AZURE_CLIENT_SECRET": SECRET,
        }

    @property
    def workspace(self) -> dict[str, str]:
        """The environment that names the workspace."""
        return {
            "AZUREML_ARM_SUBSCRIPTION": service.SUBSCRIPTION,
            "AZUREML_ARM_RESOURCEGROUP": service.GROUP,
            "AZUREML_ARM_WORKSPACE_NAME": service.WORKSPACE,
        }

    @property
    def laptop(self) -> dict[str, str]:
        return {**self.network, **self.signed_in, **self.workspace}

    @property
    def denials(self) -> int:
        """How often Azure, or a cut network, said no to one and the same request."""
        return max([0, *self.relay.denied.values(), *self.service.denied.values()])

    def blobs(self, account: str) -> BlobServiceClient:
        """Return a client of a storage account, past relay and sign-in."""
        address = f"https://127.0.0.1:{self.blob_port}/{account}"
        transport = RequestsTransport(connection_verify=str(self.certificate))
        return BlobServiceClient(
            address, {"account_name": account, "account_key": KEY}, transport=transport
        )

    @property
    def datastore(self) -> ContainerClient:
        """The container of the workspace's default datastore."""
        return self.blobs(STORE).get_container_client("workspaceblobs")

    @property
    def remote(self) -> ContainerClient:
        """The container of the DVC remote."""
        return self.blobs(REMOTE).get_container_client(CONTAINER)

    def reset(self) -> None:
        """Forget what a test left behind."""
        self.service.forget()
        self.relay.reached.clear()
        self.relay.refused.clear()
        self.relay.denied.clear()
        self.relay.mend()
        for container in (self.datastore, self.remote):
            for name in list(container.list_blob_names()):
                container.delete_blob(name)
        furnish(self)

    def with_sas(self, uri: str) -> str:
        """Return the URI of the container that a URI is in, with a SAS to read and write."""
        uri = "/".join(uri.split("/")[:4])
        sas = generate_container_sas(
            STORE,
            uri.split("/")[3],
            account_key=KEY,
            permission=ContainerSasPermissions(read=True, write=True, list=True, create=True),
            expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
        )
        return f"{uri}?{sas}"

    def new_container(self) -> tuple[str, str]:
        """Make a container for a snapshot; return its URI, bare and with a SAS."""
        name = f"snapshot-{uuid.uuid4()}"
        self.blobs(STORE).create_container(name)
        uri = f"https://{STORE}.blob.core.windows.net/{name}"
        return uri, self.with_sas(uri)

    def readable(self, blob: BlobClient) -> str:
        """Return the URL, with a SAS, under which anybody may read a blob."""
        host = f"https://{STORE}.blob.core.windows.net"
        container = self.with_sas(f"{host}/{blob.container_name}")
        return container.replace("?", f"/{blob.blob_name}?", 1)

    def publish(self, registry: str, model: str, version: str, files: dict[str, bytes]) -> None:
        """Put a model into a registry, as its owner would."""
        uri, _ = self.new_container()
        container = self.blobs(STORE).get_container_client(uri.rpartition("/")[2])
        for name, data in files.items():
            container.upload_blob(f"{model}/{name}", data)
        path = f"/registries/{registry}/models/{model}/versions/{version}"
        properties = {"modelUri": f"{uri}/{model}", "modelType": "mlflow_model", "flavors": {}}
        self.service.put(path, properties, id=f"azureml:/{path}")

    def download(self, uri: str, folder: Path) -> None:
        """Write what a container holds, below a prefix if the URI has one, to a folder."""
        name, _, prefix = uri.split("/", 3)[3].partition("/")
        container = self.blobs(STORE).get_container_client(name)
        for blob in container.list_blob_names(name_starts_with=prefix):
            file = folder / blob.removeprefix(prefix).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(container.download_blob(blob).readall())


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cloud]:
    """Start everything; end it with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = certificates.make(folder, HOSTS)
    fake = Service(certificate, key, SECRET)
    with azurite_over_tls(folder / "blobs", certificate, key) as port:
        where = dict.fromkeys(HOSTS[:-1], fake.port) | {HOSTS[-1]: port}
        cloud = Cloud(fake, Relay(where), certificate, port, folder)
        cloud.datastore.create_container()
        cloud.remote.create_container()
        furnish(cloud)
        yield cloud
        cloud.machines.wait()


@contextlib.contextmanager
def azurite_over_tls(data: Path, certificate: Path, key: Path) -> Iterator[int]:
    """Run Azurite with the tests' accounts and certificate; it checks tokens as Azure does."""
    data.mkdir()
    program = azurite.install(ROOT / azurite.HOME)
    accounts = ";".join(f"{name}:{KEY}" for name in (STORE, REMOTE))
    with (data / "log.txt").open("w") as log:
        process = subprocess.Popen(
            ["node", str(program), "--blobHost", "127.0.0.1", "--blobPort", "0",
             "--location", str(data), "--cert", str(certificate), "--key", str(key),
             "--oauth", "basic", "--skipApiVersionCheck", "--disableTelemetry", "--silent"],
            env={**os.environ, "AZURITE_ACCOUNTS": accounts},
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield port_of(process, data / "log.txt")
    finally:
        process.terminate()
        process.wait()


def furnish(cloud: Cloud) -> None:
    """Make what an administrator would: workspace, datastore, cluster."""
    urls = {"discoveryUrl": f"{service.DATA_PLANE}/discovery", "workspaceId": str(uuid.uuid4())}
    urls["mlFlowTrackingUri"] = service.TRACKING
    cloud.service.put(service.HOME, urls, location=service.REGION)
    store = {
        "datastoreType": "AzureBlob",
        "accountName": STORE,
        "containerName": "workspaceblobs",
        "credentials": {"credentialsType": "None"},
        "isDefault": True,
    }
    cloud.service.put(f"{service.HOME}/datastores/workspaceblobstore", store)
    cluster = {
        "computeType": "AmlCompute",
        "provisioningState": "Succeeded",
        "properties": {"vmSize": "STANDARD_NC24ADS_A100_V4"},  # in capitals, as Azure says it
    }
    identity = {"type": "SystemAssigned", "principalId": "cluster", "tenantId": service.TENANT}
    cloud.service.put(
        f"{service.HOME}/computes/{CLUSTER}", cluster, location=service.REGION, identity=identity
    )


def port_of(process: subprocess.Popen, log: Path) -> int:
    """Return the port that Azurite chose and listens on, as its log says."""
    deadline = time.monotonic() + 120
    while not (said := re.search(r"listens on https://127\.0\.0\.1:(\d+)", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Azurite did not start:\n{log.read_text()}")
        time.sleep(0.05)
    return int(said[1])
