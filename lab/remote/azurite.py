"""Azurite: the real Blob protocol on loopback, for a developer without an Azure account.

make azurite              # start, make the container, point DVC at it: python -m lab.remote.azurite start
make azurite-stop         # stop it, DVC goes back to the remote before: python -m lab.remote.azurite stop

Everything lives in .azurite/, which git ignores: the program, the blobs, the log and the process id.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import time
from pathlib import Path

import psutil

from lab import npm
from lab.remote.reach import is_emulator
from stages.core.errors import UserError
from stages.core.running import one_line_errors

PINS = Path(__file__).resolve().parents[2] / "azurite"
HOME = Path(".azurite")
# What the developer's own settings say while the emulator is in use: connection string, default remote.
PREVIOUS = HOME / "previous"
PREVIOUS_DEFAULT = HOME / "previous-default"
PROGRAM = "node_modules/azurite/dist/src/blob/main.js"
PORT = 10000
# The account that every Azurite has; its key is printed in Azurite's manual and opens nothing else.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_SECONDS = 120  # on a busy machine; a start that fails is noticed at once
STOP_SECONDS = 10


def install(home: Path) -> Path:
    """Install the pinned Azurite into `home`; return the program. Free the second time."""
    pins = PINS / "package-lock.json"
    installed = home / pins.name
    if not (home / PROGRAM).exists() or installed.read_bytes() != pins.read_bytes():
        npm.need_node("Azurite", "make azurite")
        print(f"Installing Azurite into {home} (once)", flush=True)
        try:
            npm.install(PINS, home, "Azurite")
        except UserError:
            installed.unlink()
            raise
    return home / PROGRAM


def serve(program: Path, data: Path, port: int, *, own_session: bool = True) -> subprocess.Popen:
    """Start Azurite on loopback; return its process once it answers. Raises `UserError` if it does not."""
    if is_open(port):
        raise UserError(f"port {port} is taken: AZURITE_PORT={port + 1} make azurite")
    data.mkdir(parents=True, exist_ok=True)
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(data)]
    with (data / "azurite.log").open("w") as log:
        process = subprocess.Popen(
            ["node", str(program), *options, "--skipApiVersionCheck", "--disableTelemetry", "--silent"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=own_session,
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while not listens(process, port):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError(f"Azurite did not start: {data / 'azurite.log'} says why")
        time.sleep(0.05)
    return process


def is_open(port: int) -> bool:
    """Say whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listens(process: subprocess.Popen, port: int) -> bool:
    """Say whether it is this process that listens on a port, and not one that was faster to take it."""
    try:
        sockets = psutil.Process(process.pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)


def connection_string(port: int, key: str = KEY) -> str:
    """Return the words with which Azure's libraries find an Azurite."""
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint};"


def start(port: int) -> None:
    """Make the developer's own Azurite run, with the container, and the local DVC config name it."""
    from lab.remote.config import load

    program = install(HOME)
    if running() is None:
        process = serve(program, HOME / "data", port)
        (HOME / "pid").write_text(f"{process.pid} {port}\n", encoding="utf-8")
    port = int((HOME / "pid").read_text(encoding="utf-8").split()[1])
    lend_settings(connection_string(port))
    remote = load()
    remote.create_container()
    print(
        f"Azurite answers on 127.0.0.1:{port}, container {remote.container}; make azurite-stop ends it"
    )


def stop() -> None:
    """Stop the developer's Azurite and take it out of the local DVC config; the blobs stay."""
    process = running()
    if process:
        end(process)
    (HOME / "pid").unlink(missing_ok=True)
    give_settings_back()
    print(
        f"Azurite is stopped; its blobs stay in {HOME / 'data'}" if process else "No Azurite runs"
    )


def end(process: psutil.Process) -> None:
    """Ask a process to end, which saves what it has; kill it when it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)


def lend_settings(words: str) -> None:
    """Make the local DVC config name the emulator; keep what the developer had there."""
    from lab.remote.config import NAME, configure, configured

    own = configured("connection_string", local=True)
    if not is_emulator(own or ""):
        keep(PREVIOUS, own)
        keep(PREVIOUS_DEFAULT, configured("remote", local=True, section="core"))
    configure({"connection_string": words}, local=True)
    configure({"remote": NAME}, local=True, section="core")


def give_settings_back() -> None:
    """Put back what the developer had; leave a connection string alone that is not the emulator's."""
    from lab.remote.config import configure, configured

    if is_emulator(configured("connection_string", local=True) or ""):
        configure({"connection_string": kept(PREVIOUS)}, local=True)
        configure({"remote": kept(PREVIOUS_DEFAULT)}, local=True, section="core")
    PREVIOUS.unlink(missing_ok=True)
    PREVIOUS_DEFAULT.unlink(missing_ok=True)


def keep(file: Path, value: str | None) -> None:
    """Write a setting to a file that only its owner may read; no file for no setting."""
    file.unlink(missing_ok=True)
    if value is not None:
        file.touch(mode=0o600)
        file.write_text(value, encoding="utf-8")


def kept(file: Path) -> str | None:
    """Return what `keep` wrote."""
    return file.read_text(encoding="utf-8") if file.exists() else None


def running() -> psutil.Process | None:
    """Return the process that `start` started, None when it is gone."""
    try:
        process = psutil.Process(int((HOME / "pid").read_text(encoding="utf-8").split()[0]))
        return process if any(PROGRAM in word for word in process.cmdline()) else None
    except (OSError, ValueError, IndexError, psutil.Error):
        return None


def main() -> None:
    """Install, start or stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["install", "start", "stop"])
    parser.add_argument("--port", type=int, default=int(os.environ.get("AZURITE_PORT", PORT)))
    options = parser.parse_args()
    with one_line_errors("azurite"):
        if options.action == "start":
            start(options.port)
        else:
            install(HOME) if options.action == "install" else stop()


if __name__ == "__main__":
    main()
