"""No graph is handed on that computes something else than PyTorch on the same weights."""

import json

import numpy as np
import pytest

from stages.adapters.convert import convert
from stages.answers import proof
from stages.core.errors import UserError
from stages.core.settings import Optimize
from support.tiny_models import EXACT, FAMILIES, checkpoint, exported, trained

pytestmark = pytest.mark.slow
FAST = Optimize(execution_provider="cpu", accuracy_level=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Export a family at most once in this module; return its packed checkpoint and its ONNX folder."""
    made = {}

    def build(family: str, options: Optimize = EXACT):
        key = family, options.accuracy_level
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            packed = checkpoint(root, FAMILIES[family])
            made[key] = packed, exported(packed, root / "onnx", options=options)
        return made[key]

    return build


def edit(config, **values) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.mark.parametrize("options", [EXACT, FAST], ids=["float32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_exported_right_passes(family, options, built):
    packed, onnx = built(family, options)
    assert "off PyTorch's logits by" in proof.prove_graph(packed, onnx, options)


@pytest.mark.parametrize("options", [EXACT, FAST], ids=["float32", "int8"])
@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500.0},
    ],
    ids=lambda rotation: rotation["rope_type"],
)
def test_a_graph_with_another_rotation_than_pytorch_is_refused(rotation, options, built, tmp_path):
    """As from a builder that does not know the model's own rotation."""
    _, onnx = built("llama", options)
    packed = checkpoint(tmp_path, FAMILIES["llama"])
    edit(packed / "config.json", rope_parameters=rotation)
    with pytest.raises(UserError, match=r"after \d+ tokens its logits are off by .* deviations"):
        proof.prove_graph(packed, onnx, options)


def test_a_graph_for_a_gpu_that_is_not_here_is_said_to_be_unproven(built, monkeypatch):
    packed, onnx = built("llama")
    monkeypatch.setattr(proof, "device", lambda: "cpu")
    options = Optimize(execution_provider="cuda", accuracy_level=None)
    assert "no CUDA" in proof.prove_graph(packed, onnx, options)


def test_an_adapter_that_does_what_peft_says_passes(built, tmp_path):
    packed, onnx = built("llama")
    trained(packed, tmp_path / "peft", 1)
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    said = proof.prove_adapter(packed, tmp_path / "peft", onnx, tmp_path / "file")
    assert said == "1.00 of PEFT's change of the logits"


def test_an_adapter_that_is_applied_at_another_strength_is_refused(built, tmp_path):
    packed, onnx = built("llama")
    trained(packed, tmp_path / "peft", 1)
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    edit(tmp_path / "peft/adapter_config.json", lora_alpha=32)
    with pytest.raises(UserError, match="does not apply the adapter as PEFT does"):
        proof.prove_adapter(packed, tmp_path / "peft", onnx, tmp_path / "file")


def test_an_adapter_that_learned_nothing_is_said_to_change_nothing(built, tmp_path):
    packed, onnx = built("llama")
    trained(packed, tmp_path / "peft", 1, init_lora_weights=True)  # B is zero
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    said = proof.prove_adapter(packed, tmp_path / "peft", onnx, tmp_path / "file")
    assert "changes no logit" in said


def test_an_adapter_whose_change_drowns_in_rounding_is_said_to_be_too_small(built, tmp_path):
    packed, onnx = built("llama", FAST)
    trained(packed, tmp_path / "peft", 1, lora_alpha=1e-3)
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    said = proof.prove_adapter(packed, tmp_path / "peft", onnx, tmp_path / "file")
    assert "hardly more than rounding" in said


def test_logits_that_are_no_numbers_are_beyond_every_tolerance():
    with pytest.raises(UserError, match="after 2 tokens"):
        proof.widest_gap(np.eye(2), np.array([[1.0, 0.0], [np.nan, 1.0]]), [1, 2], 0.5)
