"""What a SAS token says of itself, before any network is asked: when and for what it holds.

check("sv=...&se=2031-01-01&sp=racwl&sig=...")     # raises UserError for one that cannot work
"""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import parse_qsl

from stages.core.errors import UserError

ANOTHER = "lab remote setup takes another"
RIGHTS = {"r": "read", "w": "write", "l": "list"}  # of sp=; d (delete) only `dvc gc --cloud` needs
PULLING, PUSHING = "rl", "rwl"


def check(token: str, rights: str = PULLING) -> None:
    """Raise `UserError` for a token that is none, is not valid now, or lacks one of the rights.

    What a token leaves to a stored access policy (si=), only Azure knows.
    """
    if "://" in token:
        raise UserError("sas_token is a whole URL: the token is what follows its question mark")
    fields = dict(parse_qsl(token.strip().strip("'\"").lstrip("?"), keep_blank_values=True))
    if not fields.get("sig"):
        raise UserError("the SAS token has no signature (sig=): copy the whole token")
    check_time(fields)
    check_scope(fields)
    missing = [right for right in rights if right not in fields.get("sp", rights)]
    if missing:
        words = " and ".join(f"{right} ({RIGHTS[right]})" for right in missing)
        raise UserError(f"the SAS token (sp={fields['sp']}) lacks {words}: make one with sp=racwl")


def check_time(fields: dict[str, str]) -> None:
    """Raise for a token that has expired, or begins later."""
    now = datetime.now(UTC)
    here = f"it is {now:%Y-%m-%d %H:%M} UTC by this machine's clock"
    begins, ends = moment(fields, "st"), moment(fields, "se")
    if ends and ends <= now:
        raise UserError(f"the SAS token expired at {ends:%Y-%m-%d %H:%M} UTC, {here}: {ANOTHER}")
    if begins and begins > now:
        raise UserError(f"the SAS token begins at {begins:%Y-%m-%d %H:%M} UTC, {here}: {ANOTHER}")


def moment(fields: dict[str, str], key: str) -> datetime | None:
    """Return a time of the token, None where it has none."""
    text = fields.get(key)
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"the SAS token has {key}={text}, which is not a time: {ANOTHER}") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def check_scope(fields: dict[str, str]) -> None:
    """Raise for a token of something smaller than a container, or of another service."""
    resource = fields.get("sr", "c")
    if resource.startswith("b"):
        raise UserError(
            f"the SAS token is for one blob (sr={resource}): make one for the container"
        )
    if "b" not in fields.get("ss", "b"):
        raise UserError(f"the SAS token (ss={fields['ss']}) is not for Blob storage (b)")
    kinds = fields.get("srt", "co")
    if not {"c", "o"} <= set(kinds):
        raise UserError(f"the SAS token (srt={kinds}) must hold for containers and objects: srt=co")
