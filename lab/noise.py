"""Measure training noise: what a metric does when nothing but the seed of the training changes.

lab noise                                            # this commit under 5 seeds, its own included
lab noise --seeds 8                                  # three more, if five are there already
lab submit --sweep finetune.seed=43,44,45,46         # or on a cluster; then lab noise collects them

Each seed is an experiment of this commit (`dvc exp run --temp -S finetune.seed=…`), which leaves the
workspace alone: what one has run is in the cache, so that the same command continues after Ctrl-C. The
spread of every metric goes to metrics/noise.json, by which `lab review` knows what seeds could explain.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import networkx
import typer
from dvc.repo import Repo
from dvc.stage import Stage

from lab import run
from lab.azureml.sweep import watches
from lab.git import git_output, need_commit
from lab.review.meanings import is_timing
from lab.review.revisions import NOISE, Revision
from lab.review.seeds import spread
from lab.review.stages import out_of_date
from stages.core.errors import UserError
from stages.core.files import write_json
from stages.core.settings import PARAMS
from stages.params import compose, flat, text_of, values_of

SEED = "finetune.seed"
RESULTS = ("params.yaml", "dvc.lock", "metrics")  # what an experiment of another seed may differ in
LINE = "{:<30} {:>9} {:>9} {:>9} {:>9}"


def noise(
    seeds: Annotated[int, typer.Option(min=2, help="How many, this commit's included.")] = 5,
) -> None:
    """Measure what another training seed does to the metrics. Writes metrics/noise.json."""
    need_commit()
    if not Path("dvc.yaml").is_file():
        raise UserError("no dvc.yaml here: run it in the repository's root")
    check_ready({SEED})
    head = Revision("HEAD")
    runs = finished(head)
    numbers = (seed for seed in count(head.params[SEED] + 1) if seed not in runs)
    short = git_output("rev-parse", "--short", "HEAD")
    for seed in [next(numbers) for _ in range(seeds - len(runs))]:
        run.dvc("exp", "run", "--temp", "--name", f"seed-{seed}-{short}", "-S", f"{SEED}={seed}")
        runs = finished(head)
        if seed not in runs:
            raise UserError(f"experiment seed-{seed}-{short} left no results: `lab exp` shows it")
    chosen = dict(list(runs.items())[:seeds])
    found = measured(chosen) | {"commit": short}
    write_json(Path(NOISE), found)
    print("\n".join(table(found)))


def check_ready(keys: Collection[str]) -> None:
    """Raise `UserError` for what would make runs with other settings differ from this commit in more."""
    dirty = git_output("status", "--porcelain", "--untracked-files=no", "--", f":!{NOISE}")
    if dirty:
        changed = ", ".join(line[2:].strip() for line in dirty.splitlines()[:3])
        raise UserError(
            f"uncommitted changes ({changed}): commit them first, what runs starts from a commit"
        )
    if flat(values_of(compose())) != flat(values_of(text_of(PARAMS))):
        raise UserError(
            f"{PARAMS} is not what conf/ composes to, and each run composes anew: put its values "
            "into conf/, as `lab promote` does, and commit"
        )
    if stale := out_of_date():
        raise UserError(
            f"dvc.lock is out of date ({', '.join(each.stage for each in stale)}): `dvc repro`, then commit"
        )
    if missing := not_in_cache(keys):
        raise UserError(
            f"{missing[0]} is not in DVC's cache: run `dvc repro`, or `dvc pull`, first, "
            "lest every run makes it again"
        )


def not_in_cache(keys: Collection[str]) -> list[str]:
    """Return the results that do not depend on some settings, and that DVC's cache does not have."""
    with Repo() as repo:
        again = reruns(repo, keys)
        kept = [out for stage in repo.index.stages if stage.name not in again for out in stage.outs]
        return [str(out) for out in kept if out.use_cache and out.changed_cache()]


def reruns(repo: Repo, keys: Collection[str]) -> set[str]:
    """Return the stages that other values of some settings, or options of groups, run again."""
    first = [
        s for s in repo.index.stages if any(watches(s, key) or concerns(s, key) for key in keys)
    ]
    # DVC's graph points from a stage to what it needs
    after = [later for stage in first for later in networkx.ancestors(repo.index.graph, stage)]
    return {stage.name for stage in [*first, *after]}


def concerns(stage: Stage, group: str) -> bool:
    """Say whether a stage has a setting of a group of conf/ as an input."""
    watched = [name for dep in stage.params for name in getattr(dep, "params", [])]
    return any(name.startswith(f"{group}.") for name in watched)


def finished(head: Revision) -> dict[int, Revision]:
    """Return this commit's own run, then all its experiments that differ in the seed alone, by their seed."""
    runs = {head.params[SEED]: head}
    commit = git_output("rev-parse", "HEAD")
    place = f"refs/exps/{commit[:2]}/{commit[2:]}"
    for ref in sorted(git_output("for-each-ref", "--format=%(refname)", place).split()):
        found = Revision(ref)
        same = without_seed(found) == without_seed(head) and not edited(commit, ref)
        if same and found.metrics:
            runs.setdefault(found.params[SEED], found)
    return dict(sorted(runs.items(), key=lambda pair: (pair[1] is not head, pair[0])))


def without_seed(revision: Revision) -> dict[str, Any]:
    """Return a revision's parameters but for the seed of the training."""
    return {key: value for key, value in revision.params.items() if key != SEED}


def edited(commit: str, ref: str) -> bool:
    """Say whether an experiment ran with other edits than of parameters."""
    changed = git_output("diff", "--name-only", "--relative", "-z", commit, ref, "--")
    files = filter(None, changed.split("\0"))
    return any(file.partition("/")[0] not in RESULTS for file in files)


def measured(runs: dict[int, Revision]) -> dict[str, Any]:
    """Return what metrics/noise.json holds of some runs: the spread of all metrics but timings."""
    every = [each.metrics for each in runs.values()]
    names = [name for name in every[0] if not is_timing(name) and all(name in m for m in every)]
    costs = [each.costs.get("finetune", {}) for each in runs.values()]
    machines = sorted({cost.get("machine", "not recorded") for cost in costs})
    return {
        "parameter": SEED,
        "seeds": list(runs),
        "machine": "; ".join(machines),
        "metrics": {name: spread([metrics[name] for metrics in every]) for name in names},
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the metrics that a seed moves, in lines of at most 80 columns."""
    lines = [LINE.format("", "mean", "deviation", "min", "max")]
    for name, values in found["metrics"].items():
        if values["min"] != values["max"]:
            cells = [values[key] for key in ("mean", "standard_deviation", "min", "max")]
            lines.append(LINE.format(name, *(f"{value:.4g}" for value in cells)))
    lines.append(f"{len(found['seeds'])} seeds of {found['commit']} on {found['machine']}")
    return [*lines, f"{NOISE} has all values: commit it, and `lab review` reckons with them"]
