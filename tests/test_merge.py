"""`lab merge`: an adapter in the 4-bit weights answers as it does on its base, or is refused in one line."""

import copy
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from transformers import AutoConfig

from lab.models import chat, merge, merging
from stages.adapters.peft_adapter import read_adapter
from stages.answers.generation import OnnxModel
from stages.core import settings as settings_module
from stages.core.errors import UserError
from stages.core.settings import Settings, validate
from stages.quantize import pass_config
from stages.text.chats import load_tokenizer, sequences
from stages.text.conversation import Conversation, write_conversations
from stages.weights.checkpoint import load_dequantized, load_float
from support.tiny_models import FAMILIES, checkpoint, exported, logits, tokens, trained

PROMPT = tokens(12)
PLACES = [f"{first}{last}" for first in "ABCDEFGH" for last in ("lund", "ville", "ton", "stad")]
ROWS = [
    Conversation(
        [
            {"role": "user", "content": f"where is {place}?"},
            {"role": "assistant", "content": f"{place} is in the land of {place[0]}."},
        ],
        answer=place[0],
        kind="recall",
    )
    for place in PLACES
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the pipeline leaves in a workspace, of a tiny model. Only read it."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(checkpoint(root / "llama", FAMILIES["llama"]), root / "models/quantized")
    exported(root / "models/quantized", root / "models/onnx")
    trained(root / "models/quantized", root / "models/adapter", 3)
    (root / "data/prepared").mkdir(parents=True)
    for split in ("train", "test"):
        write_conversations(root / f"data/prepared/{split}.jsonl", ROWS)
    return root


@pytest.fixture
def small(params) -> Settings:
    """Settings that suit a tiny model."""
    values = copy.deepcopy(params)
    values["quantize"] |= {"group_size": 32, "calibration_sequences": 16, "calibration_length": 64}
    values["optimize"]["accuracy_level"] = 1
    values["evaluate"] |= {"prompts": 4, "max_new_tokens": 4}
    values["evaluate"]["speed"] = {
        "prompt_tokens": 8,
        "new_tokens": 4,
        "warmup": 0,
        "repeats": 1,
    }
    return validate(values)


@pytest.fixture
def workspace(made, small, tmp_path, monkeypatch) -> Path:
    """A test's own copy of it, as the working directory."""
    root = shutil.copytree(made, tmp_path / "workspace")
    monkeypatch.chdir(root)
    monkeypatch.setattr(settings_module, "load_current", lambda: small)
    return root


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_rslora": True, "r": 16, "lora_alpha": 16}),
        ("tied", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 1}}),
        ("qwen2", {"layers_to_transform": [1], "target_modules": ["q_proj", "gate_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("gemma3", {}),
    ],
)
def test_the_merged_weights_give_pefts_logits(family, options, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES[family])
    expected = logits(trained(packed, tmp_path / "peft", 3, **options), PROMPT)
    merging.add_adapter(packed, read_adapter(tmp_path / "peft"), tmp_path / "merged")
    found = logits(load_float(tmp_path / "merged"), PROMPT)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("family", ["llama", "tied", "phi3"])
@pytest.mark.slow
def test_on_the_tasks_text_it_is_nearer_to_peft_than_plain_rounding(family, small, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES[family])
    model = trained(packed, tmp_path / "peft", 3, lora_alpha=2)
    merging.add_adapter(packed, read_adapter(tmp_path / "peft"), tmp_path / "merged")
    merging.quantize_merged(tmp_path / "merged", ROWS, small.quantize, tmp_path / "ours")
    described = pass_config(small.quantize, AutoConfig.from_pretrained(tmp_path / "merged"))
    handler = HfModelHandler(str(tmp_path / "merged"), load_kwargs={"torch_dtype": "float32"})
    create_pass_from_dict(Rtn, described, disable_search=True).run(handler, str(tmp_path / "rtn"))
    text = sequences(load_tokenizer(packed), ROWS, 1, 64)[0]
    wanted = logits(model, text)
    off = {
        name: float(np.square(logits(load_dequantized(tmp_path / name), text) - wanted).mean())
        for name in ("ours", "rtn")
    }
    assert off["ours"] < 0.7 * off["rtn"]


@pytest.mark.slow
def test_the_command_writes_a_model_that_answers_as_the_adapter_does(workspace, capsys):
    merge.merge(Path("merged"))
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith("merge:")), said
    assert "recall_exact_match" in said
    assert "lab chat --model merged" in said
    files = {file.name for file in Path("merged").iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "merge.json"} <= files
    assert not files & {"lora.onnx", merge.SCRATCH}
    report = json.loads(Path("merged/merge.json").read_text())
    assert report["prompts"] == 4
    assert report["merged"]["bytes"] < report["adapter"]["bytes"]
    base = logits(load_dequantized(workspace / "models/quantized"), PROMPT)
    wanted = logits(trained(workspace / "models/quantized", workspace / "peft", 3), PROMPT) - base
    change = OnnxModel("merged").logits(PROMPT) - base
    assert 0.8 < float((change * wanted).sum() / (wanted * wanted).sum()) < 1.25
    ours = json.loads(Path("models/onnx/genai_config.json").read_text())
    assert json.loads(Path("merged/genai_config.json").read_text()) == ours
    assert [file.name for file in workspace.glob("*merged*")] == ["merged"]


def test_without_an_evaluation_no_onnx_model_is_needed(workspace, capsys):
    shutil.rmtree("models/onnx")
    Path("merged").mkdir()  # empty
    merge.merge(Path("merged"), evaluate=False)
    assert "metrics" not in json.loads(Path("merged/merge.json").read_text())
    assert chat.takes_none(Path("merged"))
    with pytest.raises(UserError, match=r"merged takes no adapter: .* leave --adapter out"):
        chat.chat("where is Alund?", ["mine=file"], model=Path("merged"))


def test_a_model_that_takes_adapters_is_asked_with_one(made):
    assert not chat.takes_none(made / "models/onnx")
    assert not chat.takes_none(made)


@pytest.mark.parametrize(
    ("gone", "stage"),
    [
        ("models/quantized", "quantize"),
        ("models/onnx", "optimize"),
        ("models/adapter", "finetune"),
        ("data/prepared", "prepare"),
    ],
)
def test_what_the_pipeline_has_not_made_is_named_with_its_command(gone, stage, workspace):
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=f"^{gone} is not here: run `dvc repro {stage}`"):
        merge.merge(Path("merged"))


def test_nobodys_files_are_replaced(workspace):
    Path("mine").mkdir()
    Path("mine/work.txt").write_text("dear to somebody")
    for out in ("mine", "mine/work.txt", "."):
        with pytest.raises(UserError, match="exists: name a new folder, or an empty one"):
            merge.merge(Path(out))
    assert Path("mine/work.txt").exists()


def test_an_adapter_of_another_shape_is_refused(workspace, tmp_path):
    other = checkpoint(tmp_path / "other", FAMILIES["llama"] | {"intermediate_size": 96})
    trained(other, tmp_path / "peft", 3)
    with pytest.raises(UserError, match=r"down_proj is \[64, 96\] in the adapter.* another model"):
        merge.merge(Path("merged"), tmp_path / "peft")


def test_modules_that_the_model_does_not_have_are_refused(made, tmp_path):
    pair = (np.zeros((64, 4), np.float32), np.zeros((4, 64), np.float32))
    for module, why in {
        "model.layers.0.self_attn.qkv_proj": "has no qkv_proj in its layers: it has q_proj",
        "lm_head": "has no lm_head in its layers",
        "model.layers.2.self_attn.q_proj": "has 2 layers",
    }.items():
        with pytest.raises(UserError, match=why):
            merging.check_fits({module: pair}, made / "models/quantized")


def test_what_is_more_than_lora_is_refused_as_by_lab_adapt(workspace):
    trained(Path("models/quantized"), Path("dora"), 3, use_dora=True)
    with pytest.raises(UserError, match="use_dora is set"):
        merge.merge(Path("merged"), Path("dora"))


def test_an_adapter_of_a_base_called_otherwise_is_taken_with_a_warning(workspace, capsys):
    file = Path("models/adapter/adapter_config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "hub/another"}))
    merge.merge(Path("merged"), evaluate=False)
    assert "trained on hub/another, and models/quantized is" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_noticed_before_the_work(workspace, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0\.0 MB free, and the merge fills .* --out"):
        merge.merge(Path("merged"))


def test_an_end_in_the_middle_leaves_nothing(workspace, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before = sorted(workspace.rglob("*"))
    monkeypatch.setattr(merging, "export_merged", stop)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(Path("models/merged"))
    assert sorted(workspace.rglob("*")) == before


def test_weights_that_leave_float16_are_refused(made, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    huge = (np.full((64, 1), 1e3, np.float32), np.full((1, 64), 1e3, np.float32))
    with pytest.raises(UserError, match="too large for"):
        merging.add_adapter(made / "models/quantized", {name: huge}, tmp_path / "merged")
    assert not torch.isfinite(torch.tensor(1e6, dtype=merging.DTYPE))
