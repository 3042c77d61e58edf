"""Ask our models what lm-evaluation-harness asks others, to see what 4 bits and the adapter cost elsewhere.

lab benchmark                                        # the tasks of conf/evaluate/benchmark, without a network
lab benchmark --task words --limit 500 --json words.json
lab benchmark --task lambada_openai --online         # a task of the harness, whose data comes from a hub

The base in float (models/base), the 4-bit model (models/onnx) and that with its adapter answer the same
questions, so that what is hard for all cancels out. Needs the extra lm_eval.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.core.errors import UserError
from stages.core.files import write_json

BASE = Path("models/base")
ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
LINE = "{:<16} {:<12} {:>5} {:>9} {:>9} {:>9}  {}"
REST = """\
in brackets: what other questions could change, of float to 4 bits and of that to the adapter (95 %)"""


def benchmark(
    task: Annotated[
        list[str] | None, typer.Option(help="A task; again for more. Default: conf/evaluate.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task. Default: conf/evaluate.")
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Let the harness fetch data from a hub.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep all figures.")] = None,
) -> None:
    """Ask the model tasks of lm-evaluation-harness. In float, in 4 bits, and with the adapter."""
    from stages.core.settings import load_current

    settings = load_current()
    options = settings.evaluate.benchmark
    options = options.model_copy(
        update={"tasks": task or options.tasks, "limit": limit or options.limit}
    )
    check_ready(online)
    # imported here: they take seconds, and need the extra
    from lab.benchmark.harness import run

    found = run(options, {"float": BASE, "4-bit": ONNX, "adapter": ADAPTER}, online)
    print("\n".join(table(found)))
    if json is not None:
        write_json(json, found)
        print(f"{json} has all figures")


def check_ready(online: bool) -> None:
    """Raise `UserError` for what is missing, before anything is loaded."""
    for path in (BASE, ONNX, ADAPTER):
        if not path.exists():
            raise UserError(f"{path} is not here: run `dvc repro` or `dvc pull` first")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lab benchmark needs lm-evaluation-harness: `pip install -r requirements/lm_eval.txt`"
        )
    if not online:  # read when the libraries are imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def table(found: dict[str, Any]) -> list[str]:
    """Return the figures in lines: a metric of a task each."""
    lines = [LINE.format("", "", "n", "float", "4-bit", "adapter", "").rstrip()]
    for task, of_task in found["tasks"].items():
        for metric, values in of_task["metrics"].items():
            cells = [f"{values[model]:.4g}" for model in ("float", "4-bit", "adapter")]
            changes = ", ".join(
                "({:+.3f} to {:+.3f})".format(*values[change])
                for change in ("4-bit_change", "adapter_change")
                if change in values
            )
            lines.append(LINE.format(task, metric, of_task["n"], *cells, changes).rstrip())
    if count := found["shortened_contexts"]:
        lines.append(
            f"{count} contexts were longer than what is read at once, and lost their beginning"
        )
    return [*lines, REST]
