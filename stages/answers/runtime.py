"""Open a model in ONNX Runtime GenAI, and say in one line what is wrong with its folder or this machine.

config = read_config(folder, GRAPH)
model = open_model(folder, GRAPH)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import psutil

from stages.answers.devices import choose, explained, exported_for, need
from stages.core.errors import UserError
from stages.core.machine import usable_cores

if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
    onnxruntime.preload_dlls()  # CUDA's libraries lie in Python packages, where no loader looks

import onnxruntime_genai as og

if TYPE_CHECKING:
    from stages.answers.gpu_weights import Entry

GRAPH = "model.onnx"
# what the runtime says of files that were cut or edited; anything else is this machine's fault
DAMAGED = (
    "out of bounds|[Pp]arsing failed|JSON Error|failed to load external|[Nn]o such file|not exist"
)


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    ONNX Runtime's own count reads the processor's topology, which virtual machines often hide: it
    then decodes on one core of two.
    """
    usable = usable_cores()
    return min(psutil.cpu_count(logical=False) or usable, usable)


def open_model(
    folder: Path,
    graph: str,
    shared: list[Entry] | None = None,
    captured: bool = False,
    operators: str | None = None,
    device: str | None = None,
) -> og.Model:
    """Load one of a folder's graphs, with the library of `operators` that it needs, for a device or its own.

    On a GPU with the weights that are shared there, and if `captured` with decoding as one CUDA graph, which
    answers single prompts only. Raises `UserError` where it cannot run on this machine.
    """
    settings = read_config(folder, graph)
    device = choose(settings, device)
    need(device)
    options: dict[str, Any] = {"intra_op_num_threads": physical_cores()}
    if operators is not None:
        options["custom_ops_library"] = operators
    decoder: dict[str, Any] = {"filename": graph, "session_options": options}
    if shared is not None:
        decoder["shared_initializers"] = shared
    if captured:  # a token launches hundreds of small kernels: captured, they are launched as one
        options["provider_options"] = [{"cuda": {"enable_cuda_graph": "1"}}]
    try:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        if device != exported_for(settings):
            config.clear_providers()
            if device != "cpu":
                config.append_provider(device)
        return og.Model(config)
    except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
        reason = plain(error)
        if re.search(DAMAGED, reason):
            raise damaged(folder, reason) from None
        raise UserError(f"{folder} cannot run on this machine: {explained(reason)}") from None


def read_config(folder: Path, graph: str) -> dict[str, Any]:
    """Return what genai_config.json says of the model.

    Raises `UserError` for a folder that holds no such graph, links, or a file that was cut.
    """
    file = folder / "genai_config.json"
    if not file.is_file() or not (folder / graph).is_file():
        raise UserError(f"{folder} holds no ONNX model: run `dvc repro` or `dvc pull` first")
    refuse_links(folder)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{file.name}: {error}") from None


def damaged(folder: Path, reason: str) -> UserError:
    """Return the error for files that were cut or edited."""
    return UserError(
        f"{folder} is damaged or incomplete ({reason}): `dvc checkout --force` brings DVC's files "
        "back, copy others again"
    )


def plain(error: Exception) -> str:
    """Return a message of ONNX Runtime in one line, without the places in its C++ source."""
    text = " ".join(str(error).split())
    return re.sub(r"\S+\.(cc|h|cpp):\d+ (\w+ )?", "", text).strip() or type(error).__name__


def refuse_links(folder: Path) -> None:
    """Raise `UserError` where files are links, as some values of DVC's cache.type make them."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() or (file.is_file() and file.stat().st_nlink > 1):
            raise UserError(
                f"{file} is a link, which ONNX Runtime refuses to read: "
                "`dvc config --local cache.type reflink,copy`, then `dvc checkout --relink`"
            )
