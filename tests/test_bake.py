"""`lab bake`: one folder that answers elsewhere as the adapter does here, or one line that says why not."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai as og
import pytest

from lab.models import bake, baking, chat
from lab.models.light_tokenizer import LightTokenizer
from stages.adapters.convert import convert
from stages.adapters.names import LORA_GRAPH
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.core.settings import Optimize
from stages.text.chat_encoder import said_by
from stages.text.chats import generation_prompt_ids
from support.tiny_models import FAMILIES, checkpoint, exported, logits, same, tokens, trained

PROMPT = tokens(12)
QUESTION = "where is Zürich?"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the pipeline leaves in a workspace, of a tiny model. Only read it."""
    root = tmp_path_factory.mktemp("bake")
    packed = checkpoint(root / "llama", FAMILIES["llama"] | {"max_position_embeddings": 1024})
    folder = exported(packed, root / "models/onnx")
    trained(packed, root / "models/adapter", 3)
    (root / "models/onnx_adapter").mkdir()
    convert(root / "models/adapter", folder, root / chat.TRAINED)
    return root


@pytest.fixture
def workspace(made, tmp_path, monkeypatch) -> Path:
    """A test's own copy of it, as the working directory."""
    root = tmp_path / "workspace"
    shutil.copytree(made / "models", root / "models")
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"r": 40, "target_modules": ["q_proj", "v_proj"]}),  # one site of three is filled
        ("tied", {"layers_to_transform": [1], "target_modules": ["down_proj"]}),
        ("qwen2", {"rank_pattern": {"q_proj": 8}}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ],
    ids=str,
)
def test_baked_logits_are_those_of_the_adapter_as_input(family, options, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES[family])
    folder, file, out = (
        exported(packed, tmp_path / "onnx"),
        tmp_path / "a.onnx_adapter",
        tmp_path / "out",
    )
    expected = logits(trained(packed, tmp_path / "peft", 3, **options), PROMPT)
    convert(tmp_path / "peft", folder, file)
    bake.bake(out, file, folder)
    found = OnnxModel(out).logits(PROMPT)
    same(found, OnnxModel(folder, {"a": file}).logits(PROMPT, "a"))
    same(found, expected)
    graph = ir.load(out / "model.onnx").graph
    assert not [value.name for value in graph.inputs if ".lora_" in value.name]
    constants = [name for name in graph.initializers if ".lora_" in name]
    held = onnxruntime.AdapterFormat.read_adapter(str(file))
    assert sorted(constants) == sorted(held.get_parameters())
    # a site that the adapter leaves out costs nothing
    sites = [node for node in graph if (node.name or "").endswith("/lora_A")]
    assert 2 * len(sites) == len(constants)


@pytest.mark.parametrize("provider", ["cuda", "cpu"])
def test_a_graph_for_cuda_is_baked_too(provider, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES["llama"])
    level = None if provider == "cuda" else 4
    options = Optimize(execution_provider=provider, accuracy_level=level)
    folder = exported(packed, tmp_path / "onnx", options=options)
    trained(packed, tmp_path / "peft", 3, r=64, target_modules=["k_proj", "up_proj"])
    bake.bake(tmp_path / "out", tmp_path / "peft", folder)
    graph = ir.load(tmp_path / "out/model.onnx").graph
    kinds = {value.dtype for name, value in graph.initializers.items() if ".lora_" in name}
    assert kinds == {ir.DataType.FLOAT16 if provider == "cuda" else ir.DataType.FLOAT}
    assert {value.name for value in graph.inputs} == {
        value.name for value in ir.load(folder / "model.onnx").graph.inputs
    }
    data = (tmp_path / "out/model.onnx.data").read_bytes()
    assert data == (folder / "model.onnx.data").read_bytes()
    settings = (tmp_path / "out/genai_config.json").read_bytes()
    assert settings == (folder / "genai_config.json").read_bytes()


def test_the_folder_has_what_others_read_and_nothing_of_ours(workspace, capsys):
    Path("models/base").mkdir()
    Path("models/base/LICENSE.txt").write_text("of the base")
    bake.bake(Path("travel"))
    assert 'python travel/ask.py "where is Chicago?"' in capsys.readouterr().out
    files = {file.name for file in Path("travel").iterdir()}
    assert files >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"}
    assert files >= {"chat_template.jinja", "ask.py", "README.md", "inference_model.json"}
    assert not files & {LORA_GRAPH, bake.SCRATCH}
    assert Path("travel/LICENSE.txt").read_text() == "of the base"
    told = Path("travel/README.md").read_text()
    assert Path("travel/ask.py").read_text() in told
    assert "terms are in LICENSE.txt" in told
    described = json.loads(Path("travel/inference_model.json").read_text())
    assert described["Name"] == "travel"
    assert described["PromptTemplate"]["prompt"].count("{Content}") == 1
    assert [file.name for file in workspace.iterdir()] == ["models", "travel"]


def test_the_program_is_fifteen_lines():
    code = (Path(bake.__file__).parent / bake.PROGRAM).read_text().split('"""', 2)[2]
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 15


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, str]:
    """The environment of somebody who has ONNX Runtime GenAI, and what it needs, and nothing else."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ("onnxruntime-genai", "onnxruntime", "numpy"):
        found = distribution(name)
        roots = {file.parts[0] for file in found.files or []} - {"..", "/"}
        for root in roots:
            (packages / root).symlink_to(found.locate_file(root))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}


def test_the_program_alone_gives_the_tokens_that_lab_chat_does(workspace, elsewhere, tmp_path):
    """As the runtime writes them: the tiny model's tokens are no UTF-8, of which each has its way."""
    prompt = generation_prompt_ids(LightTokenizer("models/onnx"), [said_by("user", QUESTION)])
    answer = OnnxModel("models/onnx", {"a": chat.TRAINED}).generate(prompt, 256, "a")
    expected = decoded(answer)
    bake.bake(Path("travel"))
    moved = shutil.move("travel", tmp_path / "moved")
    shutil.rmtree(workspace / "models")
    words = [sys.executable, "-S", "-c", "import stages"]  # -S: without this environment's packages
    assert subprocess.run(words, cwd="/", env=elsewhere, capture_output=True).returncode == 1
    words = [sys.executable, "-S", f"{moved}/ask.py", QUESTION]
    found = subprocess.run(words, cwd="/", env=elsewhere, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.decode() == f"{expected}\n"


def decoded(tokens: list[int]) -> str:
    """Return what ONNX Runtime GenAI writes for tokens as they come."""
    stream = og.Tokenizer("models/onnx").create_stream()
    return "".join(stream.decode(token) for token in tokens)


@pytest.mark.parametrize(
    "text", ["The code for Madrid is +34.", " Zürich, 日本 and 🎉\n  two lines"]
)
def test_of_text_the_runtime_writes_what_lab_chat_does(text, workspace):
    tokenizer = LightTokenizer("models/onnx")
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert decoded(ids) == tokenizer.decode(ids) == text


def test_lab_chat_asks_a_baked_folder(workspace, capsys):
    chat.chat(QUESTION)
    expected = capsys.readouterr().out
    bake.bake(Path("travel"), Path("models/adapter"))
    capsys.readouterr()
    chat.chat(QUESTION, model=Path("travel"))
    assert capsys.readouterr().out == expected


def test_what_lab_merge_wrote_is_taken_as_it_is(workspace):
    shutil.copytree("models/onnx", "merged")
    Path("merged", LORA_GRAPH).unlink()
    Path("merged/merge.json").write_text("{}")
    bake.bake(Path("travel"), Path("merged"))
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert Path("travel", name).read_bytes() == Path("merged", name).read_bytes()
    assert not Path("travel/merge.json").exists()
    assert "none of the files" in Path("travel/README.md").read_text()


def test_the_same_inputs_give_the_same_bytes(workspace):
    for out in ("a/travel", "b/travel"):
        bake.bake(Path(out))
    for file in Path("a/travel").iterdir():
        assert file.read_bytes() == Path("b/travel", file.name).read_bytes(), file.name


def edited(file: Path, change) -> Path:
    """Write an adapter whose tensors were changed."""
    held = onnxruntime.AdapterFormat.read_adapter(chat.TRAINED)
    values = change({name: value.numpy().copy() for name, value in held.get_parameters().items()})
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()}
    )
    adapter.export_adapter(str(file))
    return file


def without_one(values):
    del values[min(values)]
    return values


@pytest.mark.parametrize(
    "change",
    [
        without_one,
        lambda values: {name: array[:, :2] for name, array in values.items()},
        lambda values: {name: array.astype(np.float16) for name, array in values.items()},
        lambda values: {f"other.{name}": array for name, array in values.items()},
    ],
    ids=["half a pair", "another width", "another type", "another name"],
)
def test_an_adapter_of_another_model_is_refused(change, workspace):
    before = sorted(workspace.rglob("*"))
    file = edited(workspace.parent / "other.onnx_adapter", change)
    with pytest.raises(
        UserError, match=r"other.onnx_adapter is not made for the model in models/onnx"
    ):
        bake.bake(Path("travel"), file)
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("nowhere", "nowhere does not exist"),
        ("models/base-less", "is a folder: name the file in it"),
        ("models/onnx/tokenizer.json", "tokenizer.json is not an ONNX Runtime adapter"),
    ],
)
def test_what_is_no_adapter_is_refused(adapter, words, workspace):
    Path("models/base-less").mkdir()
    with pytest.raises(UserError, match=words):
        bake.bake(Path("travel"), Path(adapter))
    assert not Path("travel").exists()


def test_nobodys_files_are_replaced_and_a_missing_model_is_named(workspace):
    Path("mine").mkdir()
    Path("mine/work.txt").write_text("dear to somebody")
    with pytest.raises(UserError, match="--out mine exists: name a new folder, or an empty one"):
        bake.bake(Path("mine"))
    shutil.rmtree("models/onnx")
    with pytest.raises(UserError, match="models/onnx holds no ONNX model: run `dvc repro`"):
        bake.bake(Path("travel"))


def test_a_graph_that_says_something_else_is_not_handed_on(workspace, monkeypatch):
    real = baking.adapter_values

    def wrong(*words):
        return {name: -2 * array for name, array in real(*words).items() if "lora_A" in name} | {
            name: array for name, array in real(*words).items() if "lora_B" in name
        }

    monkeypatch.setattr(baking, "adapter_values", wrong)
    with pytest.raises(UserError, match="the baked graph's logits are off by"):
        bake.bake(Path("travel"))
    assert not Path("travel").exists()


@pytest.mark.parametrize(
    ("other", "effect"),
    [
        (
            lambda tokens: [*tokens[:-1], 5],
            r"\(9\d% .* alike\).* may differ from those of `lab chat`",
        ),
        (lambda tokens: PROMPT, r"alike\): answers of ask.py .* are nonsense"),
    ],
)
def test_a_tokenizer_that_the_runtime_reads_otherwise_is_told(
    other, effect, workspace, monkeypatch, capsys
):
    right = bake.tokens_of
    monkeypatch.setattr(bake, "tokens_of", lambda tokenizer: other(right(tokenizer)))
    bake.bake(Path("travel"))
    said = capsys.readouterr().err
    assert "does not give the tokens that training had" in said
    assert re.search(effect, said)
