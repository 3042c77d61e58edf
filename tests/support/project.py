"""Clones of the working tree, with a git repository, a DVC cache and settings of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.processes import output_of

ROOT = Path(__file__).resolve().parents[2]


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


def left_behind(project: Project) -> list[str]:
    """Return the half-written files and folders that a stage forgot."""
    return [str(p) for p in project.root.rglob("*.tmp") if ".dvc" not in p.parts]


def stages_that_ran(output: str) -> list[str]:
    """Return the stages that DVC says it ran."""
    return re.findall(r"Running stage '([\w@]+)'", output)


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
    shutil.copy(ROOT / "tests/support/shrunk.yaml", root / "conf/experiment/shrunk.yaml")
    project.replace("conf/config.yaml", "- experiment: null", "- experiment: shrunk")
    project.python("stages.params")
    project.commit()
    return project
