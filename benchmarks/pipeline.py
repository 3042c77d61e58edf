"""What a run of the whole pipeline took on a quiet machine, and how much its .venv fills.

    python -m benchmarks.pipeline 6549935        # a commit whose metrics/ are of a quiet machine

Speeds and seconds of metrics/ are those of the last run, whatever else ran beside it; README quotes those of
one commit. Writes benchmarks/results/pipeline_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, keep
from stages.core.files import size_of


def main() -> None:
    """Keep a commit's speed and costs, and the size of the .venv that this runs in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    commit = parser.parse_args().commit
    run = {"commit": commit, "speed": of(commit, "speed"), "costs": of(commit, "costs")}
    keep("pipeline_cpu", {"run": run, "venv_gb": round(size_of(Path(sys.prefix)) / 1e9, 1)})


def of(commit: str, name: str) -> dict[str, Any]:
    """Return what a file of metrics/ holds in a commit."""
    command = ["git", "-C", str(ROOT), "show", f"{commit}:metrics/{name}.json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()
