"""The Azure Blob remote: how to reach it, and what is wrong with it in one line.

remote = config.load()         # as DVC's settings name it
remote.check()                 # raises UserError unless it answers, lets us in and has the container
remote.client()                # azure-storage-blob's own client, for what DVC has no command for
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.remote import sas
from lab.remote.reach import CHECK_NETWORK, TIMEOUT, need_answer
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.storage.blob import ContainerClient

PROBE = "probe"  # the blob that `check_writing` writes
SIGN_IN_TIMEOUT = 10  # `az` is a slow program
SIGN_IN = {  # in the order in which DVC takes them
    "connection_string": "connection string",
    "client_secret": "service principal",
    "account_key": "account key",
    "sas_token": "SAS token",
    "credential": "keyless (DefaultAzureCredential)",
}


class NoContainer(UserError):
    """The account answers, but has no such container."""


@dataclass(frozen=True)
class Remote:
    """A container, the folder in it, and the sign-in as DVC resolved it."""

    container: str
    prefix: str
    login: dict[str, Any]

    @property
    def sign_in(self) -> str:
        """Name the kind of sign-in in use."""
        return next((words for key, words in SIGN_IN.items() if self.login.get(key)), "anonymous")

    @property
    def account(self) -> str:
        """Name the storage account."""
        words = self.connection
        endpoint = words.get("BlobEndpoint", "")
        return words.get("AccountName") or endpoint or self.login["account_name"]

    @property
    def connection(self) -> dict[str, str]:
        """Return the parts of the connection string; none where there is no string."""
        pairs = (self.login["connection_string"] or "").strip("'\"").split(";")
        return dict(pair.partition("=")[::2] for pair in pairs)

    @property
    def sas_token(self) -> str | None:
        """Return the SAS token in use, None with another sign-in."""
        if self.login["connection_string"]:
            return self.connection.get("SharedAccessSignature")
        return self.login["sas_token"] if self.sign_in == SIGN_IN["sas_token"] else None

    def client(self, **options: Any) -> ContainerClient:
        """Return a client of the container; by default one that fails in seconds instead of retrying."""
        from azure.storage.blob import ContainerClient

        quick = {"connection_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retry_total": 0}
        options = quick | options
        with translate_errors(self):
            if text := self.login["connection_string"]:
                return ContainerClient.from_connection_string(text, self.container, **options)
            url = f"https://{self.account}.blob.core.windows.net"
            return ContainerClient(url, self.container, self._credential(), **options)

    def _credential(self) -> Any:
        from azure.identity import ClientSecretCredential, DefaultAzureCredential

        quick = {"connection_timeout": TIMEOUT, "read_timeout": SIGN_IN_TIMEOUT, "retry_total": 0}
        principal = [self.login[key] for key in ("tenant_id", "client_id", "client_secret")]
        if all(principal):
            return ClientSecretCredential(*principal, **quick)
        if self.login.get("credential"):
            return DefaultAzureCredential(process_timeout=SIGN_IN_TIMEOUT, **quick)
        return self.login["account_key"] or self.login["sas_token"]

    def check(self, heard: dict[str, str] | None = None) -> None:
        """Raise `UserError` unless reachable, signed in and created; `heard` gets an answer's headers."""
        heard = {} if heard is None else heard
        client = self.client(raw_response_hook=lambda got: heard.update(got.http_response.headers))
        need_answer(client.url, self)
        with client, translate_errors(self):
            next(client.list_blob_names(name_starts_with=self.path(""), results_per_page=1), None)

    def check_writing(self) -> str:
        """Write a blob, read it, delete it; return in words what was done.

        Raises `UserError` when writing or reading is refused. A sign-in that may not delete is good enough
        to push and pull: then the blob stays, always the same one.
        """
        from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

        if self.sas_token:
            sas.check(self.sas_token, sas.PUSHING)
        with self.client() as client, translate_errors(self):
            probe = client.get_blob_client(self.path(PROBE))
            probe.upload_blob(b"olive-lab", overwrite=True)
            # another machine's probe may have deleted it meanwhile
            with contextlib.suppress(ResourceNotFoundError):
                if probe.download_blob().readall() != b"olive-lab":
                    raise UserError(
                        f"{self} does not return what was written: run lab doctor again, then lab fsck"
                    )
            try:
                with contextlib.suppress(ResourceNotFoundError):
                    probe.delete_blob()
            except HttpResponseError as error:
                if error.status_code != 403:
                    raise
                return (
                    f"wrote and read a blob; deleting is not allowed, so {self.path(PROBE)!r} stays "
                    "and `dvc gc --cloud` cannot free space"
                )
        return "wrote, read and deleted a blob"

    def create_container(self) -> bool:
        """Create the container; return whether it is new."""
        from azure.core.exceptions import ResourceExistsError

        with (
            self.client() as client,
            translate_errors(self),
            contextlib.suppress(ResourceExistsError),
        ):
            client.create_container()
            return True
        return False

    def path(self, name: str) -> str:
        """Return a blob's name in the container, from its name in the remote."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def __str__(self) -> str:
        return f"the remote azure://{'/'.join(filter(None, (self.container, self.prefix)))}"


@contextlib.contextmanager
def translate_errors(remote: Remote) -> Iterator[None]:
    """Turn the Azure SDK's errors into one line that says what to do."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except (AzureError, ValueError) as error:
        if getattr(error, "error_code", None) == "ContainerNotFound":
            raise NoContainer(
                f"{remote}: account {remote.account} has no container {remote.container!r}: "
                "lab remote setup creates it"
            ) from None
        raise UserError(explain(error, remote)) from None


def explain(error: Exception, remote: Remote) -> str:
    """Say what an error of the Azure SDK means for this remote."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ServiceRequestError,
        ServiceResponseError,
    )

    code = getattr(error, "error_code", None) or getattr(error, "reason", None) or ""
    code = str(getattr(code, "value", code))  # an enumeration, where the library knows the code
    status = getattr(error, "status_code", None)
    if isinstance(error.__cause__, ServiceRequestError | ServiceResponseError):
        return f"Azure's sign-in does not answer: {CHECK_NETWORK}"
    if isinstance(error, ClientAuthenticationError) and status is None:
        return "not signed in to Azure: run `az login`, or choose another sign-in with lab remote setup"
    if "ProtocolMismatch" in code:
        return f"the SAS token is for https only (spr=https), and {remote} is reached by http"
    knows_a_key = remote.sign_in in (SIGN_IN["connection_string"], SIGN_IN["account_key"])
    if "PermissionMismatch" in code or (code == "AuthorizationFailure" and not knows_a_key):
        return (
            f"{remote} refuses this {remote.sign_in} (account {remote.account}) to write or read: it needs "
            "the role Storage Blob Data Contributor, or a SAS with racwl"
        )
    if status in (401, 403):
        return (
            f"{remote} rejects the {remote.sign_in} (account {remote.account}): it is wrong or expired, "
            "or this machine's clock is (lab doctor); lab remote setup takes another"
        )
    if isinstance(error, ValueError):
        return f"the {remote.sign_in} of {remote} cannot be read: lab remote setup takes another"
    if code == "InvalidHeaderValue" and status == 400:
        return (
            f"{remote} does not know the protocol of this azure-storage-blob: an Azurite wants a newer "
            "release, or --skipApiVersionCheck (make azurite gives it)"
        )
    if isinstance(error, HttpResponseError) and status:
        return f"{remote} answers {status} {code}: {str(error).splitlines()[0]}"
    return f"{remote} does not answer: {CHECK_NETWORK}"
