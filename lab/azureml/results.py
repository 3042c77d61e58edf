"""What a finished job gives back: dvc.lock, params.yaml and metrics, as a DVC experiment.

Nothing is computed. The experiment is named like the job, so `dvc exp show` compares it. `bring_here`
writes it into the workspace and pulls only those outputs that lie there in another version, where
`dvc exp apply` insists on all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from lab import run
from lab.azureml.datastore import Datastore
from lab.git import git_output
from stages.core.errors import UserError

FOLDER = "olive-lab/jobs"  # in the datastore


def read(store: Datastore, job: str) -> dict[str, bytes]:
    """Return the results of a job by their paths in the repository."""
    files = store.read(f"{FOLDER}/{job}")
    if "dvc.lock" not in files:
        raise UserError(f"job {job} left no results: it has not finished, or failed (lab jobs)")
    return files


def metrics(store: Datastore, job: str) -> dict[str, float]:
    """Return the quality metrics of a job."""
    blob = f"{FOLDER}/{job}/metrics/quality.json"
    return json.loads(store.read_one(blob) or "{}")


def save_experiment(job: str, baseline: str, files: dict[str, bytes]) -> None:
    """Commit what the job started from and its results as an experiment on top of `baseline`."""
    from dvc.repo.experiments.refs import ExpRefInfo

    with tempfile.TemporaryDirectory() as folder:
        index = {**os.environ, "GIT_INDEX_FILE": f"{folder}/index"}
        plumb(index, "read-tree", started_from(job, baseline))
        for name, data in files.items():
            blob = plumb(index, "hash-object", "-w", "--stdin", data=data)
            plumb(index, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
        tree = plumb(index, "write-tree")
    commit = plumb(os.environ, "commit-tree", tree, "-p", baseline, "-m", f"lab submit: {job}")
    git_output("update-ref", str(ExpRefInfo(baseline, job)), commit)


def started_from(job: str, baseline: str) -> str:
    """Return the state that was submitted; on another machine only its commit is known."""
    kept = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"refs/lab/{job}"], capture_output=True
    )
    return f"refs/lab/{job}" if kept.returncode == 0 else baseline


def plumb(environment: Mapping[str, str], *words: str, data: bytes | None = None) -> str:
    """Run a git command with an index of its own; return what it printed."""
    done = subprocess.run(["git", *words], env=environment, input=data, capture_output=True)
    if done.returncode:
        raise UserError(f"git {words[0]}: {done.stderr.decode().strip()}")
    return done.stdout.decode().strip()


def bring_here(job: str, files: dict[str, bytes]) -> None:
    """Write the results into the workspace, and pull the outputs that lie here in another version.

    Raises `UserError` before it would overwrite what git has never seen.
    """
    if lost := [name for name in files if Path(name).exists() and not is_in_git(name)]:
        raise UserError(
            f"{', '.join(lost)} changed here meanwhile: commit, then lab jobs --restore {job}"
        )
    with put_back_on_error(Path("dvc.lock")) as lock:
        before = outputs(lock) if lock else {}
        for name, data in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(data)
        changed = [
            path
            for path, md5 in outputs(files["dvc.lock"]).items()
            if before.get(path) != md5 and Path(path).exists() and path not in files
        ]
        if changed:
            pull(job, changed)


def pull(job: str, paths: list[str]) -> None:
    """Pull outputs of a job's results."""
    try:
        run.dvc("pull", "--force", *paths)
    except UserError:
        raise UserError(
            f"dvc pull failed (above), so {job} is here in part: lab jobs --restore {job} tries again"
        ) from None


@contextlib.contextmanager
def put_back_on_error(file: Path) -> Iterator[bytes | None]:
    """Yield what a file holds, and write that back if something fails, so that a retry starts afresh."""
    before = file.read_bytes() if file.exists() else None
    try:
        yield before
    except BaseException:
        file.unlink(missing_ok=True) if before is None else file.write_bytes(before)
        raise


def is_in_git(name: str) -> bool:
    """Say whether a file's content is kept in a commit, a stash or an experiment."""
    blob = plumb(os.environ, "hash-object", name)
    return subprocess.run(["git", "cat-file", "-e", blob], capture_output=True).returncode == 0


def outputs(lock: bytes) -> dict[str, str]:
    """Return the hash of every output that a dvc.lock names."""
    stages = yaml.safe_load(lock)["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
