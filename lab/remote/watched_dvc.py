"""Any dvc command, with two things more: a dead remote ends it in seconds, and it says what it sent.

lab dvc push                 # the same as `dvc push`
lab dvc pull models/onnx

Azure's library tries again for a minute or longer, silently. Here the remote is asked for a sign of life
while requests wait for it, and never while a stage computes.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from lab.experiments import own_stash
from lab.remote import config
from lab.remote.requests import Send, intercept
from stages.core.errors import UserError
from stages.core.network import answers

# A request that waits may be a large one on a slow line, so the remote is asked apart from it, twice. In
# all that takes at most QUIET + 2 * (PAUSE + PROBE) + GRACE = 9 seconds.
QUIET = 1  # seconds without a finished request before the remote is asked
PROBE = 2.5  # seconds that its answer may take
PAUSE = 0.5  # seconds between two questions
PATIENCE = 5  # seconds that a remote which refuses connections has to come back
GRACE = 2  # seconds for DVC to tidy up after itself


class Traffic(threading.Thread):
    """The requests of this process to the remote: what they carried, and whether they are heard."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.waiting, self.requests, self.sent, self.received = 0, 0, 0, 0
        self.host, self.alive, self.given_up = "", time.monotonic(), False

    def watch(self) -> Traffic:
        """Count every request of Azure's asynchronous Blob client, retries included, and stand guard."""

        async def counted(send: Send, policy: Any, request: Any) -> Any:
            self.host = "{0.scheme}://{0.netloc}".format(urlsplit(request.http_request.url))
            self.alive = self.alive if self.waiting else time.monotonic()
            self.waiting += 1
            try:
                response = await send(policy, request)
                self.count(request.http_request, response.http_response)
                return response
            finally:
                self.waiting -= 1

        intercept(counted)
        self.start()
        return self

    def count(self, request: Any, response: Any) -> None:
        """Note an answered request and its bytes."""
        self.alive = time.monotonic()
        self.requests += 1
        self.sent += int(request.headers.get("Content-Length") or 0)
        if request.method == "GET":
            self.received += int(response.headers.get("Content-Length") or 0)

    def run(self) -> None:
        """End the process when requests wait and the remote shows no sign of life, asked twice in a row."""
        unanswered = 0
        while True:
            time.sleep(PAUSE)
            seen = self.alive
            if not self.waiting or time.monotonic() - seen < QUIET:
                unanswered = 0
                continue
            if answers(self.host, PROBE):
                self.alive = time.monotonic()
            # a request that ended while the question was on its way counts for the remote, too
            unanswered = unanswered + 1 if self.alive == seen else 0
            if unanswered > 1 and time.monotonic() - seen > PATIENCE and self.waiting:
                self.given_up = True
                give_up(f"{self.host} does not answer")

    def __str__(self) -> str:
        amounts = f"sent {self.sent / 1e6:.2f} MB, received {self.received / 1e6:.2f} MB"
        return f"{amounts} in {self.requests} requests"


def give_up(why: str) -> None:
    """Say why, interrupt DVC as Ctrl-C does, and leave when it cannot."""
    print(
        f"\nlab: {why}: what has arrived there is kept, nothing here is lost; "
        "when `lab doctor` finds it again, run the same command again",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)


def dvc(words: Annotated[list[str], typer.Argument(help="As after `dvc`.")]) -> None:
    """Run any dvc command; a dead remote ends it in seconds."""
    raise typer.Exit(main(words))


def main(words: list[str]) -> int:
    """Run DVC in this process; return its exit code, or raise `UserError` with the cause of a failure."""
    from dvc.cli import main as dvc_main

    config.make_default()
    own_stash.use()
    logging.disable(logging.NOTSET)
    errors, traffic = Errors().listen(), Traffic().watch()
    code = dvc_main(words)
    if traffic.requests:
        print(traffic, file=sys.stderr)
    if traffic.given_up:
        return 1
    if code and (cause := errors.cause() or (traffic.host and refusal())):
        raise UserError(f"dvc {words[0]} failed: {cause}")
    return code


class Errors(logging.Handler):
    """The exceptions that DVC logs, of which its messages name the last only."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[BaseException] = []

    def listen(self) -> Errors:
        """Hear what DVC and its libraries log."""
        for name in ("dvc", "dvc_data", "dvc_objects"):
            logging.getLogger(name).addHandler(self)
        return self

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception of a record, and what caused it."""
        error = record.exc_info[1] if record.exc_info else None
        while error is not None:
            self.seen.append(error)
            error = error.__cause__ or error.__context__

    def cause(self) -> str | None:
        """Say what went wrong here, where an exception tells."""
        from dvc.config import NoRemoteError
        from dvc.exceptions import CheckoutError, DownloadError
        from dvc_objects.errors import ObjectFormatError

        if any(getattr(error, "errno", None) == errno.ENOSPC for error in self.seen):
            return (
                "the disk is full: free some space (`dvc gc -w`), then run the same command again"
            )
        if any(isinstance(error, NoRemoteError) for error in self.seen):
            return refusal()
        if any(
            isinstance(error, CheckoutError | DownloadError | ObjectFormatError)
            for error in self.seen
        ):
            return (
                refusal()
                or "a blob is missing or damaged in the remote: `lab fsck --deep` names it"
            )
        return None


def refusal() -> str | None:
    """Say what is wrong with the remote, None when it is well."""
    try:
        config.load().check()
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as failure:
        sys.exit(f"lab: {failure}")
