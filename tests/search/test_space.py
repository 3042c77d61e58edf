"""lab search: what a space is, as people type it, and the one line for what is none."""

import pytest

from lab.search.goals import Limit, broken, goals, limits, miss
from lab.search.space import parse
from stages.core.errors import UserError
from support.project import ROOT

KNOWN = {"recall_exact_match": 1.0, "onnx_mb": 97.6}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_lists_ranges_and_groups_are_understood():
    space = parse(["finetune.rank=8,16,32", "finetune.lr=1e-4..1e-2:log", "quantize=awq,rtn"])
    rank, lr, quantize = space.axes
    assert rank.values == ("8", "16", "32")
    assert (lr.low, lr.high, lr.log, lr.whole) == (1e-4, 1e-2, True, False)
    assert quantize.is_group
    assert not rank.is_group
    assert space.size == float("inf")
    # options of groups come first: a value within the group must not be replaced by it
    assert space.overrides(("8", 0.001, "rtn")) == [
        "quantize=rtn",
        "finetune.rank=8",
        "finetune.lr=0.001",
    ]


def test_a_range_between_whole_numbers_holds_whole_numbers_alone():
    rank, dropout = parse(["finetune.rank=8..12", "finetune.dropout=0..0.5"]).axes
    assert rank.every() == (8, 9, 10, 11, 12)
    assert rank.number(9.6) == 10
    assert not dropout.whole
    assert not parse(["finetune.weight_decay=0..1"]).axes[0].whole  # it is 0.0 now


def test_a_value_of_a_range_has_few_digits_and_stays_inside():
    (lr,) = parse(["finetune.lr=0.00012345..0.01:log"]).axes
    assert lr.number(0.0023456) == 0.00235
    assert lr.number(0.000123451) == 0.00012345


def test_the_points_of_a_space_change_slowest_where_it_is_outermost():
    space = parse(["finetune.rank=8,16", "quantize=awq,rtn"])
    rank, quantize = space.axes
    assert [*space.points([quantize, rank])] == [
        ("8", "awq"),
        ("16", "awq"),
        ("8", "rtn"),
        ("16", "rtn"),
    ]


def test_a_setting_finds_its_place_as_it_stands_in_params_yaml():
    rank, modules, lr = parse(
        [
            "finetune.rank=8,16",
            "finetune.target_modules=all-linear,[q_proj,v_proj]",
            "finetune.lr=1e-4..1e-2",
        ]
    ).axes
    assert rank.place_of(16) == "16"
    assert rank.place_of(32) is None
    assert modules.place_of(["q_proj", "v_proj"]) == "[q_proj,v_proj]"
    assert lr.place_of(0.002) == 0.002
    assert lr.place_of(0.5) is None
    assert lr.place_of(0.00234567) is None  # the search itself would never set it


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "^nothing to search: give settings"),
        (["finetune.rnk=8,16"], r"^finetune\.rnk=8: finetune\.rnk is not a key; did you mean"),
        (["quantize=awq,gptq"], "^quantize=gptq: conf/quantize has awq"),
        (["finetune.rank=8,0"], r"finetune\.rank is 0: must be greater than 0"),
        (["finetune.rank=8,many"], r"finetune\.rank is 'many': must be a valid integer"),
        (["finetune.lr=0.1..2"], r"finetune\.lr is 2.0: must be less than or equal to 1"),
        (["finetune.rank=8,16", "finetune.rank=32"], r"^finetune\.rank is given twice"),
        (["finetune.rank=8,16,8"], "8 stands there twice"),
        (["finetune.lr=0..1:log"], "a log range cannot hold 0 or less"),
        (["finetune.lr=-1..1:log"], "a log range cannot hold 0 or less"),
        (["finetune.lr=1e-2..1e-4"], r"the lower end comes first: finetune\.lr=1e-4\.\.1e-2"),
        (["finetune.lr=1e-4..1e-2:linear"], "there may be :log, not :linear"),
        (["finetune.lr=a..b"], r"a range is KEY=LOW\.\.HIGH"),
        (["finetune.rank"], "^finetune.rank: cannot be read: write KEY=VALUE"),
        (["finetune.rank=interval(1,9)"], "write the values as finetune.rank=A,B,C"),
        (["+finetune.rank=8,16"], "write KEY=A,B,C without"),
        (["evaluate.prompts=8,16"], "cannot be searched: trials are compared by it"),
        (["data.test_share=0.1,0.2"], "trials must be asked the same prompts"),
        (["finetune.seed=1,2,3"], "a seed is luck"),
        (["seed=1,2"], "a seed is luck"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(words, reason):
    with pytest.raises(UserError, match=reason) as refused:
        parse(words)
    assert "\n" not in str(refused.value)


def test_gates_are_limits_where_no_option_says_otherwise():
    gates = {
        "onnx_mb.maximum": 150,
        "onnx_mb.regression": 1,
        "recall_exact_match.minimum": 0.8,
        "chrf.regression": 1,
    }
    found = limits(["onnx_mb=80"], [], gates, KNOWN)
    assert found == [
        Limit("onnx_mb", 80, True, "--under"),
        Limit("recall_exact_match", 0.8, False, "gate"),
    ]
    assert [each.metric for each in broken(found, {"onnx_mb": 97.6})] == ["onnx_mb"]
    assert broken(found, {"onnx_mb": 80, "recall_exact_match": 0.8}) == []
    assert miss(found, {"onnx_mb": 88, "recall_exact_match": 0.6}) == pytest.approx(0.1 + 0.25)


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda: goals([], [], KNOWN), "^what is best"),
        (lambda: goals(["recall_exact"], [], KNOWN), "did you mean recall_exact_match"),
        (lambda: goals(["onnx_mb"], ["onnx_mb"], KNOWN), "onnx_mb is given twice"),
        (lambda: limits(["onnx_mb"], [], {}, KNOWN), "^--under onnx_mb: write --under METRIC="),
        (lambda: limits([], ["onnx_mb=big"], {}, KNOWN), "^--over onnx_mb=big: write"),
        (lambda: limits(["speed=8"], [], {}, KNOWN), "^speed is no metric of this pipeline"),
    ],
)
def test_what_is_no_goal_or_limit_is_refused(ask, reason):
    with pytest.raises(UserError, match=reason):
        ask()
