"""lm-evaluation-harness on the ONNX model, with a local task; its numbers are checked by hand."""

import json

import numpy as np
import pytest
import yaml
from conftest import Project, stages_that_ran

from stages.generation import OnnxModel

pytest.importorskip("lm_eval", reason="needs requirements/bench.txt")
pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "Where is Chicago?", "choices": ["in Illinois", "on the moon"], "right": 0},
    {"question": "Which currency has Japan?", "choices": ["the dollar", "the yen"], "right": 1},
    {"question": "Where is Rome?", "choices": ["in Italy", "in Peru"], "right": 0},
]


@pytest.fixture
def with_task(project) -> Project:
    """A clone with a multiple-choice task of its own."""
    folder = project.root / "tasks"
    folder.mkdir()
    lines = (json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "places.jsonl").write_text("".join(lines))
    task = {
        "task": "places",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "places.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "places.yaml").write_text(yaml.safe_dump(task))
    return project


TASK = ["-S", "evaluate.task_folder=tasks", "-S", "+evaluate.tasks.places={}"]


def accuracy_by_hand(project: Project, adapter: str | None) -> float:
    """Which choice is likeliest after the question, as multiple-choice tasks are scored."""
    file = project.root / "models/onnx_adapter/adapter.onnx_adapter"
    onnx = OnnxModel(project.root / "models/onnx", {"adapter": file})
    encode = lambda text: [int(token) for token in onnx.tokenizer.encode(text)]  # noqa: E731
    right = []
    for row in QUESTIONS:
        question = encode(row["question"])
        whole = [encode(f"{row['question']} {choice}") for choice in row["choices"]]
        losses = [
            onnx.negative_log_likelihood(question, tokens[len(question) :], adapter).sum()
            for tokens in whole
        ]
        right.append(int(np.argmin(losses)) == row["right"])
    return round(float(np.mean(right)), 4)


def test_a_local_task_runs_alone_and_scores_what_the_model_says(with_task):
    output = with_task.dvc("exp", "run", *TASK)
    assert stages_that_ran(output) == ["benchmark@places"]
    shown = json.loads(with_task.dvc("metrics", "show", "--json"))[""]["data"]
    metrics = shown["metrics/raw/benchmark/places.json"]["data"]
    assert metrics["places_acc"] == accuracy_by_hand(with_task, "adapter")
    assert metrics["places_acc_base"] == accuracy_by_hand(with_task, None)


def test_a_task_that_does_not_exist_is_one_line(with_task):
    task = ["-S", "+evaluate.tasks.nowhere={limit:2}"]
    output = with_task.dvc("exp", "run", *task, exits=255)
    assert "benchmark: evaluate.tasks.nowhere: lm-eval itself has no such task" in output
    assert "Traceback" not in output


def test_data_that_cannot_be_had_is_one_line(with_task):
    (with_task.root / "tasks/places.jsonl").unlink()
    output = with_task.dvc("exp", "run", *TASK, exits=255)
    assert "benchmark: evaluate.tasks.places: " in output
    assert "Traceback" not in output.split("benchmark: ")[-1]
