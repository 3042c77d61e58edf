"""Score the ONNX model on a standard benchmark, with and without its adapter, by lm-evaluation-harness.

    python -m stages.benchmark arc_easy      # one task of evaluate.tasks; none are set by default

Its `onnxruntime-genai` model knows no adapters, so that answers come from `stages.generation` here. Tasks
whose data lies on the hub need the hub; those of evaluate.task_folder may lie anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.generation import OnnxModel
from stages.running import quietly, run, write_json
from stages.settings import Evaluate, Settings

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
    from lm_eval.tasks import TaskManager
except ImportError:
    sys.exit("benchmark: needs lm-eval: .venv/bin/pip install -r requirements/bench.txt")

ONNX = Path("models/onnx")
ADAPTER_FILE = Path("models/onnx_adapter/adapter.onnx_adapter")
RAW = Path("metrics/raw/benchmark")
MODELS = {
    "": "adapter",
    "_base": None,
}  # what a metric's name ends in -> the adapter that is active


class ServedModel(ONNXRuntimeGenAILM):
    """The harness's ONNX Runtime GenAI model, with an adapter."""

    def __init__(self, onnx: OnnxModel, adapter: str | None):
        self.onnx, self.adapter = onnx, adapter
        super().__init__(pretrained=str(ONNX))

    def _load(self) -> None:
        """Load nothing: the base stays in memory for all adapters."""

    def _forward_logits(self, tokens: list[int]):
        return self.onnx.logits(tokens, self.adapter)

    def _generate(self, tokens: list[int], gen_kwargs: dict[str, Any]) -> list[int]:
        longest = int(gen_kwargs.get("max_gen_toks", self.max_gen_toks))
        room = max(1, min(longest, self.max_length - len(tokens)))
        return self.onnx.generate(tokens, room, self.adapter)


def benchmark(settings: Settings) -> str:
    """Let both models do one task; save its metrics and their standard errors."""
    task = task_named(sys.argv[1:], settings.evaluate)
    onnx = OnnxModel(ONNX, {"adapter": ADAPTER_FILE})
    metrics: dict[str, float] = {}
    for suffix, adapter in MODELS.items():
        result = evaluate_task(ServedModel(onnx, adapter), task, settings.evaluate)
        metrics |= {f"{task}_{name}{suffix}": value for name, value in flat(result).items()}
    write_json(RAW / f"{task}.json", metrics)
    return f"{RAW}/{task}.json ({', '.join(f'{k} {v}' for k, v in list(metrics.items())[:2])})"


def task_named(words: list[str], options: Evaluate) -> str:
    """Return the task that the command line names. Raises unless evaluate.tasks has it."""
    if len(words) != 1 or words[0] not in options.tasks:
        known = ", ".join(options.tasks) or "none"
        raise UserError(f"name one task of evaluate.tasks (conf/evaluate), there is {known}")
    return words[0]


def evaluate_task(model: ServedModel, task: str, options: Evaluate) -> dict[str, Any]:
    """Run one task of the harness and return its metrics. Raises when it or its data cannot be had."""
    manager = TaskManager(include_path=options.task_folder)
    if task not in manager.all_tasks:
        raise UserError(f"evaluate.tasks.{task}: lm-eval {where(options)} has no such task")
    chosen = options.tasks[task]
    try:
        with quietly():
            found = simple_evaluate(
                model,
                tasks=[task],
                task_manager=manager,
                num_fewshot=chosen.fewshot,
                limit=chosen.limit,
                bootstrap_iters=0,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
    except OSError as error:  # no network, no file: the hub's errors are OSErrors
        raise UserError(f"evaluate.tasks.{task}: {str(error).splitlines()[0]}") from None
    return found["results"][task]


def where(options: Evaluate) -> str:
    """Say where tasks are looked for."""
    return f"with {options.task_folder}" if options.task_folder else "itself"


def flat(result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics by plain names: `acc,none` is acc, and standard errors end in _stderr."""
    return {
        name.replace(",none", "").replace(",", "_"): round(value, 4)
        for name, value in result.items()
        if isinstance(value, (int, float)) and "," in name
    }


if __name__ == "__main__":
    run(benchmark)
