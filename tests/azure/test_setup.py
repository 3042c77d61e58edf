"""`lab remote setup`, `make azurite` and `lab doctor`: from nothing to a remote that is proven to work."""

import os
import pty
import select
import sys
from collections.abc import Iterator

import pytest

from azureml import cloud as azure
from lab.remote import azurite as emulator
from support.blob_service import account_sas, free_port, lab
from support.processes import HANGS
from support.project import Project

pytestmark = pytest.mark.azure
SETUP = ["remote", "setup", "--account", "somelab", "--sign-in", "connection-string"]


@pytest.fixture
def clone(made, tmp_path) -> Project:
    """A clone with results, which knows no remote."""
    return made.copy(tmp_path / "clone")


def setup(project, container: str, secret: str, exits: int = 0) -> str:
    words = [sys.executable, "-m", "lab.cli", *SETUP, "--container", container]
    return project.run(*words, exits=exits, says=f"{secret}\n")


def test_setup_creates_the_container_proves_it_and_keeps_the_secret_out_of_git(clone, lasting):
    (clone.root / ".dvc/config.local").touch(mode=0o644)  # for everybody to read
    said = setup(clone, "fresh-container", lasting.connection_string)
    assert "container created" in said
    assert "wrote, read and deleted a blob" in said
    assert emulator.KEY not in said
    assert emulator.KEY in (clone.root / ".dvc/config.local").read_text()
    assert (clone.root / ".dvc/config.local").stat().st_mode & 0o077 == 0
    assert clone.git("status", "--short").split() == ["M", ".dvc/config"]
    config = (clone.root / ".dvc/config").read_text()
    assert "url = azure://fresh-container" in config
    assert "azure" in clone.dvc("remote", "default")
    assert "verify = true" in config
    assert "# without it, a flipped byte" in config
    assert emulator.KEY not in config
    assert "container found" in setup(clone, "fresh-container", lasting.connection_string)
    lab(clone, "dvc", "push")


@pytest.fixture
def online(clone, reaches_azure) -> Project:
    """A clone on a machine that reaches Azure."""
    return clone


@pytest.mark.parametrize(
    ("kind", "option", "words"),
    [("key", "account_key", "account key"), ("sas", "sas_token", "SAS token")],
)
def test_setup_with_a_key_or_a_sas(kind, option, words, online):
    sas = account_sas("racwdl", azure.REMOTE, azure.KEY)
    secret = {"key": azure.KEY, "sas": sas}[kind]
    pasted = {"key": f'"{azure.KEY}"', "sas": f"https://somelab.blob.core.windows.net/?{sas}"}[kind]
    setup = ["remote", "setup", "--account", azure.REMOTE, "--container", f"with-{kind}"]
    command = [sys.executable, "-m", "lab.cli", *setup, "--sign-in", kind]
    said = online.run(*command, says=f"{pasted}\n")
    assert f"container created in account {azure.REMOTE}" in said
    assert f"Signed in with {words}; wrote, read and deleted a blob" in said
    assert secret not in said
    assert f"{option} = {secret}" in (online.root / ".dvc/config.local").read_text()
    assert secret not in (online.root / ".dvc/config").read_text()
    lab(online, "dvc", "push")
    assert "0 of them" in lab(online, "fsck", "--deep")


def test_setup_asks_on_a_terminal_and_shows_no_secret(online):
    answers = {
        "Storage account: ": azure.REMOTE,
        "Container [olive-lab]: ": "asked",
        "Sign-in (keyless, key, sas, connection-string) [keyless]: ": "key",
        "key: ": azure.KEY,
    }
    said = dialogue(online, answers)
    assert f"container created in account {azure.REMOTE}" in said
    assert "Signed in with account key" in said
    assert azure.KEY not in said


def test_setup_asks_for_one_of_four_sign_ins(clone):
    answers = {"Storage account: ": "somelab", "Container ": "asked", "Sign-in ": "password"}
    said = dialogue(clone, answers, exits=1)
    assert "lab: sign-in 'password': must be one of keyless, key, sas, connection-string" in said


def dialogue(project: Project, answers: dict[str, str], exits: int = 0) -> str:
    """Run `lab remote setup` on a terminal, answer what it asks; return what stood there."""
    ours, theirs = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    command = [sys.executable, "-m", "lab.cli", "remote", "setup"]
    process = project.start(*command, start_new_session=True, **streams)
    os.close(theirs)
    said = ""
    for question, answer in answers.items():
        said += read_until(ours, question)
        os.write(ours, f"{answer}\n".encode())
    said += read_until(ours, None)
    os.close(ours)
    assert process.wait(HANGS) == exits, said
    return said


def read_until(terminal: int, words: str | None) -> str:
    """Return what a terminal shows up to some words, or until nobody writes there any more."""
    said = ""
    while words is None or words not in said:
        assert select.select([terminal], [], [], HANGS)[0], f"{words!r} never came: {said}"
        try:
            said += os.read(terminal, 1024).decode()
        except OSError:  # what Linux says when the last writer has gone
            assert words is None, f"{words!r} never came: {said}"
            break
    return said


def test_a_setup_that_fails_leaves_the_settings_as_they_were(clone, lasting):
    before = (clone.root / ".dvc/config").read_text()
    wrong = emulator.connection_string(lasting.port, key="A" * 86 + "==")
    assert "rejects the connection string" in setup(clone, "other", wrong, exits=1)
    assert (clone.root / ".dvc/config").read_text() == before
    assert not (clone.root / ".dvc/config.local").exists()


@pytest.mark.parametrize("account", ["my-lab", "Lab", "l"])
def test_an_impossible_account_is_refused(account, clone):
    words = ["--container", "c", "--sign-in", "keyless", "--account", account]
    said = lab(clone, "remote", "setup", *words, exits=1)
    assert f"account '{account}': must be 3 to 24 lower-case letters and digits" in said


@pytest.fixture
def own_azurite(clone, program, monkeypatch) -> Iterator[Project]:
    """A clone in which Azurite is installed and a free port is chosen; nothing runs there in the end."""
    (clone.root / ".azurite").mkdir()
    for name in ("node_modules", "package-lock.json"):
        (clone.root / ".azurite" / name).symlink_to(program.parents[5] / name)
    monkeypatch.setenv("AZURITE_PORT", str(free_port()))
    yield clone
    clone.python("lab.remote.azurite", "stop")


def test_the_developers_azurite_starts_serves_and_stops(own_azurite):
    clone = own_azurite
    assert "container olive-lab" in clone.python("lab.remote.azurite", "start")
    assert "ok    push" in lab(clone, "doctor", exits=1)  # there is no conf/ here
    clone.dvc("push")  # it is the default of plain dvc too
    assert "Azurite answers" in clone.python("lab.remote.azurite", "start")
    assert "is stopped" in clone.python("lab.remote.azurite", "stop")
    assert (clone.root / ".dvc/config.local").read_text().strip() == ""
    assert "not set up" in lab(clone, "run", exits=1)


def test_the_developers_own_connection_string_comes_back(own_azurite, container):
    clone = own_azurite
    own = "DefaultEndpointsProtocol=https;AccountName=somelab;AccountKey=c2VjcmV0"
    local = container.connect(clone, connection_string=own).root / ".dvc/config.local"
    before = local.read_text()
    clone.python("lab.remote.azurite", "start")
    clone.python("lab.remote.azurite", "start")
    assert own not in local.read_text()
    assert (clone.root / ".azurite/previous").stat().st_mode & 0o077 == 0
    clone.python("lab.remote.azurite", "stop")
    assert own in local.read_text()
    clone.python("lab.remote.azurite", "stop")
    assert local.read_text() == before
    assert not (clone.root / ".azurite/previous").exists()


def test_a_port_that_is_taken_is_named_with_another(own_azurite, lasting, monkeypatch):
    monkeypatch.setenv("AZURITE_PORT", str(lasting.port))
    said = own_azurite.python("lab.remote.azurite", "start", exits=1)
    assert f"port {lasting.port} is taken: AZURITE_PORT={lasting.port + 1} make azurite" in said


def test_without_node_azurite_says_what_to_install(clone):
    said = clone.run(
        "/usr/bin/env",
        "PATH=/nowhere",
        sys.executable,
        "-m",
        "lab.remote.azurite",
        "start",
        exits=1,
    )
    assert "install Node.js 18 or newer" in said
    assert "Traceback" not in said


def test_the_doctor_says_what_is_wrong_and_what_is_well(laptop, container):
    container.client.delete_container()
    said = lab(laptop, "doctor", exits=1)
    for well in ("versions", "gpu", "disk", "links", "sign-in"):
        assert f"ok    {well}" in said
    assert "WRONG remote     the remote azure://" in said
    assert "has no container" in said
    assert "Traceback" not in said


@pytest.fixture
def from_before(laptop, container) -> Project:
    """A clone with account and sign-in, from when .dvc/config named the default remote for everybody."""
    local = laptop.root / ".dvc/config.local"
    local.write_text(container.settings().replace("[core]\n    remote = azure\n", ""))
    return laptop


def test_a_clone_that_was_set_up_before_keeps_its_remote(from_before, container):
    assert "; not plain dvc's default: `dvc remote default --local azure`" in (
        lab(from_before, "doctor", exits=1)  # there is no conf/ here
    )
    assert "is missing" in lab(from_before, "fsck", exits=1)  # in that remote
    said = lab(from_before, "dvc", "push")
    assert "lab: the remote 'azure' is now this clone's default, for plain dvc too" in said
    assert container.objects()
    assert "now this clone's default" not in lab(from_before, "dvc", "push")
    from_before.dvc("pull")


def test_a_run_in_a_clone_that_was_set_up_before_shares_what_it_made(from_before, container):
    lab(from_before, "run")
    assert container.objects()
