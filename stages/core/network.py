"""Whether a server answers, found out within seconds: the libraries try for minutes."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def with_timeout(seconds: float, question: Callable[[], Answer]) -> Answer | None:
    """Return a question's answer, None if it takes longer: DNS knows no limit, so a thread asks."""
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def answers(url: str, seconds: float) -> bool:
    """Say whether a server answers at all; a name that DNS is slow to refuse counts as no."""

    def ask() -> bool:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()  # noqa: S310  # an https address of ours
        except urllib.error.HTTPError:
            return True  # a refusal is an answer
        except OSError as error:
            # so is a certificate that is not trusted here; the sign-in then says what is wrong with it
            return isinstance(getattr(error, "reason", None), ssl.SSLError)
        return True

    return bool(with_timeout(seconds, ask))
