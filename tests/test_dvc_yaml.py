"""dvc.yaml keeps the rules that make its stages restorable, and every setting is somebody's input."""

import ast
import importlib.util
from pathlib import Path

import pytest
import yaml

from support.project import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CHEAP = {
    "params",
    "report",
}  # the only stages whose outputs git tracks, so that DVC cannot restore them
# how a stage runs, fails, signs in and finds its files, and whether a result holds: nothing that it could
# depend on (a better sentence about a failed sign-in must not fetch gigabytes again)
NO_RESULT_DEPENDS_ON = ("core", "answers.proof")
ELSEWHERE = ("models/.",)  # checkpoints of an unfinished training: no output
NOBODYS_INPUT = {
    "model.group_size": "only the default of quantize.group_size",
    "seed": "only the default of the sections' own seeds",
    "evaluate.gates": "judged in review, changes no output",
    "evaluate.benchmark": "what `lab benchmark` asks, which is no stage",
}


def outputs(stage: dict) -> dict[str, dict]:
    """Return a stage's outputs of every kind with their options."""
    listed = [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
    return {
        k: v for out in listed for k, v in (out if isinstance(out, dict) else {out: {}}).items()
    }


def test_only_the_cheap_stages_have_outputs_outside_the_cache():
    uncached = {
        name
        for name, stage in STAGES.items()
        if any(options.get("cache") is False for options in outputs(stage).values())
    }
    assert uncached == CHEAP


def test_no_expensive_stage_keeps_outputs_between_runs_or_always_runs():
    for name in STAGES.keys() - CHEAP:
        assert not STAGES[name].get("always_changed"), name
        assert not any(o.get("persist") for o in outputs(STAGES[name]).values()), name


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_the_module_of_its_name_and_depends_on_it(name):
    assert STAGES[name]["cmd"] == f"python -m stages.{name}"
    assert f"stages/{name}.py" in STAGES[name]["deps"]
    assert importlib.util.find_spec(f"stages.{name}") is not None


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_cost_is_an_output_of_its_own(name):
    cost = f"metrics/speed/{name}.json"
    assert (cost in outputs(STAGES[name])) == (name not in CHEAP)
    assert (cost in STAGES["report"]["deps"]) == (name not in CHEAP)


@pytest.mark.parametrize("name", STAGES)
def test_the_code_that_a_stage_depends_on_exists(name):
    code = [dep for dep in STAGES[name]["deps"] if dep.startswith(("stages/", "lab/"))]
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


def imported(module: str) -> set[str]:
    """Return the modules of stages/ that a module imports, directly or through others, itself included."""
    found, left = set(), [module]
    while left:
        name = left.pop()
        if name not in found and not f"{name}.".startswith(
            tuple(f"{n}." for n in NO_RESULT_DEPENDS_ON)
        ):
            found.add(name)
            left += imports_of(ROOT / f"stages/{name.replace('.', '/')}.py")
    return found


def imports_of(file: Path) -> list[str]:
    """Return the modules of stages/ that stand in a file's import statements."""
    statements = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    names = [n.module for n in statements if (n.module or "").startswith("stages.")]
    # `from stages.sources import loadable` names a module, `from stages.text.chats import Row` does not
    names += [f"{n.module}.{a.name}" for n in statements for a in n.names]
    return [
        name.removeprefix("stages.")
        for name in names
        if name.startswith("stages.") and (ROOT / f"{name.replace('.', '/')}.py").is_file()
    ]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_code_that_its_results_depend_on(name):
    listed = {dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    needed = {f"stages/{module.replace('.', '/')}.py" for module in imported(name)}
    assert {file for file in needed if not is_within(file, listed)} == set()


def is_within(file: str, listed: set[str]) -> bool:
    """Say whether a file, or a folder that it lies in, is listed."""
    return any(f"{file}/".startswith(f"{dep}/") for dep in listed)


def test_every_setting_is_a_dependency_or_known_to_need_none(params):
    watched = {key for stage in STAGES.values() for key in stage.get("params", [])}
    unwatched = [key for key in leaves(params) if not is_watched(key, watched)]
    assert [key for key in unwatched if not is_watched(key, NOBODYS_INPUT.keys())] == []
    assert not NOBODYS_INPUT.keys() & watched


def test_every_watched_setting_exists(params):
    for key in {key for stage in STAGES.values() for key in stage.get("params", [])}:
        value = params
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_no_setting_has_a_name_that_the_run_cache_leaves_out(params):
    """DVC drops every key `size` and `nfiles` from the run cache's key, parameters included.

    A stage whose parameter is named so gets another value's results back, silently.
    """
    names = {part for key in leaves(params) for part in key.split(".")}
    assert names.isdisjoint({"size", "nfiles"})


def leaves(settings: dict, above: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for key, value in settings.items():
        deeper = isinstance(value, dict)
        names += leaves(value, f"{above}{key}.") if deeper else [f"{above}{key}"]
    return names


def is_watched(key: str, watched: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:length]) in watched for length in range(1, len(parts) + 1))


def test_every_path_that_a_stage_names_is_its_dependency_or_output():
    for name, stage in STAGES.items():
        listed = [*stage["deps"], *outputs(stage)]
        paths = paths_in(ROOT / f"stages/{name}.py")
        strange = [p for p in paths if not any(f"{p}/".startswith(f"{d}/") for d in listed)]
        assert [p for p in strange if not p.startswith(ELSEWHERE)] == [], name


def paths_in(file: Path) -> list[str]:
    """Return the paths below models/, data/ and metrics/ that stand in a file as `Path("…")`."""
    calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
    named = [
        c.args[0].value
        for c in calls
        if getattr(c.func, "id", "") == "Path" and c.args and isinstance(c.args[0], ast.Constant)
    ]
    return [path for path in named if path.startswith(("models/", "data/", "metrics/"))]


def test_the_graph_does_not_depend_on_the_training():
    assert [k for k in STAGES["optimize"]["params"] if k.startswith("finetune")] == [
        "finetune.target_modules"
    ]
    assert not {"models/adapter", "data/prepared"} & set(STAGES["optimize"]["deps"])
