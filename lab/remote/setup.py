"""Set up the Azure Blob remote: account, container, sign-in, and proof that it works.

lab remote setup                                              # asks
lab remote setup --account mylab --container olive-lab --sign-in keyless
lab remote setup --sign-in sas < token.txt                    # a secret comes by prompt or standard input

Url and account go to .dvc/config, which git tracks, with the line that makes this the default remote; a
secret goes to .dvc/config.local, which git ignores.
Keyless is the default: `az login`, a managed identity or any other way of DefaultAzureCredential, with
the role Storage Blob Data Contributor.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from lab.remote import config
from lab.remote.blob import NoContainer
from stages.core.errors import UserError


class SignIn(StrEnum):
    """How DVC signs in to the account."""

    KEYLESS = "keyless"
    KEY = "key"
    SAS = "sas"
    CONNECTION_STRING = "connection-string"


OPTION = {  # of DVC's remote; None: no secret
    SignIn.KEYLESS: None,
    SignIn.KEY: "account_key",
    SignIn.SAS: "sas_token",
    SignIn.CONNECTION_STRING: "connection_string",
}


group = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@group.callback()
def lab_remote() -> None:
    """Set up the Azure Blob remote."""


@group.command()
def setup(
    account: Annotated[str | None, typer.Option(help="Storage account [asked].")] = None,
    container: Annotated[str | None, typer.Option(help="Container [asked].")] = None,
    sign_in: Annotated[SignIn | None, typer.Option(help="Kind of sign-in [asked].")] = None,
) -> None:
    """Choose account, container and sign-in. Creates the container; proves write, read and delete."""
    account = account or ask("--account", "Storage account")
    container = container or ask("--container", "Container", default="olive-lab")
    sign_in = sign_in or ask_sign_in()
    config.check_names(account, container)
    secrets = dict.fromkeys(config.SECRETS)
    if option := OPTION[sign_in]:
        secret = read_secret(sign_in.value.replace("-", " "))
        secrets[option] = token_of(secret) if sign_in is SignIn.SAS else secret
    with config.undone_on_error():
        config.configure({"url": f"azure://{container}", "account_name": account}, local=False)
        config.configure(secrets, local=True)
        config.configure({"remote": config.NAME}, local=False, section="core")
        config.configure({"remote": None}, local=True, section="core")  # it would go before
        prove()


def ask(option: str, words: str, **options: Any) -> str:
    """Ask on the terminal. Raises `UserError` where there is none."""
    if not sys.stdin.isatty():
        raise UserError(f"{option} is missing, and there is no terminal to ask on")
    return typer.prompt(words, **options)


def ask_sign_in() -> SignIn:
    """Ask for one of the kinds of sign-in."""
    kinds = ", ".join(SignIn)
    answer = ask("--sign-in", f"Sign-in ({kinds})", default=SignIn.KEYLESS.value)
    try:
        return SignIn(answer)
    except ValueError:
        raise UserError(f"sign-in {answer!r}: must be one of {kinds}") from None


def read_secret(words: str) -> str:
    """Read a secret without showing it, from the terminal or from standard input."""
    on_terminal = sys.stdin.isatty()
    secret = typer.prompt(words, hide_input=True) if on_terminal else sys.stdin.readline()
    secret = secret.strip().strip("'\"")  # as people copy it
    if not secret:
        raise UserError(f"no {words} given: pipe it to standard input, or answer the prompt")
    return secret


def token_of(secret: str) -> str:
    """Return a SAS token, also of the whole URL that Azure's portal shows beside it."""
    return secret.partition("?")[2] if "://" in secret else secret


def prove() -> None:
    """Reach the remote, create its container if there is none, write, read and delete a blob."""
    found = config.load()
    try:
        found.check()
        created = False
    except NoContainer:
        created = found.create_container()
    proof = found.check_writing()
    print(f"{found}: container {'created' if created else 'found'} in account {found.account}")
    print(f"Signed in with {found.sign_in}; {proof}")
    print("Commit .dvc/config; .dvc/config.local stays here.")
