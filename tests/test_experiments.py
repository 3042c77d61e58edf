"""Experiments: shown with the columns that decide, promoted into conf/ with their results."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, stages_that_ran

from lab.experiments import table
from lab.experiments.edits import compose, leaves, write_into
from stages.errors import UserError


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of conf/ to edit."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))


def nested(flat: dict) -> dict:
    """The opposite of `leaves`."""
    values: dict = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        section = values
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    return values


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["finetune.max_steps=200"], ["finetune.max_steps=200"]),
        (["quantize=rtn"], ["quantize=rtn"]),
        (["quantize=rtn", "quantize.lm_head_bits=4"], ["quantize=rtn", "quantize.lm_head_bits=4"]),
        (["finetune=rslora", "finetune.lr=2e-4"], ["finetune=rslora", "finetune.lr=0.0002"]),
        (["experiment=attention_only"], ["finetune.target_modules=['q_proj', 'v_proj']"]),
        (["model=qwen25_0_5b"], ["model=qwen25_0_5b"]),
        (["evaluate.gates.onnx_mb.maximum=99"], ["evaluate.gates.onnx_mb.maximum=99"]),
    ],
)
def test_what_an_experiment_overrode_is_written_where_it_belongs(conf, overrides, changes):
    wanted = compose(conf, *overrides)
    assert write_into(conf, nested(wanted), "exp") == changes
    assert compose(conf) == wanted


def test_comments_and_other_lines_stay(conf):
    wanted = compose(conf, "finetune.rank=32", "quantize=rtn")
    write_into(conf, nested(wanted), "exp")
    for file, changed in (("finetune/lora.yaml", "rank: "), ("config.yaml", "- quantize: ")):
        before, after = ((c / file).read_text().splitlines() for c in (ROOT / "conf", conf))
        assert len(before) == len(after)
        differ = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(differ) == 1, differ
        assert changed in differ[0][0]
    assert "rank: 32  # adapter rank" in (conf / "finetune/lora.yaml").read_text()


def test_what_conf_cannot_express_is_named(conf):
    wanted = compose(conf, "evaluate/gates=none")
    with pytest.raises(UserError, match=r"conf/ cannot express evaluate\.gates\."):
        write_into(conf, nested(wanted), "exp")


@pytest.mark.slow
def test_a_promoted_experiment_is_the_new_default_with_its_results(tried):
    shown = tried.python("lab.cli", "exp", "--csv")
    header = shown.splitlines()[0].split(",")
    assert "evaluate.max_new_tokens" in header
    assert not [name for name in header if "/" in name or "runtime" in name or "base" in name]
    output = tried.python("lab.cli", "promote", "shorter")
    assert "evaluate.max_new_tokens=6" in output
    assert tried.git("status", "--short") == ""
    assert "Promote experiment shorter" in tried.git("log", "-1", "--format=%B")
    assert "max_new_tokens: 6" in (tried.root / "conf/experiment/shrunk.yaml").read_text()
    tried.python("stages.params", "--strict")
    tried.python("lab.cli", "review", "--stages")
    assert stages_that_ran(tried.dvc("repro")) == []


@pytest.mark.slow
def test_promoting_loses_no_work_and_names_what_stands_in_the_way(tried):
    missing = tried.python("lab.cli", "promote", "none-such", exits=1)
    assert missing.startswith("lab: none-such is no experiment of this repository")
    tried.replace("README.md", "# olive-lab", "# My lab")
    assert "uncommitted changes (README.md)" in tried.python(
        "lab.cli", "promote", "shorter", exits=1
    )
    assert "# My lab" in (tried.root / "README.md").read_text()
    tried.commit()
    late = tried.python("lab.cli", "promote", "shorter", exits=1)
    assert "was run on commit" in late


def test_promoting_without_a_git_identity_is_refused_before_anything_changes(tried):
    nobody = [
        f"--unset=GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    ]
    promote = [sys.executable, "-m", "lab.cli", "promote", "shorter"]
    output = tried.run("env", *nobody, *promote, exits=1)
    assert output.startswith("lab: git does not know who you are: git config user.name")
    assert tried.git("status", "--short") == ""


@pytest.mark.slow
def test_an_experiment_that_ran_with_edited_code_is_not_promoted_without_it(project):
    project.replace("stages/report.py", '"""Collect', '"""Gather')
    project.dvc("exp", "run", "--temp", "--name", "edited")
    project.git("restore", "stages/report.py")
    output = project.python("lab.cli", "promote", "edited", exits=1)
    assert output.startswith("lab: edited ran with an edited stages/report.py: commit that edit")
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_an_experiment_without_its_results_says_at_once_what_to_pull(tried):
    shutil.rmtree(tried.root / ".dvc/cache")
    tried.dvc("remote", "add", "--local", "--default", "dead", "http://127.0.0.1:1/")
    output = tried.python("lab.cli", "promote", "shorter", exits=1)
    assert output.startswith("lab: models/")
    assert "`lab dvc exp pull GIT_REMOTE shorter` brings them" in output
    assert len(output.splitlines()) == 1
    assert tried.git("status", "--short") == ""


def test_leaves_are_what_a_run_can_set():
    assert leaves(yaml.safe_load("a: {b: 1}\nc: {}\nconf_digest: x")) == {"a.b": 1}


ROWS = [
    {"Experiment": "", "rev": "workspace", "typ": "baseline", "State": "", "chrf": "85.1200"}
    | {"model.name": "smol", "model.group_size": "64", "finetune.rank": "16"},
    {"Experiment": "bold-fish", "rev": "1a2b3c4", "typ": "branch_base", "State": "", "chrf": "80.0"}
    | {"model.name": "smol", "model.group_size": "64", "finetune.rank": "8"},
    {"Experiment": "a", "rev": "5d6e7f8", "typ": "branch_base", "State": "Queued", "chrf": ""}
    | {"model.name": "tiny", "model.group_size": "32", "finetune.rank": "16"},
]


def test_the_table_shows_figures_and_below_each_experiment_what_differs():
    assert list(table.lines(ROWS, 80)) == [
        "experiment            chrf",
        "workspace            85.12",
        "- bold-fish             80",
        "  finetune.rank=8",
        "- a          Queued",
        "  model.name=tiny",
    ]


def test_the_table_fits_a_terminal_and_cuts_nothing():
    settings = {f"data.setting_{number}": "value" * number for number in range(1, 9)}
    text = list(table.lines([ROWS[0], ROWS[1] | settings], 80))
    assert max(map(len, text)) <= 80
    assert all(f"{key}={value}" in " ".join(text) for key, value in settings.items())
    assert "…" not in "".join(text)


@pytest.mark.slow
def test_the_table_is_readable_in_a_pipe(tried):
    shown = tried.python("lab.cli", "exp")
    assert "- shorter" in shown
    assert "evaluate.max_new_tokens=6" in shown
    assert "…" not in shown
