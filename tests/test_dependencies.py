"""Every package that our code imports is declared: none is there by another package's grace."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from support.project import ROOT

CODE = [
    file for folder in ("stages", "lab", "hydra_plugins") for file in (ROOT / folder).rglob("*.py")
]
OURS = {"stages", "lab", "hydra_plugins"}
INSTALLED = packages_distributions()
# installed with PyTorch for CUDA, and imported only there
WITH_TORCH = {"triton"}


def imported(file: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }


def declared() -> set[str]:
    """Return the names of all packages that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [re.match(r"[\w.-]+", requirement)[0] for each in lists for requirement in each]
    return {plain(name) for name in names}


def plain(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_of(module: str) -> set[str]:
    """Return the packages that a module may come from; azure and ruamel are shared by many."""
    if module == "cuda.bindings":  # which machines without a GPU do not install
        return {plain(module)}
    if module.split(".")[0] == "lm_eval":  # an extra that `make setup` leaves out
        return {"lm-eval"}
    top, *below = module.split(".")
    found = {plain(name) for name in INSTALLED.get(top, [])}
    if top in ("azure", "ruamel"):
        name = "-".join([top, *below])
        found = {each for each in found if f"{name}-".startswith(f"{each}-")}
    return found


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_file_imports_is_declared(file):
    foreign = {
        module
        for module in imported(file)
        if module.split(".")[0] not in OURS | WITH_TORCH | set(sys.stdlib_module_names)
    }
    assert [module for module in sorted(foreign) if not packages_of(module) & declared()] == []
