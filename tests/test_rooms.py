"""The house keeps its rules: who may name a path, which room serves which stage, where imports may point."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MODULES = sorted(
    file.relative_to(ROOT)
    for package in ("stages", "lab")
    for file in (ROOT / package).rglob("*.py")
    if file.name != "__init__.py"
)
STAGES_MODULES = [file for file in MODULES if file.parts[0] == "stages"]


def imports_of(file: Path) -> set[str]:
    """Return the modules of this project that a file imports, as paths; those for type hints alone aside."""
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = Path(name.replace(".", "/")).with_suffix(".py")
                if path in MODULES:
                    found.add(path)
    return found


IMPORTS = {file: imports_of(file) for file in MODULES}


def room_of(file: Path) -> str:
    """Return the folder that a module lies in; a module right in stages/ or lab/ is a room of its own."""
    return file.parent.as_posix() if len(file.parts) > 2 else file.with_suffix("").as_posix()


def closure(file: Path) -> set[Path]:
    """Return all modules that a module imports, directly or through others."""
    found, left = set(), [file]
    while left:
        if (module := left.pop()) not in found:
            found.add(module)
            left += IMPORTS[module]
    return found


@pytest.mark.parametrize("file", [f for f in STAGES_MODULES if len(f.parts) > 2], ids=str)
def test_only_the_stage_modules_name_paths_of_dvc_yaml(file):
    tree = ast.parse((ROOT / file).read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings]
    named = [n.value for n in texts if str(n.value).startswith(("models/", "data/", "metrics/"))]
    assert named == []


def test_a_folder_that_a_stage_depends_on_serves_that_stage_alone():
    folders = defaultdict(set)
    for name, stage in STAGES.items():
        for dep in stage["deps"]:
            if dep.startswith("stages/") and (ROOT / dep).is_dir():
                folders[dep].add(name)
    users = defaultdict(set)
    for name in STAGES:
        for module in closure(Path(f"stages/{name}.py")):
            users[room_of(module)].add(name)
    assert folders
    for folder, listed in folders.items():
        assert len(listed) == 1, folder
        assert users[folder] == listed, folder


def test_the_rooms_import_in_one_direction_only():
    rooms = defaultdict(set)
    for file, imported in IMPORTS.items():
        rooms[room_of(file)] |= {room_of(other) for other in imported} - {room_of(file)}
    try:
        list(TopologicalSorter(rooms).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_no_module_imports_itself_through_others():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(map(str, error.args[1]))}")


@pytest.mark.parametrize("file", STAGES_MODULES, ids=str)
def test_no_import_points_back_up(file):
    """Stages import rooms, rooms import `core`, `core` imports nothing here but itself."""
    for other in IMPORTS[file]:
        assert other.parts[0] == "stages", f"{other} is a reader of results"
        if len(file.parts) > 2:
            assert len(other.parts) > 2, f"{other} is a stage"
        if room_of(file) == "stages/core":
            assert room_of(other) == "stages/core", f"{other} is not in stages/core"
