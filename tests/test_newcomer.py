"""Each command of README and docs as the first one on a fresh clone.

There is no network (where Linux allows to take it away), no remote, no cache, no git identity, no Azure
account, and nobody at the terminal: a command does its work, or says in plain words what it lacks.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lab.cli import COMMANDS
from lab.remote import azurite as emulator
from support.processes import HANGS
from support.project import ROOT

pytestmark = pytest.mark.slow
TINY = "-S model=tiny -S evaluate=quick -S evaluate/gates=none -S finetune.max_steps=2"
STARTED = "Running stage 'fetch'"


def has_network_namespaces() -> bool:
    """Say whether this user may start a process that has no network."""
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    return False


@dataclass(frozen=True)
class Newcomer:
    """A fresh clone, as it is after `git clone`, and somebody who has nothing else."""

    root: Path
    home: Path
    alone: bool

    def start(self, command: str, log: Path) -> subprocess.Popen:
        """Start a shell command; all that it prints goes to a file."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "PYTHONPATH": str(self.root),
            "PYTHONUNBUFFERED": "1",
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        for level in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
            environment[f"DVC_{level}_DIR"] = str(self.home / level.lower())
        words = [*(["unshare", "-rn"] if self.alone else []), "bash", "-c", command]
        with log.open("w") as output:
            return subprocess.Popen(
                words,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def says(self, command: str, words: str, exits: int | None) -> str:
        """Return what a command printed by its end, with None for `exits` until words appeared."""
        log = self.home / "log"
        process = self.start(command, log)
        deadline = time.monotonic() + HANGS
        try:
            while process.poll() is None:
                if exits is None and re.search(words, log.read_text(errors="replace")):
                    break
                assert time.monotonic() < deadline, f"{command} hangs:\n{log.read_text()}"
                time.sleep(0.05)
        finally:
            end_family(process)
        said = log.read_text(encoding="utf-8", errors="replace")
        assert exits is None or process.returncode == exits, f"exit {process.returncode}:\n{said}"
        return said


def end_family(process: subprocess.Popen) -> None:
    """Kill a process with all that it started, however deep."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


@pytest.fixture(scope="session")
def cloned_once(tmp_path_factory) -> Path:
    """A clone of the working tree as it is, results and dvc.lock included."""
    origin, clone = (tmp_path_factory.mktemp("newcomer") / name for name in ("origin", "clone"))
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, origin / name)
    somebody = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost"]
    for words in (["init", "-b", "main"], ["add", "--all"], [*somebody, "commit", "-m", "all"]):
        subprocess.run(["git", *words], cwd=origin, capture_output=True, check=True)
    subprocess.run(["git", "clone", "--quiet", str(origin), str(clone)], check=True)
    return clone


@pytest.fixture(scope="session")
def alone() -> bool:
    return has_network_namespaces()


@pytest.fixture
def newcomer(cloned_once, alone, tmp_path) -> Newcomer:
    shutil.copytree(cloned_once, tmp_path / "clone", symlinks=True)
    (tmp_path / "home").mkdir()
    return Newcomer(tmp_path / "clone", tmp_path / "home", alone)


NO_REMOTE = "^lab: .*the remote is not set up: `lab remote setup`"
NO_WORKSPACE = "^lab: no Azure ML workspace is named"
ROWS = [  # a command, its exit code (None: it is ended when the words appear), what it says
    ("make", 0, "make repro"),
    ("make help", 0, "make azurite"),
    ("dvc status", 0, "models/base"),
    (f"dvc exp run {TINY}", None, STARTED),
    ("dvc exp run -S finetune.max_steps=200", None, STARTED),
    ("dvc exp run -S quantize=rtn -S finetune=rslora", None, STARTED),
    ("dvc exp run -S finetune.max_step=5", 255, r"finetune\."),
    ("dvc exp run -S finetune.max_steps=many", 255, "finetune.max_steps"),
    ("dvc exp run --pull --allow-missing -S finetune.max_steps=200", 255, "models/quantized"),
    ("dvc exp run --queue -S finetune.rank=8,16,32", 0, "Queued"),
    ("dvc exp show --only-changed --no-pager", 0, "^ +main"),
    ("dvc repro", None, STARTED),
    ("dvc repro --pull --allow-missing", None, "up to date|Running stage"),
    ("dvc pull", 1, "no default remote"),
    ("dvc push", 1, "no remote"),
    ("dvc metrics show", 0, "quality.json"),
    ("dvc metrics diff HEAD", 0, ""),
    ("dvc params diff HEAD", 0, ""),
    ("dvc plots show", 0, "index.html"),
    ("dvc dag", 0, "finetune"),
    ("dvc checkout", 255, "models/base"),
    ("python -m stages.params", 0, ""),
    ("python -m stages.params --strict", 0, ""),
    ("python -m stages.fetch", 1, "^fetch: cannot download"),
    ("lab", 2, "Commands"),
    ("lab --help", 0, "Commands"),
    ("lab chat --device webgpu hello", 1, "dvc repro|dvc pull"),
    ("dvc exp run -S optimize=webgpu_int4", None, STARTED),
    ("dvc exp run -S optimize=dml_int4", None, STARTED),
    ("dvc exp run -S optimize=trt_rtx_int4", None, STARTED),
    ("dvc exp run -S optimize=qnn", 255, "Olive's recipes do"),
    ("lab chat hello", 1, "dvc repro|dvc pull"),
    ("lab serve --device webgpu", 1, "dvc repro|dvc pull"),
    ("lab serve", 1, "dvc repro|dvc pull"),
    ("lab adapt my-peft-adapter", 1, "dvc repro optimize|dvc pull"),
    ("lab merge", 2, "--out"),
    ("lab merge --out merged", 1, "^lab: models/quantized is not here: run `dvc repro quantize`"),
    ("lab merge my-peft-adapter --out merged", 1, "dvc repro quantize"),
    ("lab bake", 2, "--out"),
    ("lab bake --out travel", 1, "^lab: models/onnx holds no ONNX model: run `dvc repro`"),
    ("lab bake --out travel --page", 1, "^lab: models/onnx holds no ONNX model: run `dvc repro`"),
    ("lab bake my-peft-adapter --out travel", 1, "dvc repro"),
    ("lab benchmark", 1, "^lab: models/base is not here: run `dvc repro` or `dvc pull` first"),
    ("lab benchmark --task words --limit 500 --json words.json", 1, "dvc repro"),
    ("lab benchmark --task lambada_openai --online", 1, "dvc repro"),
    ("lab review", 0, "."),
    ("lab results", 0, "^recall_exact_match"),
    ("lab review --stages", None, "dvc.lock (matches|is out of date)"),  # the latter amid an edit
    (
        "lab noise",
        1,
        "^lab: (models/base is not in DVC's cache|dvc.lock is out of date)",
    ),
    ("lab search", 1, "^lab: nothing to search"),
    ("lab search finetune.rnk=8 --maximize chrf", 1, r"^lab: finetune\.rnk=8: .*did you mean"),
    (
        "lab search finetune.rank=8,16,32 --maximize chrf --under onnx_mb=80",
        1,
        "^lab: (models/base is not in DVC's cache|dvc.lock is out of date)",
    ),
    ("lab watch", 0, "^nothing runs here, and nothing did"),
    ("lab watch bold-fish", 1, "^lab: bold-fish is no run that was seen here"),
    ("lab exp", 0, "."),
    ("lab promote bold-fish", 1, "git does not know who you are"),
    ("lab run -S finetune.max_steps=200", 1, NO_REMOTE),
    ("lab run -S finetune.max_step=200", 1, "finetune"),
    ("lab dvc push", 1, NO_REMOTE),
    ("lab dvc pull", 1, NO_REMOTE),
    ("lab dvc repro --pull --allow-missing", None, "up to date|Running stage"),
    ("lab doctor", 1, "WRONG sign-in +the remote is not set up"),
    ("lab fsck", 1, NO_REMOTE),
    ("lab remote", 2, "setup"),
    ("lab remote setup", 1, "--account is missing"),
    ("lab remote setup --account mylab --container c", 1, "--sign-in is missing"),
    ("lab submit -S finetune.max_steps=200", 1, NO_WORKSPACE),
    ("lab submit --sweep finetune.rank=8,16,32", 1, NO_WORKSPACE),
    ("lab submit --gpus 2", 1, NO_WORKSPACE),
    ("lab submit --nodes 2", 1, "^lab: --nodes is 2, but a stage runs on one node"),
    ("lab jobs", 1, NO_WORKSPACE),
    ("lab cancel some-job", 1, NO_WORKSPACE),
    ("lab register", 1, "models/onnx is not here"),
    ("lab download ft-for-travel", 1, NO_WORKSPACE),
    ("lab deploy", 1, "^lab: which model"),
    ("lab deploy ft-for-travel", 1, NO_WORKSPACE),
    ("lab deploy ft-for-travel --status", 1, NO_WORKSPACE),
    ("lab deploy ft-for-travel --rollback", 1, NO_WORKSPACE),
    ("lab deploy ft-for-travel --delete", 1, NO_WORKSPACE),
    ("lab deploy --folder server", 0, "^server is written"),
    ("lab deploy --local", 1, "^lab: models holds no ONNX model"),
    ("lab nonsense", 2, "nonsense"),
]


@pytest.mark.parametrize(("command", "exits", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_as_the_first_command_on_a_fresh_clone(command, exits, words, newcomer):
    said = newcomer.says(command, words, exits)
    assert re.search(words, said, re.MULTILINE), said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_lab_command_has_help(command, newcomer):
    said = newcomer.says(f"lab {command} --help", "", 0)
    assert "sage: " in said
    assert "Traceback" not in said


def test_every_lab_command_is_tried():
    tried = {row[0].split()[1] for row in ROWS if row[0].startswith("lab ")}
    assert set(COMMANDS) <= tried


@pytest.mark.parametrize("account", ["account_name = somelab", "connection_string = {dead}"])
def test_an_experiment_starts_though_its_remote_cannot_be_reached(account, newcomer, dead_port):
    dead = emulator.connection_string(dead_port)
    (newcomer.root / ".dvc/config.local").write_text(
        f"[core]\nremote = azure\n['remote \"azure\"']\n{account.format(dead=dead)}\n"
    )
    if not newcomer.alone and "somelab" in account:
        pytest.skip("an account of that name may exist, and the network cannot be taken away here")
    said = newcomer.says(f"dvc exp run {TINY}", STARTED, None)
    assert STARTED in said
    assert said.count("lab: going on without the remote: ") == 1
