"""Many adapters, one base: through real DVC on the tiny model, in chat and in review."""

import json
import os

import pytest
import yaml
from conftest import Project, stages_that_ran

from stages.errors import UserError
from stages.places import VARIABLE, place
from stages.settings import load, validate

OWN = ["prepare", "finetune", "adapt", "evaluate", "report"]
MINE = "+adapters.mine={data:{path:mine.jsonl,group_column:null},finetune:{rank:2}}"


@pytest.fixture(scope="module")
def two(once, finished) -> Project:
    """The finished clone after an experiment that adds an adapter on rows of its own. Only read it."""

    def add(root) -> None:
        project = finished.copy(root)
        rows = (root / "data/travel.jsonl").read_text().splitlines()[:400]
        (root / "mine.jsonl").write_text("\n".join(rows) + "\n")
        project.commit()
        (root.parent / "two.log").write_text(project.dvc("exp", "run", "-S", MINE))
        project.commit()

    return Project(once("two", add))


@pytest.mark.slow
def test_an_added_adapter_runs_its_own_stages_alone(two):
    ran = stages_that_ran((two.root.parent / "two.log").read_text())
    assert ran == [f"adapters_{stage}@mine" for stage in OWN]
    config = json.loads((two.root / "models/adapters/mine/adapter/adapter_config.json").read_text())
    assert config["r"] == 2


@pytest.mark.slow
def test_an_added_adapter_leaves_the_default_one_as_it_was(two, finished):
    before, after = (
        yaml.safe_load((p.root / "dvc.lock").read_text())["stages"] for p in (finished, two)
    )
    same = before.keys() - {"params"}  # whose output is params.yaml itself
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert two.git("diff", "--name-only", "HEAD~1", "--", "metrics/quality.json") == ""


@pytest.mark.slow
def test_only_the_adapter_whose_settings_change_is_trained_again(two, tmp_path):
    project = two.copy(tmp_path / "project")
    project.replace("params.yaml", "rank: 2", "rank: 4")
    ran = stages_that_ran(project.dvc("repro"))
    assert ran == [f"adapters_{stage}@mine" for stage in OWN[1:]]


@pytest.mark.slow
def test_dvc_shows_the_metrics_of_every_adapter(two):
    shown = json.loads(two.dvc("metrics", "show", "--json"))[""]["data"]
    mine = shown["metrics/adapters/mine/quality.json"]["data"]
    assert mine["answer_perplexity"] != mine["answer_perplexity_default"]
    assert shown["metrics/quality.json"]["data"]["answer_perplexity"] > 1


@pytest.mark.slow
def test_adapters_served_together_answer_as_each_does_alone(project):
    """The same data, so the same test prompts: the default adapter must answer them as it did alone."""
    project.dvc("exp", "run", "-S", "adapters=small", "-S", "adapters.small.finetune.rank=2")
    alone, together = (
        [json.loads(line) for line in (project.root / path).read_text().splitlines()]
        for path in ("metrics/predictions.jsonl", "metrics/adapters/small/predictions.jsonl")
    )
    for one, other in zip(alone, together, strict=True):
        assert one["question"] == other["question"]
        assert one["scores"]["adapter"] == other["scores"]["default"]
        assert one["scores"]["base"] == other["scores"]["base"]


@pytest.mark.slow
def test_chat_answers_with_all_adapters_or_with_one_by_name(two):
    chat = ("chat", "--max-new-tokens", "4")
    output = two.python("lab.cli", *chat, "where is Chicago?")
    assert [line.split("]")[0] for line in output.splitlines() if line.startswith("[")] == [
        "[adapter",
        "[mine",
    ]
    assert not two.python("lab.cli", *chat, "--adapter", "mine", "hi").startswith("[")
    output = two.python("lab.cli", *chat, "--adapter", "yours", "hi", exits=1)
    assert "must be one of adapter, mine, or NAME=PATH" in output


@pytest.mark.slow
def test_review_looks_at_one_adapter_by_name(two):
    output = two.python("lab.cli", "review", "HEAD", "--adapter", "mine")
    assert "| adapters_finetune@mine |  | " in output
    assert "Nothing changed" in output
    output = two.python("lab.cli", "review", "HEAD", "--adapter", "yours", exits=1)
    assert output == "lab: yours is no adapter of params.yaml (conf/adapters): there is mine\n"


def test_a_named_adapter_takes_what_it_does_not_set_from_the_default(params):
    params["adapters"] = {"mine": {"data": {"path": "x"}, "finetune": {"rank": 3}}}
    own = validate(params).of_adapter("mine")
    assert (own.data.path, own.finetune.rank) == ("x", 3)
    assert own.finetune.max_steps == params["finetune"]["max_steps"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"mine": {"finetune": {"steps": 1}}}, "adapters.mine.finetune.steps is not a known key"),
        ({"mine": {"data": {"path": 3}}}, "adapters.mine.data.path is 3: must be"),
        ({"mine": 3}, "adapters.mine is 3: must be"),
        ({"My own": {}}, "adapters.My own"),
        ({"mine": {"finetune": {"target_modules": ["o_proj"]}}}, "must be some of finetune.target"),
    ],
)
def test_a_mistake_names_the_adapter_and_the_key(params, adapters, message):
    params["finetune"]["target_modules"] = ["q_proj", "v_proj"]
    params["adapters"] = adapters
    with pytest.raises(UserError) as error:
        validate(params)
    assert message in str(error.value)


def test_the_environment_names_the_adapter_of_a_process(params, tmp_path, monkeypatch):
    params["adapters"] = {"mine": {"data": {"path": "x"}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setitem(os.environ, VARIABLE, "mine")
    assert load(tmp_path / "params.yaml").data.path == "x"
    assert str(place("models/adapter")) == "models/adapters/mine/adapter"
    monkeypatch.delitem(os.environ, VARIABLE)
    assert str(place("models/adapter")) == "models/adapter"
    assert str(place("models/adapter", "yours")) == "models/adapters/yours/adapter"
