"""Experiments: shown with the columns that decide, promoted into conf/ with their results."""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lab.cli import COMMANDS, Commands
from lab.experiments import table
from lab.experiments.edits import compose, leaves, write_into
from lab.experiments.promote import promote
from lab.experiments.table import asks_for_a_format
from stages.core.errors import UserError
from support.project import ROOT, Project, stages_that_ran


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert missing.startswith("lab: none-such is not an experiment of this repository")
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


CSV = """\
Experiment,rev,typ,State,answer_perplexity,finetune.target_modules
,workspace,baseline,,3,"['q_proj', 'v_proj']"
main,,baseline,,3,"['q_proj', 'v_proj']"
bold-fish,705edfd,branch_commit,Success,1.5,"['q_proj', 'k_proj', 'v_proj', 'o_proj']"
dark-ham,7807caa,branch_base,Queued,,"['q_proj', 'v_proj']"
"""


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_table_shows_figures_and_below_each_experiment_what_differs():
    assert list(table.lines(rows(CSV), 80)) == [
        "experiment                answer",
        "                      perplexity",
        "workspace                      3",
        "main                           3",
        "- bold-fish  Success         1.5",
        "  finetune.target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']",
        "- dark-ham   Queued",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_setting_is_shortened_and_the_lines_fit(width):
    settings = {f"data.setting_{number}": "value" * number for number in range(1, 6)}
    start, other = rows(CSV)[:2]
    text = list(table.lines([start, other | {"typ": "branch_base"} | settings], width))
    assert max(map(len, text)) <= width
    assert all(f"{key}={value}" in " ".join(text) for key, value in settings.items())


def test_without_experiments_there_is_a_heading():
    assert list(table.lines([], 80)) == ["experiment"]


@pytest.mark.parametrize(
    ("words", "asks"),
    [(["--csv"], True), (["--js"], True), (["--md"], True), (["-A", "--sort-by", "x"], False)],
)
def test_a_format_that_dvc_writes_is_left_to_it(words, asks):
    assert asks_for_a_format(words) is asks


@pytest.mark.slow
def test_the_table_in_a_pipe_says_how_the_workspace_differs(tmp_path):
    project = Project(tmp_path / "repository")
    project.root.mkdir()
    said = project.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "lab.cli", "exp", exits=1)
    assert said.startswith("lab: git rev-parse: fatal: not a git repository")
    project.git("init", "--quiet", "--initial-branch", "main")
    project.dvc("init", "--quiet")
    (project.root / "params.yaml").write_text("finetune: {rank: 8}\n")
    (project.root / "dvc.yaml").write_text("params: [params.yaml]\n")
    project.commit()
    (project.root / "params.yaml").write_text("finetune: {rank: 16}\n")
    said = project.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "lab.cli", "exp")
    assert said.splitlines() == ["experiment", "workspace", "  finetune.rank=16", "main"]


def test_promoting_elsewhere_than_in_the_repository_says_where_to(tmp_path, monkeypatch):
    project = Project(tmp_path / "repository")
    project.root.mkdir()
    monkeypatch.chdir(project.root)
    with pytest.raises(UserError, match="not a git repository"):
        promote("bold-fish")
    project.git("init", "--quiet")
    with pytest.raises(UserError, match="no commit here yet"):
        promote("bold-fish")
    project.commit()
    with pytest.raises(UserError, match=r"no dvc\.yaml here"):
        promote("bold-fish")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name):
    command = Commands(name="lab").get_command(None, name)
    assert command.get_short_help_str(limit=100) == COMMANDS[name][1]


def test_listing_the_commands_imports_none_of_them():
    code = "import sys; from lab.cli import app; app(['--help'], standalone_mode=False); "
    code += "print(*[m for m in sys.modules if m.startswith('lab.') and m != 'lab.cli'], sep=',')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == ""
    assert "promote" in done.stdout
