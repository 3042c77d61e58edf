"""Every file in conf/ composes to valid settings; every mistake is one line that names the key."""

import copy
import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump
from omegaconf.errors import OmegaConfBaseException

from stages import params as guard
from stages.core.conf import digest
from stages.core.errors import UserError
from stages.core.settings import load, load_current, validate
from support.project import ROOT

CONF = ROOT / "conf"
GROUPS = [folder.name for folder in sorted(CONF.iterdir()) if folder.is_dir()]
OPTIONS = [
    f"{group}={file.stem}" for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))
]
NEEDED = {"model=local": ["model.source.path=/somewhere"]}  # what an option asks the user for


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """Compose conf/ with overrides, as `dvc exp run -S` does, and load it, as a stage does."""
    monkeypatch.chdir(ROOT)

    def composed(*overrides: str):
        params = tmp_path / "params.yaml"
        compose_and_dump(str(params), str(CONF), None, "config", ".", list(overrides))
        return load(params)

    return composed


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_to_valid_settings(compose, option):
    settings = compose(option, *NEEDED.get(option, []))
    assert settings.conf_digest


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_opens_with_the_command_that_runs_it(option):
    group, _, name = option.partition("=")
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()[:2]
    if group != "data":
        assert any(line.startswith("# dvc exp run -S ") for line in lines)


def test_every_group_names_its_options_in_config_yaml():
    text = (CONF / "config.yaml").read_text()
    assert [group for group in GROUPS if f"  - {group}: " not in text] == []


def test_what_an_option_leaves_open_must_be_given(compose):
    with pytest.raises(OmegaConfBaseException, match=r"model\.source\.path has no value yet"):
        compose("model=local")


def test_a_composition_that_is_not_valid_is_refused_before_anything_is_queued(compose):
    with pytest.raises(OmegaConfBaseException, match=r"finetune\.rank is 0: must be greater"):
        compose("finetune.rank=0")


def test_options_change_what_their_name_says(compose):
    assert compose("quantize=rtn").quantize.method == "rtn"
    assert compose("finetune=rslora").finetune.use_rslora is True
    assert compose("optimize=cpu_exact").optimize.accuracy_level == 1
    assert compose("experiment=attention_only").finetune.target_modules == ["q_proj", "v_proj"]


def test_a_graph_for_tensorrt_rtx_takes_the_weights_that_it_knows_and_no_others(compose):
    weights = compose("optimize=trt_rtx_int4").quantize
    assert (weights.symmetric, weights.lm_head_bits, weights.embedding_bits) == (True, 16, 16)
    for other in ("quantize.symmetric=false", "quantize.lm_head_bits=8", "quantize.bits=8"):
        with pytest.raises(OmegaConfBaseException, match="symmetric 4-bit weights alone"):
            compose("optimize=trt_rtx_int4", other)


def test_float32_is_a_choice_of_webgpu_that_the_others_files_do_not_have(compose):
    assert compose("optimize=webgpu_int4").optimize.float32 is True
    assert compose("optimize=webgpu_int4", "optimize.float32=false").optimize.float32 is False


def test_a_given_value_beats_an_experiment(compose):
    assert compose("experiment=long", "finetune.max_steps=7").finetune.max_steps == 7
    assert compose("experiment=quick", "quantize=awq").quantize.method == "awq"


def test_the_group_size_follows_the_model(compose):
    assert compose("model=qwen25_0_5b").quantize.group_size == 128


def test_one_seed_reaches_every_section(compose):
    settings = compose("seed=7")
    assert {settings.data.seed, settings.finetune.seed, settings.evaluate.seed} == {7}


MISTAKES = {
    "an unknown key": (
        "finetune.steps",
        3,
        "finetune.steps is not a known key (see conf/finetune/)",
    ),
    "an unknown section": ("training", {}, "training is not a known key"),
    "a text for a number": ("finetune.max_steps", "ten", "finetune.max_steps is 'ten': must be a"),
    "a number for a switch": ("quantize.symmetric", 1, "quantize.symmetric is 1: must be a"),
    "rank 0": ("finetune.rank", 0, "finetune.rank is 0: must be greater than 0"),
    "half a process": ("finetune.processes", 1.5, "finetune.processes is 1.5: must be"),
    "no process to quantize": (
        "quantize.processes",
        0,
        "quantize.processes is 0: must be greater than 0",
    ),
    "no process": ("finetune.processes", 0, "finetune.processes is 0: must be greater than 0"),
    "more processes than rows": (
        "finetune.processes",
        9,
        "must be auto or at most finetune.batch_size, 8",
    ),
    "no steps": ("finetune.max_steps", -1, "finetune.max_steps is -1: must be greater than 0"),
    "five bits": ("quantize.bits", 5, "quantize.bits is 5: must be 4 or 8"),
    "an odd group size": (
        "quantize.group_size",
        48,
        "quantize.group_size is 48: must be 16, 32, 64",
    ),
    "an unknown method": (
        "quantize.method",
        "hqq",
        "quantize.method is 'hqq': must be 'awq' or 'rtn'",
    ),
    "no modules": ("finetune.target_modules", [], "finetune.target_modules is []: "),
    "an unpinned wheel": ("model.source.sha256", "latest", "model.source.sha256 is 'latest': "),
    "a source of no known kind": ("model.source.kind", "ftp", "model.source"),
    "shares that leave nothing": (
        "data.test_share",
        0.8,
        "validation_share + test_share must be belo",
    ),
    "a learning rate of NaN": ("finetune.lr", float("nan"), "finetune.lr is nan"),
}


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(params, key, value, message):
    values = copy.deepcopy(params)
    *above, last = key.split(".")
    section = values
    for part in above:
        section = section[part]
    section[last] = value
    with pytest.raises(UserError) as error:
        validate(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(params):
    values = copy.deepcopy(params)
    del values["evaluate"]["speed"]["repeats"]
    with pytest.raises(UserError, match=r"evaluate\.speed\.repeats is missing"):
        validate(values)


def test_params_yaml_that_is_no_mapping_is_one_line(tmp_path):
    (tmp_path / "params.yaml").write_text("seed: [1\n")
    with pytest.raises(UserError, match=r"params\.yaml"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(UserError):
        load(tmp_path / "params.yaml")


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A folder with what the guard needs, and no params.yaml."""
    for name in ("conf", "hydra_plugins"):
        shutil.copytree(CONF.parent / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    return tmp_path


MERGED = "<<<<<<< ours\nseed: 1\n=======\nseed: 2\n>>>>>>> theirs\n"


@pytest.mark.parametrize("text", [None, MERGED, "- 1\n", "conf_digest: of another conf\n"])
def test_params_yaml_that_cannot_be_used_is_composed_again(workspace, text):
    if text is not None:
        guard.PARAMS.write_text(text)
    with pytest.raises(UserError):
        load_current()
    guard.guard()
    load_current()
    guard.check_strictly()


def test_overrides_survive_the_guard_until_conf_changes(workspace, capsys):
    guard.guard()
    text = guard.PARAMS.read_text().replace("max_steps: ", "max_steps: 1")
    guard.PARAMS.write_text(text)
    guard.guard()
    assert guard.PARAMS.read_text() == text
    with pytest.raises(UserError, match=r"put its overrides into conf/"):
        guard.check_strictly()
    with (workspace / "conf/finetune/lora.yaml").open("a") as file:
        file.write("# a remark\n")
    capsys.readouterr()
    guard.guard()
    assert "finetune.max_steps: 1" in capsys.readouterr().out
    guard.check_strictly()


def test_an_experiment_whose_conf_git_does_not_know_is_refused(workspace, monkeypatch):
    guard.guard()
    (workspace / "conf/finetune/mine.yaml").write_text("# new\n")
    monkeypatch.setenv("DVC_EXP_NAME", "bold-fish")
    with pytest.raises(UserError, match="git add conf"):
        guard.guard()


def test_another_data_path_in_conf_needs_a_second_run_for_dvc_has_read_the_first(workspace):
    guard.guard()
    file = workspace / "conf/data/travel.yaml"
    file.write_text(file.read_text().replace("path: data/travel.jsonl", "path: mine.jsonl"))
    with pytest.raises(UserError, match=r"data\.path changed"):
        guard.guard()
    assert not guard.DONE.exists()
    guard.guard()


def test_the_digest_changes_with_every_edit_and_only_then(tmp_path):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    digests = [digest(conf)]
    assert digests == [digest(CONF)]
    file = conf / "model/tiny.yaml"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as a checkout on Windows has it
    (conf / "notes.txt").write_text("no part of the configuration")
    assert digest(conf) == digests[0]
    for edit in (
        lambda: (conf / "model/tiny.yaml").write_bytes(b"# edited\n"),
        lambda: (conf / "model/tiny.yaml").rename(conf / "model/small.yaml"),
        (conf / "model/small.yaml").unlink,
    ):
        edit()
        digests.append(digest(conf))
    assert len(set(digests)) == 4


def test_params_yaml_with_overrides_or_without_comes_from_conf():
    assert guard.values_of((ROOT / "params.yaml").read_text())["conf_digest"] == digest(CONF)
