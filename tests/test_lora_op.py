"""AddLora adds (x·A)·B as NumPy does, whatever the sizes; without a compiler, adapters work all the same."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, load, save

from stages.adapters.convert import convert
from stages.adapters.names import OPERATOR_GRAPH
from stages.answers import held_adapters
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.lora_op import DOMAIN, NUMBER, library
from support.tiny_models import FAMILIES, checkpoint, exported, logits, same, tokens, trained

PROMPT = tokens(12)
ROUNDED, EXACT = 0, 1
pytestmark = pytest.mark.skipif(
    bool(library.why_not(on_gpu=False)), reason=library.why_not(on_gpu=False)
)


@pytest.fixture
def operator():
    return library.open_operator(on_gpu=False)


@pytest.fixture
def session(operator, tmp_path):
    """Return a session of y + AddLora(x) for one projection, which it names."""

    def build(name: str, kind: str = "AddLoraExact") -> onnxruntime.InferenceSession:
        values = [
            helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", "tokens", width])
            for value, width in (("y", "out"), ("x", "in"), ("sum", "out"))
        ]
        number = helper.make_tensor_value_info(NUMBER, TensorProto.INT64, [1])
        nodes = [
            helper.make_node(
                "Identity", ["y"], ["copy"]
            ),  # as in a model, y is no input of the graph
            helper.make_node(kind, ["copy", "x", NUMBER], ["sum"], domain=DOMAIN, projection=name),
        ]
        graph = helper.make_graph(nodes, "one", [*values[:2], number], [values[2]])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
        save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "one.onnx")
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(operator.name)
        return onnxruntime.InferenceSession(tmp_path / "one.onnx", options)

    return build


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 8, 16, 50])
@pytest.mark.parametrize(("inside", "outside"), [(37, 50), (64, 32), (3072, 129)])
def test_the_sum_is_that_of_numpy_for_any_sizes(rank, inside, outside, session, operator):
    run = session("sizes").run
    a, b = numbers(1, inside, rank), numbers(2, rank, outside)
    number = operator.add({"sizes": (a, b)}, EXACT)
    for batch, count in ((1, 1), (1, 2), (1, 8), (2, 9), (3, 1)):
        x, y = numbers(3, batch, count, inside), numbers(4, batch, count, outside)
        (found,) = run(None, {"x": x, "y": y, NUMBER: np.array([number])})
        # sums of so many products in another order
        wanted = y + (x.astype(np.float64) @ a) @ b
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    operator.remove(number)


@pytest.mark.parametrize("size", [1, 1e-7, 1e6])
def test_eight_bits_round_by_a_hundredth_whatever_the_size(session, operator, size):
    run = session("half", "AddLora").run
    a, b, x = numbers(1, 576, 16), numbers(2, 16, 1536) * np.float32(size), numbers(3, 1, 5, 576)
    number = operator.add({"half": (a, b)}, ROUNDED)
    (found,) = run(
        None, {"x": x, "y": np.zeros((1, 5, 1536), np.float32), NUMBER: np.array([number])}
    )
    wanted = x @ a @ b
    # of normal numbers the largest is four times the usual one: a step is a 30th of that, and errors cancel
    assert (found - wanted).std() < 0.02 * wanted.std()
    operator.remove(number)


def test_no_adapter_and_one_that_leaves_a_projection_alone_add_nothing(session, operator):
    run = session("untouched").run
    session("touched")
    number = operator.add({"touched": (numbers(1, 4, 2), numbers(2, 2, 6))}, EXACT)
    x, y = numbers(3, 1, 3, 4), numbers(4, 1, 3, 6)
    for chosen in (0, number):
        (found,) = run(None, {"x": x, "y": y, NUMBER: np.array([chosen])})
        assert np.array_equal(found, y)
    operator.remove(number)


def test_what_is_gone_or_of_another_model_stops_the_run(session, operator):
    run = session("gone").run
    number = operator.add({"gone": (numbers(1, 4, 2), numbers(2, 2, 6))}, EXACT)
    feeds = {"x": numbers(3, 1, 1, 5), "y": numbers(4, 1, 1, 6), NUMBER: np.array([number])}
    with pytest.raises(Exception, match="the adapter is of another model"):
        run(None, feeds)
    operator.remove(number)
    with pytest.raises(Exception, match="no such adapter"):
        run(None, feeds | {"x": numbers(3, 1, 1, 4)})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a packed checkpoint, its export, two adapters and PEFT's logits with each."""
    root = tmp_path_factory.mktemp("llama")
    packed = checkpoint(root, FAMILIES["llama"])
    onnx = exported(packed, root / "onnx")
    wanted = {}
    for name, seed in (("one", 3), ("two", 4)):
        peft = trained(packed, root / f"peft_{name}", seed, r=5 + seed)
        wanted[name] = logits(peft, PROMPT)
        convert(root / f"peft_{name}", onnx, root / name)
    return onnx, {name: root / name for name in wanted}, wanted


def test_every_way_to_hold_adapters_gives_pefts_logits(llama, monkeypatch):
    onnx, files, wanted = llama
    model = OnnxModel(onnx, files)
    assert isinstance(model._adapters, held_adapters.ByOperator)
    monkeypatch.setattr(held_adapters, "open_operator", lambda on_gpu: None)
    plain = OnnxModel(onnx, files)
    assert isinstance(plain._adapters, held_adapters.AsInputs)
    for name, expected in wanted.items():
        same(model.logits(PROMPT, name), expected)
        same(plain.logits(PROMPT, name), expected)
    same(model.logits(PROMPT), plain.logits(PROMPT))


def test_generators_in_turn_keep_their_own_adapter(llama):
    onnx, files, _ = llama
    model = OnnxModel(onnx, files)
    chosen = ["one", None, "two", "one"]
    alone = [model.generate(PROMPT, 8, name) for name in chosen]
    generators = [model.generator(len(PROMPT) + 8, name) for name in chosen]
    for generator in generators:
        generator.append_tokens(np.array([PROMPT], np.int32))
    for _ in range(8):
        for generator in generators:
            if not generator.is_done():
                generator.generate_next_token()
    for generator, answer in zip(generators, alone, strict=True):
        assert [int(t) for t in generator.get_sequence(0)][len(PROMPT) :][: len(answer)] == answer


def test_an_adapter_that_is_unloaded_or_whose_model_is_gone_frees_its_number(llama, operator):
    onnx, files, _ = llama
    model = OnnxModel(onnx, files)
    model.unload("one")
    with pytest.raises(KeyError):
        model.generate(PROMPT, 1, "one")
    model.load("one", files["two"])
    assert model.generate(PROMPT, 4, "one") == model.generate(PROMPT, 4, "two")
    number = model._adapters._numbers["two"]
    generator = model.generator(20, "two")
    del model
    with pytest.raises(Exception, match="no such adapter"):
        generator.append_tokens(np.array([PROMPT], np.int32))
    operator.remove(number)  # again: nothing happens


def test_an_adapter_for_other_projections_is_refused(llama, tmp_path):
    _, files, _ = llama
    packed = checkpoint(tmp_path, FAMILIES["llama"])
    fewer = exported(packed, tmp_path / "fewer", targets=["o_proj"])
    with pytest.raises(UserError, match=r"one: .*there is no .* in lora_op.onnx that takes one"):
        OnnxModel(fewer, files)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_folder.cache_clear()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(library.Unavailable, match="no C compiler: install gcc or clang"):
        library.compiled()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(library.Unavailable, match="false failed"):
        library.compiled()
    assert list((tmp_path / "olive-lab").iterdir()) == []  # nothing half-written
    library.cache_folder.cache_clear()


def test_the_compiler_is_what_cc_says_in_one_word_or_several(monkeypatch, tmp_path):
    def compiler(name: str) -> Path:
        made = tmp_path / name
        made.touch(mode=0o755)
        return made

    monkeypatch.setenv("PATH", str(tmp_path))
    gcc, ccache = compiler("gcc"), compiler("ccache")
    monkeypatch.setenv("CC", "ccache gcc -pipe")
    assert library.found_compiler() == [str(ccache), "gcc", "-pipe"]
    monkeypatch.setenv("CC", "x86_64-conda-linux-gnu-cc")  # of an environment that is gone
    assert library.found_compiler() == [str(gcc)]
    monkeypatch.delenv("CC")
    cc = compiler("cc")
    assert library.found_compiler() == [str(cc)]


def test_a_folder_that_nothing_may_be_run_from_is_named(monkeypatch, tmp_path):
    # as with /tmp and /home mounted noexec (pytorch/pytorch#91005, #123054)
    def refused(*_, **__):
        raise OSError("libadd_lora.so: failed to map segment from shared object")

    monkeypatch.setattr(library.ctypes, "CDLL", refused)
    with pytest.raises(library.Unavailable, match=r"noexec\?\): let XDG_CACHE_HOME name a folder"):
        library.Operator(tmp_path / "libadd_lora.so", on_gpu=False)


def test_without_a_home_it_is_compiled_for_the_process_alone(monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "in it"))
    library.cache_folder.cache_clear()
    assert library.compiled().is_file()
    assert not library.compiled().is_relative_to(Path.home())
    library.cache_folder.cache_clear()


def test_the_graph_with_the_operator_shares_the_weights(llama):
    onnx, _, _ = llama
    graph = load(onnx / OPERATOR_GRAPH, load_external_data=False).graph
    named = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    assert named == {"model.onnx.data"}
    assert NUMBER in [value.name for value in graph.input]
    assert json.loads((onnx / "genai_config.json").read_text())["model"]["decoder"]["filename"] == (
        "model.onnx"
    )
