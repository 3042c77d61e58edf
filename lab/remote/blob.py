"""The Azure Blob remote that DVC's settings name: how to reach it, and what is wrong with it in one line.

remote = load()                # url and account of .dvc/config, sign-in of --local or the environment
remote.check()                 # raises UserError unless it answers, lets us in and has the container
remote.client()                # azure-storage-blob's own client, for what DVC has no command for
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.remote import sas
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.storage.blob import ContainerClient
    from configobj import ConfigObj

NAME = "azure"  # of the remote in .dvc/config
PROBE = "probe"  # the blob that `check_writing` writes
SECTION = f'remote "{NAME}"'
NOT_SET_UP = (
    "the remote is not set up: `lab remote setup` for an Azure account, "
    "`make azurite` for an emulator on this machine"
)
TIMEOUT = 3  # seconds that a healthy remote may take to answer
SIGN_IN_TIMEOUT = 10  # `az` is a slow program
CHECK_NETWORK = "check the network, or start the emulator (make azurite)"
SECRETS = ("connection_string", "account_key", "sas_token", "client_secret")
SIGN_IN = {  # in the order in which DVC takes them
    "connection_string": "connection string",
    "client_secret": "service principal",
    "account_key": "account key",
    "sas_token": "SAS token",
    "credential": "keyless (DefaultAzureCredential)",
}
Answer = TypeVar("Answer")


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
        with in_words(self):
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
        with client, in_words(self):
            next(client.list_blob_names(name_starts_with=self.path(""), results_per_page=1), None)

    def check_writing(self) -> str:
        """Write a blob, read it, delete it; return in words what was done.

        Raises `UserError` when writing or reading is refused. A sign-in that may not delete is good enough
        to push and pull: then the blob stays, always the same one.
        """
        from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

        if self.sas_token:
            sas.check(self.sas_token, sas.PUSHING)
        with self.client() as client, in_words(self):
            probe = client.get_blob_client(self.path(PROBE))
            probe.upload_blob(b"olive-lab", overwrite=True)
            # another machine's probe may have deleted it meanwhile
            with contextlib.suppress(ResourceNotFoundError):
                if probe.download_blob().readall() != b"olive-lab":
                    raise UserError(f"{self} does not give back what was written")
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

        with self.client() as client, in_words(self), contextlib.suppress(ResourceExistsError):
            client.create_container()
            return True
        return False

    def path(self, name: str) -> str:
        """Return a blob's name in the container, from its name in the remote."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def __str__(self) -> str:
        return f"the remote azure://{'/'.join(filter(None, (self.container, self.prefix)))}"


def load() -> Remote:
    """Read DVC's default remote, or the one named azure where there is no default.

    Raises `UserError` when it is not set up, or not on Azure.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_objects.fs.errors import AuthError

    try:
        with Repo() as repo:
            found = repo.cloud.get_remote(repo.config["core"].get("remote") or NAME)
        if found.fs.protocol != "azure":
            raise UserError(
                f"the default remote is {found.fs.protocol}://, this command is for azure://"
            )
        refuse_versions(repo.config["remote"][found.name])
        container, _, prefix = found.path.strip("/").partition("/")
        check_names(found.fs.fs_args["account_name"], container)
        remote = Remote(container, prefix, found.fs.fs_args)
        if remote.sas_token:
            sas.check(remote.sas_token)
        return remote
    except AuthError:  # neither an account nor a connection string
        raise UserError(NOT_SET_UP) from None
    except (DvcException, ValueError) as error:
        raise UserError(complaint(error)) from None


def has_default() -> bool:
    """Say whether plain dvc has a remote. Raises `UserError` for settings that DVC cannot read."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return bool(repo.config["core"].get("remote"))
    except DvcException as error:
        raise UserError(complaint(error)) from None


def make_default() -> None:
    """Make a remote that is set up this clone's default, where DVC knows none, and say so.

    A clone from the time when .dvc/config named the default has account and sign-in, but no default.
    """
    try:
        if has_default():
            return
        load()
    except UserError:  # nothing to make the default; a command that needs a remote says why
        return
    configure({"remote": NAME}, local=True, section="core")
    print(
        f"lab: the remote {NAME!r} is now this clone's default, for plain dvc too: "
        f"`dvc remote default --local {NAME}`",
        file=sys.stderr,
    )


def complaint(error: Exception) -> str:
    """Return in one line what DVC says of its settings, or what is wrong with the remote's url.

    Of a url that it does not know, DVC would name the keys beside it, which are right.
    """
    from dvc.config import ConfigError

    url = typed_url() if isinstance(error, ConfigError) else ""
    if url and not re.match("azure://[^/]", url):
        shown = re.sub(r"\?.+", "?...", url)  # there may be a SAS token
        return (
            f"the remote's url is {shown!r}: must be azure://CONTAINER or azure://CONTAINER/FOLDER"
        )
    return f"DVC's settings: {' '.join(str(error).split())}"


def typed_url() -> str:
    """Return the remote's url as it was typed, nothing where DVC's settings cannot be parsed."""
    from configobj import ConfigObjError

    with contextlib.suppress(ConfigObjError):
        return configured("url", local=True) or configured("url", local=False) or ""
    return ""


def refuse_versions(settings: Mapping[str, Any]) -> None:
    """Raise for a remote that keeps files by their paths, in versions, not by their hashes."""
    for option in ("version_aware", "worktree"):
        if settings.get(option):
            raise UserError(
                f"the remote has {option} = true, with which no run cache is shared and no blob can be "
                f"checked: `dvc remote modify --unset {NAME} {option}`"
            )


def check_names(account: str | None, container: str) -> None:
    """Raise `UserError` for a name that no account or container can have."""
    if account is not None and not re.fullmatch("[a-z0-9]{3,24}", account):
        raise UserError(f"account {account!r}: must be 3 to 24 lower-case letters and digits")
    if not re.fullmatch("[a-z0-9](-?[a-z0-9]){2,62}", container):
        raise UserError(
            f"container {container!r}: must be 3 to 63 lower-case letters, digits, single hyphens"
        )


def configure(values: dict[str, str | None], *, local: bool, section: str = SECTION) -> None:
    """Set, or unset where None, options of the remote: `local` for what git must not see."""
    config = open_settings(local)
    file = Path(config.filename)
    file.touch(mode=0o644)
    if local:
        file.chmod(0o600)  # for nobody else's eyes, however it came to be
    options = config.setdefault(section, {})
    for key, value in values.items():
        if value is None:
            options.pop(key, None)
        else:
            options[key] = value
    if not options:
        del config[section]
    config.write()


def configured(key: str, *, local: bool, section: str = SECTION) -> str | None:
    """Return an option of the remote as it was typed; `local`: what this machine alone has."""
    return open_settings(local).get(section, {}).get(key)


def open_settings(local: bool) -> ConfigObj:
    """Read DVC's settings: everybody's, or this machine's own."""
    from configobj import ConfigObj

    file = Path(".dvc/config.local" if local else ".dvc/config")
    if not file.parent.is_dir():
        raise UserError("no .dvc here: run it in the repository's root")
    return ConfigObj(str(file), encoding="utf-8")


@contextlib.contextmanager
def undone_on_error() -> Iterator[None]:
    """Put DVC's settings back as they were when something goes wrong."""
    files = [Path(".dvc/config"), Path(".dvc/config.local")]
    before = {file: file.read_bytes() for file in files if file.exists()}
    try:
        yield
    except BaseException:
        for file in files:
            file.write_bytes(before[file]) if file in before else file.unlink(missing_ok=True)
        raise


def need_answer(url: str, remote: Remote) -> None:
    """Raise within seconds when nobody listens; the Azure SDK, and DNS, would try for a minute."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    target, proxies, way = urlsplit(url), getproxies(), ""
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.netloc):
        way = f" (the proxy of {target.scheme.upper()}_PROXY; NO_PROXY={target.hostname} goes round it)"
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or {"https": 443}.get(target.scheme, 80)
    why = within(TIMEOUT, lambda: knock(target.hostname, port))
    if why != "":
        raise UserError((why or f"{remote} does not answer: {CHECK_NETWORK}") + way)


def knock(host: str, port: int) -> str:
    """Return why nobody can be spoken to at an address, nothing when somebody can."""
    import socket

    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except socket.gaierror:
        return (
            f"{host} cannot be found: check the network, and the account's name (lab remote setup)"
        )
    except OSError:
        return f"{host}:{port} does not answer: {CHECK_NETWORK}"
    return ""


def within(seconds: float, question: Callable[[], Answer]) -> Answer | None:
    """Return a question's answer, None when it takes longer: DNS knows no limit, so a thread asks."""
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


@contextlib.contextmanager
def in_words(remote: Remote) -> Iterator[None]:
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
