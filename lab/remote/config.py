"""DVC's settings of the Azure Blob remote: read as DVC resolves them, written for all or for this clone.

remote = load()                # url and account of .dvc/config, sign-in of --local or the environment
configure({"account_name": "mylab"}, local=False)
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.remote import sas
from lab.remote.blob import Remote
from stages.core.errors import UserError

if TYPE_CHECKING:
    from configobj import ConfigObj


NAME = "azure"  # of the remote in .dvc/config
SECTION = f'remote "{NAME}"'
NOT_SET_UP = (
    "the remote is not set up: `lab remote setup` for an Azure account, "
    "`make azurite` for an emulator on this machine"
)
SECRETS = ("connection_string", "account_key", "sas_token", "client_secret")


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
        file.chmod(0o600)  # readable for its owner only, also where it existed with other rights
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
    """Read DVC's settings: those in git, or this clone's own."""
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
