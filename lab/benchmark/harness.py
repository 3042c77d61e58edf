"""Run lm-evaluation-harness over a model in float, in 4 bits, and with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lab.benchmark.onnx_lm import OnnxLM, longest
from lab.review.intervals import paired_change
from stages.core.errors import UserError
from stages.core.running import quietly
from stages.core.settings import Benchmark
from stages.scoring.bootstrap import DRAWS, SEED, middle
from stages.text.chats import load_tokenizer

Results = dict[str, Any]
# each model beside the one that it is made of
CHANGES = {"4-bit": "float", "adapter": "4-bit"}


def run(options: Benchmark, paths: Mapping[str, Path], online: bool = False) -> Results:
    """Return every metric of every task, of the three models, and their changes with 95 % intervals.

    `paths` name the base's folder (float), the ONNX folder (4-bit) and the adapter's file (adapter).
    """
    manager = TaskManager(include_path=options.folder, include_defaults=online)
    check_tasks(options, manager, online)
    results, shortened = {}, 0
    for name, model in models(paths):
        results[name] = ask(model, options, manager)
        shortened = max(shortened, getattr(model, "shortened", 0))
    return {
        "lm_eval": lm_eval.__version__,
        "limit": options.limit,
        "chat_template": options.chat_template,
        "shortened_contexts": shortened,
        "tasks": {task: compare(task, results) for task in results["float"]["results"]},
    }


def check_tasks(options: Benchmark, manager: TaskManager, online: bool) -> None:
    """Raise `UserError` for a task that nobody knows."""
    for task in options.tasks:
        if not manager.match_tasks([task]):
            ours = ", ".join(manager.all_tasks) if not online else "the harness knows it neither"
            more = "" if online else "; `lab benchmark --online` knows the harness's own too"
            raise UserError(f"no task {task} in {options.folder} ({ours}){more}")


def models(paths: Mapping[str, Path]) -> Iterator[tuple[str, LM]]:
    """Yield one model after the other, so that one of them is in memory."""
    yield (
        "float",
        HFLM(
            pretrained=str(paths["float"]),
            tokenizer=load_tokenizer(paths["float"]),
            dtype=torch.float32,
            device="cuda" if torch.cuda.is_available() else "cpu",
            max_length=longest(paths["4-bit"]),
            batch_size=1,
            trust_remote_code=False,
        ),
    )
    yield "4-bit", OnnxLM(paths["4-bit"])
    yield "adapter", OnnxLM(paths["4-bit"], paths["adapter"])


def ask(model: LM, options: Benchmark, manager: TaskManager) -> Results:
    """Return what the harness says of one model, with every answer's own figures."""
    with quietly():
        found = lm_eval.simple_evaluate(
            model,
            tasks=options.tasks,
            limit=options.limit,
            task_manager=manager,
            apply_chat_template=options.chat_template,
            bootstrap_iters=0,
            confirm_run_unsafe_code=False,
        )
    if found is None:
        raise UserError("the harness gave no results")
    return found


def compare(task: str, results: Mapping[str, Results]) -> dict[str, Any]:
    """Return a task's metrics of all models, and where each question has a value, their changes."""
    samples = {name: by_question(found["samples"][task]) for name, found in results.items()}
    metrics: dict[str, dict[str, Any]] = {}
    for key in results["float"]["results"][task]:
        metric, _, filter_ = key.partition(",")
        value = results["float"]["results"][task][key]
        if metric.endswith("_stderr") or not filter_ or not isinstance(value, int | float):
            continue
        name = metric if filter_ == "none" else f"{metric} ({filter_})"
        metrics[name] = {
            model: round(float(found["results"][task][key]), 5) for model, found in results.items()
        }
        for model, before in CHANGES.items():
            old, new = (values_of(samples[each], metric, filter_) for each in (before, model))
            if old is not None and new is not None:
                low, high = change(old, new)
                metrics[name][f"{model}_change"] = [round(low, 4), round(high, 4)]
    return {"n": len(samples["float"]), "metrics": metrics}


def by_question(samples: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Return a task's answers by the number of the question and the filter that read the answer."""
    return {(each["doc_id"], each["filter"]): each for each in samples}


def values_of(
    samples: Mapping[tuple[int, str], Mapping[str, Any]], metric: str, filter_: str
) -> np.ndarray | None:
    """Return a metric's value of every question, [questions]; None where it has none of its own."""
    values = [samples[key].get(metric) for key in sorted(samples) if key[1] == filter_]
    if not all(isinstance(value, int | float | np.number) for value in values):
        return None
    return np.array(values, dtype=np.float64)


def change(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean's change over the same questions."""
    moved = new - old
    if set(np.unique(np.concatenate([old, new]))) <= {0.0, 1.0}:
        return paired_change(float((moved > 0).sum()), float((moved < 0).sum()), len(moved))
    draws = np.random.default_rng(SEED).multinomial(
        len(moved), np.full(len(moved), 1 / len(moved)), size=DRAWS
    )
    return middle(draws @ moved / len(moved))
