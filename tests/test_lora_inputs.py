"""The exported graph equals PyTorch: without an adapter, and with two adapters loaded at once."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnxruntime import InferenceSession
from peft import LoraConfig, PeftModel, get_peft_model

from stages import adapt, optimize, quantize, random_model
from stages.checkpoint import load_dequantized
from stages.errors import UserError
from stages.generation import OnnxModel
from stages.merge import export_merged
from stages.passes.lora_inputs import read_sites
from stages.settings import Optimize, validate

ROOT = Path(__file__).resolve().parents[1]
TOKENS = [5, 17, 33, 101, 7, 64, 80, 2]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


PLAIN_ROPE = {"original_max_position_embeddings": SHAPE["max_position_embeddings"]}
LONG_ROPE = {
    "original_max_position_embeddings": 128,
    "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0] * 8},
}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **PLAIN_ROPE},
    "phi3-longrope": {"model_type": "phi3", **LONG_ROPE},
}


@pytest.fixture(params=FAMILIES)
def workplace(request, tmp_path, monkeypatch, params):
    """A folder with a quantized tiny model and its graph, built by the stages' own code."""
    root = monkeypatch.chdir(tmp_path) or tmp_path
    corpus = root / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "what is the capital of France?"}) + "\n")
    (root / "models").mkdir()
    random_model.make(SHAPE | FAMILIES[request.param], 320, corpus, quantize.BASE)
    mixed = {"method": "rtn", "group_size": 32, "eight_bit_modules": ["down_proj"]}
    params["quantize"] |= mixed
    options = validate(params).quantize
    quantize.make_pass(options, root).run(quantize.base_handler(options), str(quantize.QUANTIZED))
    return root


def build(targets="all-linear", precision="int4") -> None:
    options = Optimize(execution_provider="cpu", precision=precision, accuracy_level=1, merge=False)
    graph = optimize.export(optimize.QUANTIZED, options, optimize.ONNX.parent / "scratch")
    optimize.add_lora_inputs(graph, targets, optimize.ONNX)


def train(folder, seed: int, targets="all-linear") -> PeftModel:
    """Make an adapter with random weights, save it, and return PyTorch's model with it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(load_dequantized(quantize.QUANTIZED), config)
    model.save_pretrained(folder)
    return model.eval()


def convert(source, target) -> str:
    """Convert a PEFT adapter as the stage does, and return the file."""
    weights = adapt.lay_out(adapt.read_adapter(source), read_sites(adapt.ONNX))
    weights = adapt.fit_to_graph(weights, adapt.ONNX / "model.onnx")
    adapt.save_weights(weights, target, adapt.WeightsFileFormat.ONNX_ADAPTER)
    return f"{target}.onnx_adapter"


@torch.no_grad()
def logits(model) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def same(left, right) -> None:
    np.testing.assert_allclose(left, right, atol=2e-3 * np.abs(right).max())


@pytest.mark.parametrize("option", ["cuda_int4", "cuda_fp16", "dml_int4", "webgpu_int4"])
def test_a_graph_for_a_gpu_takes_the_adapter_in_float16(workplace, option):
    settings = yaml.safe_load((ROOT / f"conf/optimize/{option}.yaml").read_text())
    scratch = optimize.ONNX.parent / "scratch"
    graph = optimize.export(optimize.QUANTIZED, Optimize(**settings), scratch)
    optimize.add_lora_inputs(graph, "all-linear", optimize.ONNX)
    InferenceSession(optimize.ONNX / "model.onnx", providers=["CPUExecutionProvider"])
    train(workplace / "one", 1)
    weights = adapt.lay_out(adapt.read_adapter(workplace / "one"), read_sites(optimize.ONNX))
    fitted = adapt.fit_to_graph(weights, optimize.ONNX / "model.onnx")
    assert {weight.dtype for weight in fitted.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_without_an_adapter_the_graph_is_the_quantized_model(workplace, precision):
    build(precision=precision)
    same(OnnxModel(optimize.ONNX).logits(TOKENS), logits(load_dequantized(quantize.QUANTIZED)))


def test_two_adapters_loaded_at_once_each_act_as_in_pytorch(workplace):
    build()
    one, two = train(workplace / "one", 1), train(workplace / "two", 2)
    files = {name: convert(workplace / name, workplace / f"{name}_file") for name in ("one", "two")}
    model = OnnxModel(optimize.ONNX, files)
    same(model.logits(TOKENS, "one"), logits(one))
    same(model.logits(TOKENS, "two"), logits(two))
    assert np.abs(logits(one) - logits(two)).max() > 0.1
    same(model.logits(TOKENS), logits(load_dequantized(quantize.QUANTIZED)))


def test_a_merged_model_answers_as_the_adapter_does_up_to_rounding(workplace):
    adapted = logits(train(workplace / "one", 1))
    options = Optimize(execution_provider="cpu", precision="int4", accuracy_level=1, merge=True)
    scratch, merged = workplace / "scratch", workplace / "merged"
    export_merged(quantize.QUANTIZED, workplace / "one", options, scratch, merged)
    rounding = np.abs(OnnxModel(merged).logits(TOKENS) - adapted).mean()
    effect = np.abs(logits(load_dequantized(quantize.QUANTIZED)) - adapted).mean()
    assert rounding < 0.5 * effect


def test_an_adapter_without_a_place_in_the_graph_is_refused(workplace):
    build(targets=["o_proj"])
    train(workplace / "wide", 1)
    with pytest.raises(UserError, match=r"has no LoRA input in models/onnx"):
        convert(workplace / "wide", workplace / "file")
    train(workplace / "narrow", 1, targets=["o_proj"])
    convert(workplace / "narrow", workplace / "file")


def test_every_input_has_a_default_of_rank_0(workplace):
    build()
    graph = onnx.load(optimize.ONNX / "model.onnx", load_external_data=False).graph
    defaults = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    names = [value.name for value in graph.input if ".lora_" in value.name]
    assert len(names) == 2 * len(read_sites(optimize.ONNX))
    assert all(0 in defaults[name] for name in names)
