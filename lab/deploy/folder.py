"""The container's build context: a Dockerfile, pinned packages and the modules that the server imports.

    write(Path("server"))       # all or nothing; the same code gives the same bytes

The folder knows nothing of Azure, of this machine and of any model: that is mounted when it runs.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from stages.core.errors import UserError
from stages.core.files import written_beside

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENTRY = "lab/deploy/server.py"
OURS = ("lab", "stages")
LOCKS = ("cpu.txt", "serve.txt")
AS_THEY_ARE = {"Dockerfile": "Dockerfile", "compose.yaml": "compose.yaml", "README.md": "folder.md"}
LIST = "files.sha256"
# never imported by the server: what stages load tokenizers with and run in, and fsspec's remote files
NOT_NEEDED = {"transformers", "torch", "aiohttp"}


def write(folder: Path) -> bool:
    """Write the context to a folder; return whether anything had to be written.

    Raises `UserError` for a folder that holds anything but what this wrote, or a lock that is not here.
    """
    files = contents()
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        check_is_ours(folder)
        if read(folder) == files:
            return False
    with written_beside(folder) as beside:
        for name, data in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(data)
    return True


def contents() -> dict[str, bytes]:
    """Return all files by their names, the list of their hashes last."""
    modules = modules_of(ENTRY)
    files = {name: (HERE / source).read_bytes() for name, source in AS_THEY_ARE.items()}
    files["requirements.txt"] = "".join(f"{line}\n" for line in pins(imported_by(modules))).encode()
    files |= {f"app/{name}": (ROOT / name).read_bytes() for name in sorted(modules)}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    files[LIST] = "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()
    return files


def digest(files: dict[str, bytes]) -> str:
    """Return one hash of a context."""
    return hashlib.sha256(files[LIST]).hexdigest()


def read(folder: Path) -> dict[str, bytes]:
    """Return a folder's files by their names, less what Python leaves behind."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.parent.name != "__pycache__"
    }


def check_is_ours(folder: Path) -> None:
    """Raise `UserError` unless a folder holds what an earlier `write` left there, unchanged."""
    found = read(folder) if folder.is_dir() else {}
    lines = found.pop(LIST, b"").decode(errors="replace").splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    strange = [n for n, data in found.items() if listed.get(n) != hashlib.sha256(data).hexdigest()]
    if strange or not listed:
        what = (
            f"{strange[0]} in it is not as lab deploy wrote it"
            if strange
            else "it is not of lab deploy"
        )
        raise UserError(f"{folder} is not replaced, as {what}: name a new or an empty folder")


def modules_of(entry: str) -> set[str]:
    """Return the files of ours that a module imports, directly or through others, with what they read."""
    found: set[str] = set()
    left = [entry]
    while left:
        if (name := left.pop()) in found:
            continue
        found.add(name)
        for parent in list(Path(name).parents)[:-1]:
            left.append((parent / "__init__.py").as_posix())
        if not name.endswith(".py"):
            continue
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        left += [file for module in imports(tree) for file in files_of(module)]
        left += [(Path(name).parent / beside).as_posix() for beside in files_beside(name, tree)]
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports when it runs, those for type hints alone aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def files_of(module: str) -> list[str]:
    """Return the file of a module of ours; none for another's, or for a name in a module."""
    path = module.replace(".", "/")
    names = [f"{path}.py", f"{path}/__init__.py"] if module.split(".")[0] in OURS else []
    return [name for name in names if (ROOT / name).is_file()]


def files_beside(name: str, tree: ast.AST) -> list[str]:
    """Return the files that a module names and that lie beside it, such as a page."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [
        text
        for text in texts
        if isinstance(text, str)
        and re.fullmatch(r"[\w-]+\.(html|css|json|j2|c|cu)", text)
        and (ROOT / name).with_name(text).is_file()
    ]


def imported_by(modules: set[str]) -> set[str]:
    """Return the packages of others that modules import, as the lock names them."""
    found = set()
    for name in modules:
        if name.endswith(".py"):
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            found |= {module.split(".")[0] for module in imports(tree)}
    return {plain(name) for name in found - set(OURS)}


def pins(wanted: set[str]) -> list[str]:
    """Return the lock's lines of some packages and of all that they need; modules of Python itself have none.

    Raises `UserError` where the lock is not here.
    """
    locked, users = read_locks()
    needed = wanted & set(locked) - NOT_NEEDED
    while more := {name for name, by in users.items() if by & needed} - needed - NOT_NEEDED:
        needed |= more
    return [f"{name}=={locked[name]}" for name in sorted(needed)]


def read_locks() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Return each package's version, and which packages need it."""
    locked: dict[str, str] = {}
    users: dict[str, set[str]] = {}
    for lock in LOCKS:
        file = ROOT / "requirements" / lock
        if not file.is_file():
            raise UserError(f"{file.name} of requirements/ is not here: run lab deploy in a clone")
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"([\w.-]+)==(\S+?)\s*# via (.*)", line):
                name, locked[plain(match[1])], by = plain(match[1]), match[2], match[3]
                users.setdefault(name, set()).update(plain(each) for each in by.split(", "))
    return locked, users


def plain(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
