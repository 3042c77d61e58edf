"""A remote that cannot be reached, refuses, or goes away half-way: seconds, one line, nothing lost."""

import random
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lab.remote import azurite as emulator
from lab.remote import unreachable
from lab.remote import watched_dvc as lab_dvc
from lab.remote.blob import NoContainer, Remote
from lab.remote.reach import TIMEOUT, need_answer
from stages.core.errors import UserError
from support.blob_service import (
    BYTES,
    FILES,
    Container,
    account_sas,
    cloned,
    free_port,
    lab,
    settings,
    start,
    wait_until,
)
from support.processes import output_of

pytestmark = pytest.mark.azure


def with_sas(container: Container, permission: str) -> str:
    endpoint = f"http://127.0.0.1:{container.azurite.port}/{emulator.ACCOUNT}"
    return f'"BlobEndpoint={endpoint};SharedAccessSignature={account_sas(permission)}"'


@pytest.mark.parametrize("command", [["run"], ["fsck"], ["doctor"], ["dvc", "push"]])
def test_a_wrong_key_is_named(command, laptop, container):
    wrong = emulator.connection_string(container.azurite.port, key="A" * 86 + "==")
    container.connect(laptop, connection_string=wrong)
    said = lab(laptop, *command, exits=1)
    assert "rejects the connection string (account devstoreaccount1)" in said
    assert ("ok    clock" in said) == (command == ["doctor"])  # a wrong one may be why
    assert "Traceback" not in said
    assert "AAAAAA" not in said
    assert container.objects() == {}


def test_a_read_only_sas_pulls_and_is_refused_before_anything_is_computed(
    colleague, pushed, container
):
    container.connect(colleague, connection_string=with_sas(container, "rl"))
    lab(colleague, "dvc", "pull")
    (colleague.root / "params.yaml").write_text(settings(steps=2))
    said = lab(colleague, "run", exits=1)
    assert "the SAS token (sp=rl) lacks w (write): make one with sp=racwl" in said
    assert "Running stage" not in said


def test_a_key_that_cannot_be_one_is_named(laptop, container):
    container.connect(laptop, connection_string="nonsense")
    assert "cannot be read" in lab(laptop, "run", exits=1)


class Counting(socketserver.BaseRequestHandler):
    """Answers every request with the words of a service that is overloaded, or never."""

    def handle(self) -> None:
        if self.request.recv(1 << 14):  # nothing comes from who only knocks
            self.server.requests += 1
            if self.server.words is None:
                self.server.over.wait()
            else:
                self.request.sendall(self.server.words)


@pytest.fixture(params=[b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", None])
def bad_server(request) -> Iterator[socketserver.ThreadingTCPServer]:
    """A Blob service that is overloaded, or takes connections and says nothing; counts what it is asked."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Counting) as server:
        server.daemon_threads = True
        server.words, server.requests, server.over = request.param, 0, threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def test_a_check_asks_once_and_waits_for_seconds(bad_server):
    words = emulator.connection_string(bad_server.server_address[1])
    there = Remote("c", "", {"connection_string": words})
    with pytest.raises(UserError, match=r"does not answer|answers 503"):
        there.check()
    assert bad_server.requests == 1
    assert TIMEOUT <= 5


def test_an_experiment_asks_a_remote_that_does_not_answer_once(bad_server, monkeypatch, capsys):
    from azure.storage.blob.aio import ExponentialRetry
    from dvc_azure import AzureFileSystem

    monkeypatch.setattr(ExponentialRetry, "send", ExponentialRetry.send)  # is put back in the end
    monkeypatch.setattr(unreachable, "FIRST_ANSWER", 2)
    unreachable.ask_once()
    words = emulator.connection_string(bad_server.server_address[1])
    files = AzureFileSystem(connection_string=words)
    for name in ("a", "b", "c"):
        with pytest.raises(Exception, match=r"does not answer|answers 503"):
            files.open(f"container/{name}", "rb")
    assert bad_server.requests == 1
    assert capsys.readouterr().err.count("lab: going on without the remote") == 1


def test_a_dead_remote_ends_a_command_in_ten_seconds_by_its_own_clock():
    asked_twice = lab_dvc.QUIET + 2 * (lab_dvc.PAUSE + lab_dvc.PROBE)
    assert max(asked_twice, lab_dvc.PATIENCE + lab_dvc.PAUSE) + lab_dvc.GRACE <= 10


@pytest.fixture
def silent_proxy(monkeypatch) -> Iterator[None]:
    """A proxy in front of Azure that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, address)
        yield


def test_no_credentials_at_all(laptop, container, silent_proxy):
    container.connect(laptop, account_name="somelab")
    said = lab(laptop, "run", exits=1)
    assert "not signed in to Azure: run `az login`" in said


def test_a_network_that_swallows_the_sign_in(laptop, container, silent_proxy):
    principal = dict.fromkeys(("tenant_id", "client_id", "client_secret"), "mine")
    container.connect(laptop, account_name="somelab", **principal)
    assert "does not answer: check the network" in lab(laptop, "run", exits=1)


def test_a_name_server_that_stays_silent(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: threading.Event().wait())
    with pytest.raises(UserError, match="does not answer: check the network"):
        need_answer("https://somelab.blob.core.windows.net/c", Remote("c", "", {}))


def test_a_name_that_nobody_has(monkeypatch):
    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be found: check the network, and the account"):
        need_answer("https://somelab.blob.core.windows.net/c", Remote("c", "", {}))


def test_a_clone_as_it_comes_computes_and_says_how_to_get_a_remote(made, tmp_path):
    clone = cloned(made, tmp_path / "clone")
    assert "Running stage 'make'" in clone.dvc("repro")
    for command in (["run"], ["fsck"], ["dvc", "push"]):
        said = lab(clone, *command, exits=1)
        assert "the remote is not set up: `lab remote setup`" in said
    assert not (clone.root / ".dvc/config.local").exists()


def test_a_container_that_is_not_there(laptop, container):
    container.client.delete_container()
    said = lab(laptop, "run", exits=1)
    assert f"has no container {container.name!r}: lab remote setup creates it" in said
    assert f"has no container {container.name!r}" in lab(laptop, "dvc", "push", exits=1)


@pytest.mark.parametrize(
    "command", [["run"], ["fsck"], ["doctor"], ["dvc", "push"], ["dvc", "pull"]]
)
def test_a_remote_that_is_off(command, laptop, container, dead_port):
    nobody = emulator.connection_string(dead_port)
    container.connect(laptop, connection_string=nobody)
    said = lab(laptop, *command, exits=1)
    assert "does not answer" in said
    assert "Traceback" not in said


def test_a_remote_is_given_up_after_two_silences_in_a_row_not_after_one(monkeypatch):
    answers = iter([False, True, False, False])
    monkeypatch.setattr(lab_dvc, "answers", lambda *_: next(answers))
    monkeypatch.setattr(lab_dvc, "give_up", lambda _: sys.exit())
    monkeypatch.setattr(lab_dvc, "PAUSE", 0)
    for name in ("QUIET", "PATIENCE"):
        monkeypatch.setattr(lab_dvc, name, -1)  # over before they begin
    traffic = lab_dvc.Traffic()
    traffic.waiting = 1
    with pytest.raises(SystemExit):
        traffic.run()
    assert list(answers) == []


@pytest.mark.parametrize("way", ["cut", "silent"])
def test_a_remote_that_goes_away_during_a_push_ends_it_and_loses_nothing(
    way, laptop, container, line
):
    breaking = line(way, after=5 * BYTES)
    container.connect(laptop, connection_string=breaking.connection_string)
    push = start(laptop, "dvc", "push", "--jobs", "1")
    assert breaking.broken.wait(120)
    said = output_of(push)
    assert push.returncode != 0
    assert "does not answer: what has arrived there is kept" in said
    assert 0 < len(container.objects()) < FILES
    breaking.mend()
    lab(laptop, "dvc", "push")
    assert "0 of them" in lab(laptop, "fsck", "--deep")


def test_a_remote_that_goes_away_during_a_pull_leaves_nothing_half_done(colleague, pushed, line):
    breaking = line("cut", after=5 * BYTES)
    pushed.connect(colleague, connection_string=breaking.connection_string)
    assert "does not answer" in lab(colleague, "dvc", "pull", "--jobs", "1", exits=1)
    assert breaking.broken.is_set()
    assert not (colleague.root / "models/base").exists()
    breaking.mend()
    lab(colleague, "dvc", "pull")
    assert "up to date" in colleague.dvc("status")


def test_a_push_that_is_killed_again_and_again_ends_whole(laptop, container, line):
    dice = random.Random(7)
    for _ in range(4):  # together they cannot send everything
        breaking = line("silent", after=dice.randrange(BYTES, FILES * BYTES // 5))
        container.connect(laptop, connection_string=breaking.connection_string)
        push = laptop.start(sys.executable, "-m", "dvc", "push", "--run-cache")
        assert breaking.broken.wait(120)
        push.kill()
        output_of(push)
    container.connect(laptop)
    laptop.dvc("push", "--run-cache")
    assert "0 of them" in lab(laptop, "fsck", "--deep")


def test_a_proxy_that_is_off_is_named_with_the_way_round_it(monkeypatch, dead_port):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{dead_port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(
        UserError, match=rf"127\.0\.0\.1:{dead_port} does not answer.*NO_PROXY=an.ac"
    ):
        need_answer("https://an.account.invalid/c", "the remote")


def test_an_azurite_older_than_the_library_says_what_it_wants(program, tmp_path):
    """Skips where the installed Azurite knows the library's protocol."""
    port = free_port()
    words = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(tmp_path)]
    azurite = subprocess.Popen(["node", str(program), *words, "--silent"])
    try:
        wait_until(lambda: emulator.is_open(port), azurite)
        there = Remote("c", "", {"connection_string": emulator.connection_string(port)})
        with pytest.raises(UserError) as refusal:
            there.check()
    finally:
        azurite.kill()
    if isinstance(refusal.value, NoContainer):
        pytest.skip("this Azurite is new enough")
    assert "--skipApiVersionCheck (make azurite gives it)" in str(refusal.value)


@pytest.mark.parametrize("option", ["version_aware", "worktree"])
def test_a_remote_that_keeps_versions_is_refused(laptop, container, option):
    key = {"connection_string": container.azurite.connection_string, option: "true"}
    output = lab(container.connect(laptop, **key), "fsck", exits=1)
    assert f"`dvc remote modify --unset azure {option}`" in output
