"""What DVC's remote costs beside the bare upload: push, pull, no-op and changed-only, by artefact size.

    make repro && python -m benchmarks.remote            # 10 and 200 MB; needs Node.js, for Azurite
    python -m benchmarks.remote --megabytes 10 200 2000         # a quarter of an hour, 25 GB of disk

The peer is azure-storage-blob itself, on the same files, in a process of its own as well. Ours and the
peer's take turns within a run, each with its best number of connections, so the ratio is fair on a busy
machine. Azurite runs on the same cores: seconds say little about Azure, ratios more. What `dvc repro` costs
when nothing changed is measured on these artefacts and on the real pipeline of this clone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from azure.storage.blob import ContainerClient

from benchmarks.machine import ROOT, installed, keep
from lab.remote import azurite
from stages.core.errors import UserError
from stages.core.running import one_line_errors

JOBS = (1, 4, 16)
LARGE = 1000  # megabytes from which on there is one turn, with LARGE_JOBS alone
LARGE_JOBS = (16,)  # what .dvc/config says
TURNS = 7  # of dvc repro and dvc status, which take well under a second on small artefacts
PORT = 10970
SMALL_SHARE = 20  # the changed stage writes a twentieth, as an adapter beside its base
WRITE_PY = """\
import os, sys
from pathlib import Path

folder, size = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
files = {f"{number}.bin": size // 80 for number in range(8)}  # like a model's: one large, some small
for name, share in {"model.bin": size - sum(files.values()), **files}.items():
    with (folder / name).open("wb") as stream:
        while (left := share - stream.tell()) > 0:
            stream.write(os.urandom(min(left, 2**24)))
"""
DVC_YAML = """\
stages:
  base:
    cmd: python write.py models/base {large}
    outs: [models/base]
  adapter:
    cmd: python write.py models/adapter {small}
    params: [seed]
    outs: [models/adapter]
"""
Figures = dict[str, Any]


def main() -> None:
    """Measure every size and keep the figures."""
    options = parse_arguments()
    with one_line_errors("benchmark"):
        need_finished_pipeline(ROOT)
        measure(options.megabytes, options.repeats)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 200])
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def measure(sizes: list[int], repeats: int) -> None:
    """Start an Azurite, measure each size beside it, keep the figures."""
    packages = ("dvc", "dvc-azure", "adlfs", "azure-storage-blob")
    figures: Figures = {name: installed(name) for name in packages}
    with tempfile.TemporaryDirectory() as scratch:
        figures["pipeline_no_op_repro"] = no_op_repro(Laboratory(Path(scratch)), TURNS, ROOT)
    program = azurite.install(ROOT / azurite.HOME)
    for megabytes in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            service = azurite.serve(program, Path(scratch, "azurite"), PORT, own_session=False)
            try:
                figures[f"{megabytes}_mb"] = measure_size(Path(scratch), megabytes, repeats)
            finally:
                service.kill()
                service.wait()
        print(megabytes, "MB", json.dumps(figures[f"{megabytes}_mb"]), flush=True)
        keep("remote", figures)  # after each size, as the large ones take long


def measure_size(folder: Path, megabytes: int, repeats: int) -> Figures:
    """Return seconds of ours and of the peer, and their ratio, for each way to use the remote."""
    lab = Laboratory(folder)
    lab.make(megabytes)
    repeats, jobs = (1, LARGE_JOBS) if megabytes >= LARGE else (repeats, JOBS)
    contests = {
        name: compare(lab, name, repeats, jobs) for name in ("push", "pull", "no_op", "changed")
    }
    return {"repeats": repeats, **contests, "no_op_repro": no_op_repro(lab, TURNS, lab.source)}


class Laboratory:
    """A repository with artefacts of a given size, and everything that is done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        self.seed = 0

    def make(self, megabytes: int) -> None:
        """Make the repository and run its pipeline."""
        small = megabytes * 10**6 // SMALL_SHARE
        self.source.mkdir()
        words = {"large": megabytes * 10**6 - small, "small": small}
        (self.source / "dvc.yaml").write_text(DVC_YAML.format(**words), encoding="utf-8")
        (self.source / "write.py").write_text(WRITE_PY, encoding="utf-8")
        (self.source / ".gitignore").write_text("/models/\n", encoding="utf-8")
        self.change()
        self.run("git", "init", "--quiet")
        self.run("dvc", "init", "--quiet")
        shutil.copy(ROOT / ".dvc/config", self.source / ".dvc/config")
        self.run("dvc", "config", "hydra.enabled", "false")
        self.run("dvc", "repro")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "artefacts")

    def change(self) -> None:
        """Change the parameter of the small stage."""
        self.seed += 1
        (self.source / "params.yaml").write_text(f"seed: {self.seed}\n", encoding="utf-8")

    def fresh_remote(self) -> str:
        """Create an empty container and point the repository at it."""
        name = f"bench-{uuid.uuid4().hex[:12]}"
        container(name).create_container()
        (self.source / ".dvc/config.local").write_text(settings(name), encoding="utf-8")
        return name

    def clone(self, remote: str) -> Path:
        """Return a clone with an empty cache."""
        clone = self.folder / f"clone-{uuid.uuid4().hex[:6]}"
        self.run("git", "clone", "--quiet", str(self.source), str(clone))
        (clone / ".dvc/config.local").write_text(settings(remote), encoding="utf-8")
        return clone

    def run(self, *words: str, folder: Path | None = None, **environment: str) -> float:
        """Run a command and return its seconds."""
        caches = {"DVC_SITE_CACHE_DIR": str(self.folder / "site")}
        who = {
            f"GIT_{who}_{what}": "bench"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        started = time.perf_counter()
        subprocess.run(
            words,
            cwd=folder or self.source,
            env=os.environ | caches | who | path | environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - started

    def peer(self, part: str, remote: str, folder: Path, jobs: int) -> float:
        """Run the peer's part in a process of its own and return its seconds."""
        words = [sys.executable, str(ROOT / "benchmarks/peer_blobs.py"), part, remote]
        sign_in = {"AZURE_STORAGE_CONNECTION_STRING": azurite.connection_string(PORT)}
        return self.run(*words, str(folder), str(jobs), **sign_in)

    # One contest each: seconds of ours, seconds of the peer, with as many connections.

    def push(self, jobs: int) -> tuple[float, float]:
        """Send everything to an empty remote."""
        self.fresh_remote()
        ours = self.run("dvc", "push", "--jobs", str(jobs))
        remote = self.fresh_remote()
        return ours, self.peer("upload", remote, self.source / "models", jobs)

    def pull(self, jobs: int) -> tuple[float, float]:
        """Fetch everything into an empty clone; ours also verifies and fills cache and workspace."""
        remote = self.fresh_remote()
        self.run("dvc", "push")
        clone = self.clone(remote)
        ours = self.run("dvc", "pull", "--jobs", str(jobs), folder=clone)
        shutil.rmtree(clone)
        theirs = self.peer("download", remote, self.folder / "downloaded", jobs)
        shutil.rmtree(self.folder / "downloaded")
        return ours, theirs

    def no_op(self, jobs: int) -> tuple[float, float]:
        """Push when all is there; the peer lists the container."""
        remote = self.fresh_remote()
        self.run("dvc", "push")
        ours = self.run("dvc", "push", "--jobs", str(jobs))
        return ours, self.peer("list", remote, self.source, jobs)

    def changed(self, jobs: int) -> tuple[float, float]:
        """Push after the small stage changed; the peer sends its files."""
        self.fresh_remote()
        self.run("dvc", "push")
        self.change()
        self.run("dvc", "repro")
        ours = self.run("dvc", "push", "--jobs", str(jobs))
        return ours, self.peer("upload", self.fresh_remote(), self.source / "models/adapter", jobs)


def compare(lab: Laboratory, contest: str, repeats: int, jobs_to_try: tuple[int, ...]) -> Figures:
    """Return the median seconds of both at their own best number of connections, and the ratio."""
    attempt: Callable[[int], tuple[float, float]] = getattr(lab, contest)
    runs = {jobs: [attempt(jobs) for _ in range(repeats)] for jobs in jobs_to_try}
    ours, theirs = (
        {jobs: statistics.median(run[side] for run in seconds) for jobs, seconds in runs.items()}
        for side in (0, 1)
    )
    jobs, peer_jobs = (min(medians, key=medians.get) for medians in (ours, theirs))
    return {
        "dvc_s": round(ours[jobs], 2),
        "dvc_jobs": jobs,
        "dvc_s_by_jobs": {number: round(seconds, 2) for number, seconds in ours.items()},
        "azure_storage_blob_s": round(theirs[peer_jobs], 2),
        "azure_storage_blob_jobs": peer_jobs,
        "ratio": round(ours[jobs] / theirs[peer_jobs], 2),
    }


def need_finished_pipeline(folder: Path) -> None:
    """Raise unless `dvc repro` would find nothing to do in a folder."""
    if subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"], cwd=folder).returncode:
        raise UserError(f"the pipeline in {folder} is not up to date: make repro, then again")


def no_op_repro(lab: Laboratory, turns: int, folder: Path) -> Figures:
    """Return the seconds of `dvc repro` and of `dvc status`, taking turns, when nothing changed."""
    words = (("dvc", "repro"), ("dvc", "status"))
    lab.run(*words[0], folder=folder)  # what only the first one does is not counted
    pairs = [[lab.run(*each, folder=folder) for each in words] for _ in range(turns)]
    repro, status = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "turns": turns,
        "repro_s": round(repro, 2),
        "status_s": round(status, 2),
        "ratio": round(repro / status, 2),
    }


def container(name: str) -> ContainerClient:
    """Return azure-storage-blob's own client, as its manual makes it."""
    return ContainerClient.from_connection_string(azurite.connection_string(PORT), name)


def settings(name: str) -> str:
    """Return a .dvc/config.local that names a container of the benchmark's Azurite."""
    words = azurite.connection_string(PORT)
    return f"['remote \"azure\"']\n    url = azure://{name}\n    connection_string = {words}\n"


if __name__ == "__main__":
    main()
