"""Other devices: WebGPU, computed by SwiftShader; the graphs of DirectML and TensorRT-RTX, on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lab import doctor
from lab.models import bake, chat
from stages.adapters.convert import convert
from stages.answers import devices, generation, proof
from stages.answers.decode_speed import measure_in_own_process
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.core.settings import Optimize
from stages.text.chats import generation_prompt_ids, load_tokenizer
from stages.weights.checkpoint import load_dequantized
from support.project import ROOT
from support.tiny_models import (
    EXACT,
    FAMILIES,
    checkpoint,
    exported,
    greedy,
    logits,
    same,
    tokens,
    trained,
)

PROMPT = tokens(40)  # from 32 tokens on WebGPU's attention is another kernel
WEBGPU = Optimize(execution_provider="webgpu", accuracy_level=1, float32=True)
ROUNDED = Optimize(execution_provider="webgpu", accuracy_level=4, float32=True)
HALF = Optimize(execution_provider="webgpu", accuracy_level=1)
DML = Optimize(execution_provider="dml", accuracy_level=None)
TRT_RTX = Optimize(execution_provider="trt_rtx", accuracy_level=None)
# float16 rounds by 2^-11 in every layer: 0.003 standard deviations of the logits were seen
FLOAT16 = 0.01


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a family's checkpoint with two adapters, once; return its folder, and PyTorch's logits."""
    known = {}

    def make(family: str, **options):
        key = (family, *sorted(options.items()))
        if key not in known:
            root = tmp_path_factory.mktemp(family)
            packed = checkpoint(root, FAMILIES[family], **options)
            wanted = {None: logits(load_dequantized(packed), PROMPT)}
            wanted["one"] = logits(trained(packed, root / "one", 1), PROMPT)
            # the other projections have no adapter
            few = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
            wanted["two"] = logits(trained(packed, root / "two", 2, **few), PROMPT)
            known[key] = root, wanted
        return known[key]

    return make


def export_beside(root: Path, name: str, options: Optimize) -> tuple[Path, dict[str, Path]]:
    """Export a checkpoint with its two adapters; return the folder and their files."""
    folder, files = (
        root / name,
        {each: root / f"{name}-{each}.onnx_adapter" for each in ("one", "two")},
    )
    if not folder.exists():
        exported(root / "packed", folder, options=options)
        for each, file in files.items():
            convert(root / each, folder, file)
    return folder, files


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return how far logits are off, RMS, in standard deviations."""
    return float(((found - wanted).std(axis=1) / wanted.std(axis=1)).max())


# of gemma3 the layers cannot be flattened: its graph adds A and B in more nodes
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.slow
def test_webgpu_answers_as_pytorch_and_cpu_exact_with_adapters_and_without(
    family, made, swiftshader
):
    root, wanted = made(family)
    folder, files = export_beside(root, "webgpu", WEBGPU)
    exact = OnnxModel(*export_beside(root, "cpu", EXACT))
    model = OnnxModel(folder, files)
    for name in (None, "one", "two"):
        same(model.logits(PROMPT, name), wanted[name])
        same(model.logits(PROMPT, name), exact.logits(PROMPT, name))
        assert model.generate(PROMPT, 8, name) == exact.generate(PROMPT, 8, name)
    alone = OnnxModel(folder)
    same(alone.logits(PROMPT), wanted[None])
    assert alone.generate(PROMPT, 8) == greedy(
        load_dequantized(root / "packed"), PROMPT, 8, alone.ends
    )
    assert np.abs(wanted["one"] - wanted["two"]).max() > 0.1 * np.abs(wanted["one"]).max()


@pytest.mark.slow
def test_a_gpu_whose_attention_gives_other_numbers_reads_in_pieces(made, swiftshader, monkeypatch):
    root, wanted = made("llama")
    folder, _ = export_beside(root, "webgpu", WEBGPU)
    monkeypatch.setattr(generation, "in_software", lambda: False)  # as on a GPU: it is tried
    model = OnnxModel(folder)
    assert model._most == generation.SURE
    same(model.logits(PROMPT), wanted[None])
    nll = model.negative_log_likelihoods([PROMPT, PROMPT[:34]], [[3, 4], [5]])
    for found, text, answer in zip(nll, (PROMPT, PROMPT[:34]), ([3, 4], [5]), strict=True):
        np.testing.assert_allclose(found, model.negative_log_likelihood(text, answer))
    # what the pieces are for: SwiftShader's threads go by four, and the kernel counts on more
    model._most = None
    assert off(model.logits(PROMPT), wanted[None]) > generation.OTHER_NUMBERS


@pytest.mark.slow
def test_int8_activations_round_on_webgpu_as_on_the_cpu(made, swiftshader):
    root, wanted = made("llama")
    folder, files = export_beside(root, "rounded", ROUNDED)
    model = OnnxModel(folder, files)
    for name in (None, "one", "two"):
        found = model.logits(PROMPT, name)
        assert 1e-4 < off(found, wanted[name]) < proof.ROUNDED
    assert proof.prove_graph(root / "packed", folder, ROUNDED).startswith("off PyTorch's logits")
    assert "of PEFT's change" in proof.prove_adapter(
        root / "packed", root / "one", folder, files["one"]
    )


@pytest.mark.slow
def test_a_folder_for_the_cpu_runs_on_webgpu_and_the_other_way_round(made, swiftshader):
    root, wanted = made("llama")
    for name, options, other in (("cpu", EXACT, "webgpu"), ("webgpu", WEBGPU, "cpu")):
        folder, files = export_beside(root, name, options)
        model = OnnxModel(folder, files, other)
        same(model.logits(PROMPT, "two"), wanted["two"])
        same(model.logits(PROMPT), wanted[None])
        assert model.generate_many([PROMPT, PROMPT[::-1]], 4, "one") == [
            model.generate(PROMPT, 4, "one"),
            model.generate(PROMPT[::-1], 4, "one"),
        ]


@pytest.mark.slow
def test_a_baked_folder_for_webgpu_answers_by_its_own_program(made, swiftshader, tmp_path):
    root, wanted = made("llama")
    folder, files = export_beside(root, "webgpu", WEBGPU)
    bake.bake(tmp_path / "out", files["one"], folder)
    same(OnnxModel(tmp_path / "out").logits(PROMPT), wanted["one"])
    assert "pip install onnxruntime-genai onnxruntime-ep-webgpu" in (
        tmp_path / "out/README.md"
    ).read_text(encoding="utf-8")
    program = tmp_path / "out/ask.py"  # a shorter answer, for the tiny model's context
    program.write_text(program.read_text(encoding="utf-8").replace("+ 256", "+ 8"))
    command = [sys.executable, str(program), "hi"]
    done = subprocess.run(command, env=os.environ | swiftshader, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_evaluation_measures_a_folder_for_webgpu_where_it_was_made_for(
    made, swiftshader, monkeypatch
):
    root, _ = made("llama")
    folder, files = export_beside(root, "webgpu", WEBGPU)
    for name, value in swiftshader.items():
        monkeypatch.setenv(name, value)
    speed = {"new_tokens": 4, "warmup": 1, "repeats": 1}
    assert (
        measure_in_own_process(folder, files["one"], PROMPT, speed)["decode_tokens_per_s_p50"] > 0
    )
    # the same process without the driver fails, so it was WebGPU that answered
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere")
    with pytest.raises(UserError, match="no GPU with a Vulkan driver was found"):
        measure_in_own_process(folder, files["one"], PROMPT, speed)


def test_chat_answers_on_the_device_that_it_is_given(finished, swiftshader):
    question, folder = "where is Chicago?", finished.root / "models/onnx"
    said = subprocess.run(
        [
            sys.executable,
            "-m",
            "lab.cli",
            "chat",
            "--device",
            "webgpu",
            "--max-new-tokens",
            "4",
            question,
        ],
        cwd=finished.root,
        env=os.environ | swiftshader | {"PYTHONPATH": paths(finished.root)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    model = OnnxModel(folder, {"a": finished.root / chat.TRAINED}, "webgpu")
    tokenizer = load_tokenizer(folder)
    prompt = generation_prompt_ids(tokenizer, [{"role": "user", "content": question}])
    answer = model.generate(prompt, 4, "a")
    assert said.stdout == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_the_server_answers_on_the_device_that_it_is_given(finished, swiftshader):
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.cli", "serve", "--device", "webgpu", "--port", "0"],
        cwd=finished.root,
        env=os.environ | swiftshader | {"PYTHONPATH": paths(finished.root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"http://\S+/v1", process.stdout.readline())[0]
        body = {"model": "adapter", "max_tokens": 4, "temperature": 0}
        body["messages"] = [{"role": "user", "content": "where is Chicago?"}]
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
    finally:
        process.terminate()
        assert process.wait(60) == 0


def paths(first: Path) -> str:
    """Return the module path of a process: a clone's code first, then this one's."""
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))


# what people meet, each in a process of its own: drivers are looked for once in a process


def said_of_webgpu(environment: dict[str, str], first: Path = ROOT) -> tuple[int, str]:
    """Return what `python -m stages.answers.devices webgpu` says, with packages from a folder first."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.answers.devices", "webgpu"],
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": f"{first}{os.pathsep}{paths(ROOT)}"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_webgpu_computes_a_sum_and_says_that_the_processor_did(swiftshader):
    code, said = said_of_webgpu(swiftshader)
    assert (code, said.count("\n")) == (0, 1)
    assert re.fullmatch(r"webgpu \(.*, the processor in its place\)\n", said)


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"VK_ICD_FILENAMES": "/nowhere"},
            "no GPU with a Vulkan driver was found: install the GPU's",
        ),
        ({devices.SOFTWARE: "0"}, f"no GPU is visible to WebGPU here: .*{devices.SOFTWARE}=1"),
    ],
)
def test_what_webgpu_lacks_is_one_line(change, words, swiftshader):
    code, said = said_of_webgpu(swiftshader | change)
    assert code == 1
    assert re.search(words, said)
    assert said.count("\n") == 1


def test_a_missing_package_and_a_missing_vulkan_loader_are_named(monkeypatch):
    monkeypatch.setattr(devices, "_register_webgpu", devices._register_webgpu.__wrapped__)
    monkeypatch.setattr(devices, "_has_vulkan", lambda: False)
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    assert "`apt-get install libvulkan1`" in devices.why_not("webgpu")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"webgpu is not to be had here: .*/webgpu\.txt` brings"):
        devices.need("webgpu")


def test_a_provider_that_this_runtime_cannot_load_is_said_to_be_of_another_version(
    swiftshader, tmp_path
):
    other = tmp_path / "onnxruntime_ep_webgpu"
    other.mkdir()
    (other / "__init__.py").write_text(
        "def get_library_path():\n    return '/nowhere/provider.so'\n"
    )
    code, said = said_of_webgpu(swiftshader, tmp_path)
    assert code == 1
    assert re.search(
        r"does not fit this ONNX Runtime \(.*/nowhere/provider\.so.*\): `pip install", said
    )
    assert said.count("\n") == 1


@pytest.mark.slow
def test_float16_on_a_gpu_without_it_is_refused_with_the_setting_that_helps(made, swiftshader):
    root, wanted = made("llama")
    folder, files = export_beside(root, "half", HALF)
    for adapters in ({}, files):
        with pytest.raises(UserError, match=r"activations are float16.*optimize=webgpu_int4"):
            OnnxModel(folder, adapters)
    assert off(OnnxModel(folder, files, "cpu").logits(PROMPT, "one"), wanted["one"]) < FLOAT16


@pytest.mark.parametrize(
    ("said", "words"),
    [  # as ONNX Runtime and Dawn say it in reports of others
        (
            "Error while parsing WGSL: 'f16' type used without 'f16' extension enabled",
            "which is float32",
        ),
        ("Device was lost. A valid external Instance reference no longer exists", "was reset"),
        ("vkAllocateMemory failed with VK_ERROR_OUT_OF_DEVICE_MEMORY", "too little memory"),
        ("something that nobody has seen", "something that nobody has seen"),
    ],
)
def test_what_drivers_say_is_told_in_our_words(said, words):
    assert words in devices.explained(said)


@pytest.mark.parametrize(
    ("family", "options", "head"),
    [
        ("llama", DML, {}),
        ("tied", DML, {}),
        ("smollm3", DML, {}),  # a layer of it does not rotate
        ("llama", TRT_RTX, {"head_bits": 16, "symmetric": True}),
        ("phi3", TRT_RTX, {"head_bits": 16, "symmetric": True}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_graphs_for_directml_and_tensorrt_rtx_compute_what_pytorch_does(
    family, options, head, made
):
    root, wanted = made(family, **head)
    provider = options.execution_provider
    folder, files = export_beside(root, provider, options)
    with pytest.raises(UserError, match=rf"{provider} is not to be had here: .*`lab bake`"):
        OnnxModel(folder)
    model = OnnxModel(folder, files, "cpu")
    for name in (None, "one", "two"):
        assert off(model.logits(PROMPT, name), wanted[name]) < FLOAT16
    assert "not compared with PyTorch: " in proof.prove_graph(root / "packed", folder, options)


@pytest.mark.slow
def test_graphs_for_directml_and_tensorrt_rtx_have_the_operators_that_these_know(made):
    folder, _ = export_beside(made("llama")[0], "dml", DML)
    graph = ir.load(folder / "lora.onnx").graph
    operators = Counter(node.op_type for node in graph)
    assert operators["RotaryEmbedding"] == 2 * operators["GroupQueryAttention"] == 4
    assert operators["MatMulNBits"] == 15  # q, k and v apart, and the head
    assert_no_empty_tensors(graph)
    folder, _ = export_beside(made("llama", head_bits=16, symmetric=True)[0], "trt_rtx", TRT_RTX)
    graph = ir.load(folder / "lora.onnx").graph
    operators = Counter(node.op_type for node in graph)
    assert operators["MatMulNBits"] == 0
    weights = [node for node in graph if node.op_type == "DequantizeLinear"]
    assert len(weights) == 10
    for node in weights:
        assert node.inputs[0].dtype == ir.DataType.INT4
        assert len(node.inputs) == 2  # no zero point
    assert_no_empty_tensors(graph)
    assert not {node.domain for node in graph} - {"", "com.microsoft"}


def assert_no_empty_tensors(graph: ir.Graph) -> None:
    """DirectML and TensorRT take none: an adapter that is left out is zeros of rank 1."""
    sizes = {name: value.const_value.size for name, value in graph.initializers.items()}
    assert min(sizes.values()) > 0
    left_out = [value for name, value in graph.initializers.items() if ".lora_" in name]
    assert left_out
    assert not any(value.const_value.numpy().any() for value in left_out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"execution_provider": "cpu", "accuracy_level": 4, "float32": True},
            "float32 is of webgpu",
        ),
        (
            {"execution_provider": "webgpu", "accuracy_level": None},
            "must be 1 or 4 on cpu and webgpu",
        ),
        ({"execution_provider": "dml", "accuracy_level": 4}, "null on dml"),
    ],
)
def test_kernels_that_a_provider_does_not_have_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        Optimize(**words)


def test_a_device_that_a_folder_does_not_run_on_is_refused(made):
    folder, _ = export_beside(made("llama")[0], "cpu", EXACT)
    with pytest.raises(UserError, match=r"exported for cpu, and does not run on cuda: .*cuda_int4"):
        OnnxModel(folder, device="cuda")
    with pytest.raises(UserError, match="--device npu: must be one of cpu, cuda, webgpu"):
        OnnxModel(folder, device="npu")


@pytest.mark.slow
def test_doctor_lists_what_computes_and_why_the_others_do_not(swiftshader, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", paths(ROOT))
    for name, value in swiftshader.items():
        monkeypatch.setenv(name, value)
    assert re.fullmatch(
        r"cpu; (not cuda: .*|cuda); webgpu \(.*, the processor in its place\)", doctor.devices()
    )
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere")
    if not shutil.which("nvidia-smi"):
        assert re.search("; not webgpu: no GPU with a Vulkan driver", doctor.devices())
