"""What a GPU is told to hold: every entry names bytes of a file, which are the tensor's own."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from stages.adapters.convert import convert
from stages.adapters.lora_inputs import load_graph
from stages.adapters.names import LORA_GRAPH
from stages.answers.gpu_weights import SMALLEST, adapter_weights, base_weights
from stages.core.errors import UserError
from support.tiny_models import FAMILIES, checkpoint, exported, trained


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny export, and an adapter for it."""
    root = tmp_path_factory.mktemp("gpu")
    packed = checkpoint(root / "packed", FAMILIES["llama"])
    folder = exported(packed, root / "onnx")
    trained(packed, root / "peft", 3)
    convert(root / "peft", folder, root / "adapter.onnx_adapter")
    return folder, root / "adapter.onnx_adapter"


def bytes_of(entry: dict, folder) -> bytes:
    """Read an entry as the runtime does: its file is named from the model's folder."""
    with (folder / entry["data_file"]).open("rb") as stream:
        stream.seek(int(entry["offset"]))
        return stream.read(int(entry["length"]))


@pytest.mark.parametrize("graph", ["model.onnx", LORA_GRAPH])
def test_the_base_is_every_large_weight_of_a_graph(graph, model):
    folder, _ = model
    entries = {entry["name"]: entry for entry in base_weights(ir.load(folder / graph).graph)}
    weights = {
        name: value.const_value
        for name, value in ir.load(folder / graph).graph.initializers.items()
        if value.const_value.nbytes > SMALLEST
    }
    assert entries.keys() == weights.keys()
    for name, entry in entries.items():
        assert bytes_of(entry, folder) == weights[name].tobytes()
        assert entry["shape"] == [int(size) for size in weights[name].shape]
        assert entry["data_type"] == int(weights[name].dtype)
    json.dumps(list(entries.values()))  # as genai_config.json takes them


def test_an_adapter_is_read_where_it_lies_in_its_file(model):
    folder, file = model
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
    held = adapter.get_parameters()
    entries = adapter_weights(file, folder, load_graph(folder).graph)
    assert {entry["name"] for entry in entries} == held.keys()
    for entry in entries:
        array = held[entry["name"]].numpy()
        assert bytes_of(entry, folder) == array.tobytes()
        assert entry["shape"] == list(array.shape)


@pytest.mark.parametrize(
    "tensor",
    [
        {"model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((7, 4), np.float32)},
        {"model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((64, 4), np.float16)},
        {"model.layers.9.mlp.up_proj.lora_A.weight": np.zeros((64, 4), np.float32)},
    ],
    ids=["another width", "another type", "another layer"],
)
def test_an_adapter_of_another_model_is_refused_by_the_tensor_that_does_not_fit(
    tensor, model, tmp_path
):
    folder, _ = model
    adapter = onnxruntime.AdapterFormat()
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in tensor.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(tmp_path / "other.onnx_adapter"))
    with pytest.raises(UserError, match=rf"{next(iter(tensor))} .* is no input of lora.onnx"):
        adapter_weights(tmp_path / "other.onnx_adapter", folder, load_graph(folder).graph)
