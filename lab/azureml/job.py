"""What a submitted job runs on its node: `lab run`, and then the small results for the laptop.

python -m lab.azureml.job --result DIR [-S KEY=VALUE]... [STAGE]...      # written by lab submit

The node has the snapshot, the packages of the lock and a managed identity; the DVC remote has the rest.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from lab import run
from lab.azureml import curves
from lab.git import git_output
from stages.core.running import be_quiet, one_line_errors

RESULTS = ("dvc.lock", "params.yaml", "metrics")


def work(overrides: list[str], stages: list[str], result: Path) -> None:
    """Run what changed, push it, and put what git tracks of the results where the laptop finds it."""
    use_the_jobs_identity()
    make_repository()
    with curves.sent():
        run.run(overrides=overrides, name=None, jobs=None, stages=stages)
    collect(result)


def use_the_jobs_identity() -> None:
    """Choose the job's identity among those of its node, as Azure's libraries expect it."""
    if "DEFAULT_IDENTITY_CLIENT_ID" in os.environ:
        os.environ.setdefault("AZURE_CLIENT_ID", os.environ["DEFAULT_IDENTITY_CLIENT_ID"])


def make_repository() -> None:
    """Give the snapshot the git repository that `dvc exp run` needs; its history stays on the laptop."""
    if Path(".git").exists():
        return
    git_output("init", "--quiet")
    git_output("config", "user.name", "lab submit")
    git_output("config", "user.email", "lab-submit@localhost")
    git_output("add", "--all")
    git_output("commit", "--quiet", "--message", "Snapshot")


def collect(result: Path) -> None:
    """Copy dvc.lock, params.yaml and the metrics that git tracks."""
    listed = git_output("ls-files", "-coz", "--exclude-standard", "--", *RESULTS)
    for name in filter(None, listed.split("\0")):
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, result / name)


def main() -> None:
    """Read the command line, work, exit 1 with one line when the user can put it right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-S", dest="overrides", action="append", default=[])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("stages", nargs="*")
    options = parser.parse_args()
    be_quiet()
    with one_line_errors("job"):
        work(options.overrides, options.stages, options.result)


if __name__ == "__main__":
    main()
