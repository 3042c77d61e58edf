"""lab benchmark: the harness asks the exported model what it asks the float one, without a hub."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.adapters.convert import convert
from support.project import ROOT
from support.tiny_models import EXACT, FAMILIES, checkpoint, exported, trained

lm_eval = pytest.importorskip(
    "lm_eval", reason="the extra lm_eval is not installed: `make test-lm-eval`"
)
pytestmark = pytest.mark.slow


def questions(count: int) -> list[dict]:
    lines = (ROOT / "data/harness/words.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model exported in float32 with its adapter, and PyTorch's twin of both."""
    root = tmp_path_factory.mktemp("benchmark")
    packed = checkpoint(root, FAMILIES["llama"])
    folder = exported(packed, root / "onnx", options=EXACT)
    adapted = trained(packed, root / "peft", 1)
    convert(root / "peft", folder, root / "one.onnx_adapter")
    return folder, root / "one.onnx_adapter", adapted


@pytest.fixture(scope="module", params=["base", "adapter"])
def both(tiny, request):
    """The same model behind our API, and behind the harness's own for transformers."""
    from lm_eval.models.huggingface import HFLM

    from lab.benchmark.onnx_lm import OnnxLM
    from stages.text.chats import load_tokenizer

    folder, adapter, torch_model = tiny
    ours = OnnxLM(folder, adapter if request.param == "adapter" else None)
    theirs = HFLM(
        pretrained=torch_model,
        tokenizer=load_tokenizer(folder),
        max_length=ours.max_length,
        batch_size=1,
    )
    if request.param == "adapter":
        yield ours, theirs
    else:
        with torch_model.disable_adapter():
            yield ours, theirs


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_loglikelihoods_are_those_of_the_harness_own_model(both):
    """Also without a context, and of a text that does not fit."""
    pairs = [
        (f"A word that means {question['definition']} is:", f" {choice}")
        for question in questions(3)
        for choice in question["choices"]
    ]
    asked = requests("loglikelihood", *pairs, ("", "the market"), ("far " * 400, "away and back"))
    before = both[0].shortened
    ours, theirs = (model.loglikelihood(asked) for model in both)
    assert both[0].shortened - before == 1  # which lab benchmark says
    np.testing.assert_allclose([p for p, _ in ours], [p for p, _ in theirs], atol=2e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({round(p, 3) for p, _ in ours}) > 10


def test_whole_texts_are_read_in_the_same_windows(both):
    texts = [("the old market",), (" ".join(f"stall {number}" for number in range(300)),)]
    asked = requests("loglikelihood_rolling", *texts)
    ours, theirs = (model.loglikelihood_rolling(asked) for model in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_answers_end_at_the_same_stop_text(both):
    ours, theirs = both
    asked = requests("generate_until", ("the old market", {"until": [], "max_gen_toks": 12}))
    whole = ours.generate_until(asked)[0]
    assert whole == theirs.generate_until(asked)[0]
    stop = whole[len(whole) // 2 :][:2]
    asked = requests("generate_until", ("the old market", {"until": [stop], "max_gen_toks": 12}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    assert ours.generate_until(asked)[0] == whole[: whole.index(stop)]


def test_a_task_that_draws_tokens_is_refused(both):
    from stages.core.errors import UserError

    asked = requests("generate_until", ("a", {"until": [], "do_sample": True, "temperature": 1.0}))
    with pytest.raises(UserError, match="do_sample"):
        both[0].generate_until(asked)


def lab(*words: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lab.cli", "benchmark", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_lab_benchmark_asks_float_4_bit_and_adapter_without_a_hub(finished, tmp_path):
    done = lab(
        "--task", "words", "--limit", "5", "--json", str(tmp_path / "f.json"), folder=finished.root
    )
    assert done.returncode == 0, done.stderr
    assert "words" in done.stdout
    found = json.loads((tmp_path / "f.json").read_text())["tasks"]["words"]
    assert found["n"] == 5
    assert set(found["metrics"]["acc"]) == {
        "float", "4-bit", "adapter", "4-bit_change", "adapter_change",
    }  # fmt: skip
    assert all(found["metrics"]["acc"][name] * 5 % 1 < 1e-9 for name in ("float", "4-bit"))


def test_a_task_that_nobody_knows_is_one_line(finished):
    done = lab("--task", "wrods", folder=finished.root)
    assert done.returncode == 1
    assert "no task wrods in data/harness" in done.stderr.splitlines()[-1]
    assert "words" in done.stderr.splitlines()[-1]


def test_no_question_of_the_words_tells_its_answer():
    asked = questions(500)
    assert len(asked) == 500
    for each in asked:
        assert len(set(each["choices"])) == 4
        assert each["choices"][each["answer"]][:5] not in each["definition"]


def test_the_interval_of_a_change_is_of_the_same_questions():
    from lab.benchmark.harness import change

    old = np.repeat([0.0, 1.0], 50)
    low, high = change(old, old)
    assert -0.05 < low < 0 < high < 0.05
    worse = old.copy()
    worse[-20:] = 0
    low, high = change(old, worse)
    assert -0.3 < low < -0.2 < high < -0.1
    low, high = change(old * 3.5, worse * 3.5)
    assert -1.1 < low < -0.7 < high < -0.4
