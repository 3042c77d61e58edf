"""Clones of the working tree in which the real pipeline runs on the tiny model.

`finished` has been run once for these files, whatever the number of pytest-xdist workers; two more
went on from there: `with_experiment` tried a setting, `two_commits` made it the default. `project`, `tried`
and `changed` are a test's own copies of them, to run further, change or break.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

pytest_plugins = ["blob_service"]  # the fixtures of tests/azure

ROOT = Path(__file__).resolve().parents[1]
DAY = 24 * 3600
HANGS = 1200  # seconds after which a command is held to hang: ten times what one takes on a busy machine
sys.path.insert(
    0, str(ROOT)
)  # the stages beside these tests, wherever the package was installed from
os.environ["OMP_NUM_THREADS"] = (
    "1"  # pytest's workers share the cores: threads would wait for each other
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first: else one worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@dataclass(frozen=True)
class Project:
    """A clone with a git repository, a DVC cache and DVC settings of its own."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return what a command sees: this Python first, nothing of the person who runs the tests."""
        home = self.root.parent / f"{self.root.name}.home"
        home.mkdir(exist_ok=True)
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "AZURE"))},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(home),
            "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential",  # not this machine's, nor `az login`
            "PYTHONDONTWRITEBYTECODE": "1",  # a clone that others copy must not change meanwhile
            "GIT_OPTIONAL_LOCKS": "0",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_NAME": "test" for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": "test@localhost" for who in ("AUTHOR", "COMMITTER")},
        }

    def start(self, *words: str, **options) -> subprocess.Popen:
        """Start a command in the clone; what it prints comes together, as text."""
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        return subprocess.Popen(
            words, cwd=self.root, env=self.environment, text=True, **{**pipes, **options}
        )

    def run(self, *words: str, exits: int = 0, says: str | None = None) -> str:
        """Run a command in the clone; return what it printed. Fails unless it exits as expected."""
        process = self.start(*words, stdin=None if says is None else subprocess.PIPE)
        output = output_of(process, says)
        assert process.returncode == exits, f"{' '.join(words)}: {process.returncode}\n{output}"
        return output

    def python(self, *words: str, **options) -> str:
        """Run `python -m ...` in the clone."""
        return self.run(sys.executable, "-m", *words, **options)

    def dvc(self, *words: str, **options) -> str:
        """Run `dvc ...` in the clone."""
        return self.python("dvc", *words, **options)

    def git(self, *words: str) -> str:
        """Run `git ...` in the clone."""
        return self.run("git", *words)

    @property
    def log(self) -> Path:
        """Return the file that keeps what making this clone printed."""
        return self.root.with_name(f"{self.root.name}.log")

    def commit(self) -> None:
        """Commit everything that git does not ignore."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "test")

    def copy(self, root: Path) -> Project:
        """Copy the clone, outputs and cache included."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace a text that stands exactly once in a file of the clone."""
        text = (self.root / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        (self.root / file).write_text(text.replace(old, new), encoding="utf-8")


def output_of(process: subprocess.Popen, says: str | None = None) -> str:
    """Return what a command printed until it ended; one that hangs is killed with its children."""
    try:
        return process.communicate(says, timeout=HANGS)[0]
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        pytest.fail(f"{process.args}: not done after {HANGS} s\n{process.communicate()[0]}")


def left_behind(project: Project) -> list[str]:
    """Return the half-written files and folders that a stage forgot."""
    return [str(p) for p in project.root.rglob("*.tmp") if ".dvc" not in p.parts]


def stages_that_ran(output: str) -> list[str]:
    """Return the stages that DVC says it ran."""
    return re.findall(r"Running stage '([\w@]+)'", output)


def wait_until(happens, seconds: float = 300):
    """Wait for something to happen and return it; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (result := happens()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return result


def working_tree() -> list[str]:
    """Return the files of the working tree that git knows or would add, less the results."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    names = sorted(name for name in listed.split("\0") if (ROOT / name).is_file())
    return [name for name in names if not name.startswith(("dvc.lock", "metrics/"))]


def clone(root: Path) -> Project:
    """Clone the working tree as it is, uncommitted work included, with the tiny model as the default."""
    for name in working_tree():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    project = Project(root)
    project.git("init", "--quiet")
    shutil.copy(ROOT / "tests/shrunk.yaml", root / "conf/experiment/shrunk.yaml")
    project.replace("conf/config.yaml", "- experiment: null", "- experiment: shrunk")
    project.python("stages.params")
    project.commit()
    return project


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of these very files: all pytest-xdist workers see it, and so do later sessions for a day."""
    digest = hashlib.sha256(sys.version.encode())
    for name in working_tree():
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    home = Path(tempfile.gettempdir(), f"olive-lab-tests-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    assert home.stat().st_uid == os.getuid(), f"{home} is somebody else's"
    for old in home.iterdir():
        if time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)
    folder = home / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once: the first worker that asks makes it, the others wait."""

    def make(name: str, maker: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.made").exists():
                shutil.rmtree(shared / name, ignore_errors=True)
                maker(shared / name)
                (shared / f"{name}.made").touch()
        return shared / name

    return make


@pytest.fixture(scope="session")
def finished(once) -> Project:
    """A clone after a full `dvc repro`, committed. Only read it."""

    def repro(root: Path) -> None:
        project = clone(root)
        project.log.write_text(project.dvc("repro"), encoding="utf-8")
        project.commit()

    return Project(once("finished", repro))


@pytest.fixture(scope="session")
def with_experiment(once, finished) -> Project:
    """A clone after an experiment called `shorter` in a temporary copy of it. Only read it."""

    def experiment(root: Path) -> None:
        project, shorter = finished.copy(root), ["-S", "evaluate.max_new_tokens=6"]
        output = project.dvc("exp", "run", "--temp", "--name", "shorter", *shorter)
        project.log.write_text(output, encoding="utf-8")

    return Project(once("with_experiment", experiment))


@pytest.fixture(scope="session")
def two_commits(once, finished) -> Project:
    """Two commits that differ in one line of conf/ and its results. Only read it."""

    def change(root: Path) -> None:
        project = finished.copy(root)
        project.replace("conf/experiment/shrunk.yaml", "max_new_tokens: 8", "max_new_tokens: 6")
        project.log.write_text(project.dvc("repro"), encoding="utf-8")
        project.commit()

    return Project(once("two_commits", change))


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A test's own copy of the finished clone."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def tried(with_experiment, tmp_path) -> Project:
    """A test's own copy of the clone with an experiment."""
    return with_experiment.copy(tmp_path / "tried")


@pytest.fixture
def changed(two_commits, tmp_path) -> Project:
    """A test's own copy of the clone with two commits."""
    return two_commits.copy(tmp_path / "changed")


@pytest.fixture
def fresh(tmp_path) -> Project:
    """A test's own clone in which nothing has run, with an empty cache."""
    return clone(tmp_path / "fresh")


@pytest.fixture
def params() -> dict:
    """What conf/ composes to, to change and validate: params.yaml may hold an experiment's values."""
    from stages.params import compose, values_of

    with contextlib.chdir(ROOT):
        return values_of(compose())
