"""Overrides as people type them keep their value, or are refused in one line with the way out."""

import pytest

from lab.experiments import overrides
from stages.core.errors import UserError
from stages.params import compose, flat, values_of
from support.project import ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("finetune.lr=1e-6", 1e-6),
        ("finetune.lr=.5e-3", 0.0005),
        ("finetune.target_modules=[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("data.path='/data/My Models/a=b.jsonl'", "/data/My Models/a=b.jsonl"),
        (r"data.path='C:\data\new'", r"C:\data\new"),
        ("data.path='data/été #2.jsonl'", "data/été #2.jsonl"),
    ],
)
def test_a_value_is_kept_as_it_was_typed(text, value):
    overrides.check([text])
    assert flat(values_of(compose([text])))[text.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("+experiment=quick", r"write -S experiment=quick$"),
        ("+finetune.rank=8", r"write -S finetune\.rank=8$"),
        ("finetune/rank=8", r"write -S finetune\.rank=8$"),
        ("model/tiny", r"write -S model=tiny$"),
        ("data.path=/data/My Models/a=b.jsonl", r"quote the value .*='/data/My Models/a=b.jsonl'"),
        ("finetune.max-steps=5", r"did you mean finetune\.max_steps"),
        (
            "finetune.maxsteps=5",
            r"finetune\.maxsteps is not a key; did you mean finetune\.max_steps",
        ),
        ("+finetune.maxsteps=5", r"finetune\.maxsteps is not a known key"),
        ("model=no_such_model", r"conf/model has .*smollm2_135m"),
        ("finetune.max_steps=1,2", "dvc exp run --queue"),
        ("finetune.max_steps=1e3", r"finetune\.max_steps is 1000\.0"),
        ("finetune.max_steps=200.0", r"finetune\.max_steps is 200\.0"),
        ("--finetune.max_steps=5", r"did you mean finetune\.max_steps"),
        ("=5", "write KEY=VALUE"),
        ("optimize.accuracy_level=4.0", "must be a whole number, written without a point"),
        ("optimize.accuracy_level=true", "must be a whole number, written without a point"),
        ("seed=4294967296", "must be less than 4294967296"),
        ("finetune.target_modules='[q_proj,v_proj]'", r"finetune\.target_modules"),
        ("data.path=${x}", "Interpolation key 'x' not found"),
        ("finetune.max_steps", "write KEY=VALUE"),
        ("optimize=openvino_int4", r"Intel's OpenVINO needs other .*olive-recipes, .*OpenVINOExec"),
        ("optimize=qnn", r"Qualcomm's NPU needs other .*olive-recipes, .*QNNExecutionProvider"),
        ("optimize.execution_provider=vitisai", r"AMD's NPU needs .*VitisAIExecutionProvider"),
        ("finetune.max_steps=null", r"finetune\.max_steps is None"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(text, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        overrides.check([text])
    assert "\n" not in str(refusal.value)


def test_a_key_that_only_the_chosen_option_has_is_known():
    overrides.check(["model=local", "model.source.path=/somewhere"])
    with pytest.raises(UserError, match=r"model\.source\.path is not a key"):
        overrides.check(["model.source.path=/somewhere"])
