"""An Olive pass that builds an ONNX graph with onnxruntime-genai's own model builder.

    create_pass_from_dict(GenaiBuilder, {"accuracy_level": 4}, accelerator_spec=...).run(checkpoint, out)

Olive's packed integers go into the graph as they are, head and embedding included, and nothing else is
quantized: PyTorch on the dequantized checkpoint and the graph compute with the same weights. The builder is
handed a copy of the checkpoint in the form that it reads without mistakes (`for_the_builder`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from olive.hardware.constants import ExecutionProvider
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from onnxruntime_genai.models import builder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from stages.adapters.lora_inputs import BASE_MODULES, FUSED
from stages.answers.limits import Limits
from stages.core.errors import UserError
from stages.graph.olmo2 import Olmo2Model
from stages.graph.packed_embedding import (
    HEAD,
    PackedEmbedding,
    Tensors,
    pack_embedding,
    scale_embedding,
    take_embedding,
)
from stages.graph.rotation import rotate_as_pytorch
from stages.weights.families import FAMILIES

GRAPH = "model.onnx"
# the builder's names
BUILT_FOR = {
    ExecutionProvider.CPUExecutionProvider: "cpu",
    ExecutionProvider.CUDAExecutionProvider: "cuda",
    ExecutionProvider.WebGpuExecutionProvider: "webgpu",
    ExecutionProvider.DmlExecutionProvider: "dml",
    ExecutionProvider.NvTensorRTRTXExecutionProvider: "NvTensorRtRtx",
}


class GenaiBuilder(Pass):
    """Build model.onnx, model.onnx.data, genai_config.json and the tokenizer of a packed checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec):
        return {
            "accuracy_level": PassConfigParam(
                type_=int,
                default_value=None,
                description="activations of the kernels of CPU and WebGPU: 1 is float, 4 is int8",
            ),
            "float32": PassConfigParam(
                type_=bool, default_value=False, description="WebGPU: float32 instead of float16"
            ),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        folder, source = Path(output_model_path), Path(model.model_path)
        provider = BUILT_FOR[self.accelerator_spec.execution_provider]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            checkpoint, built = Path(scratch, "checkpoint"), Path(scratch, "onnx")
            embedding, modules = for_the_builder(source, checkpoint)
            build(checkpoint, built, provider, config.accuracy_level, config.float32)
            # ONNX Runtime's files alone; the builder's cache folder stays behind
            for file in built.iterdir():
                if file.is_file():
                    shutil.move(file, folder)
        finish(folder / GRAPH, embedding, modules, float_config(source))
        keep_every_position(folder / "genai_config.json")
        Limits(rope_switch(source)).write(folder)
        return ONNXModelHandler(folder, onnx_file_name=GRAPH)


def build(
    checkpoint: Path, out: Path, provider: str, accuracy_level: int | None, float32: bool = False
) -> None:
    """Run the builder. What the checkpoint holds as floats stays float, whatever the builder's defaults."""
    words = ["fuse_qkv=true", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    words.append("windowed_kv_cache=false")  # see keep_every_position
    if accuracy_level is not None:
        words.append(f"accuracy_level={accuracy_level}")
    if float32:
        words.append("use_webgpu_fp32=true")
    where = ("", str(checkpoint), str(out), "int4", provider, str(out.parent / "cache"))
    options = builder.parse_extra_options(*where, words)
    with fusing_without_zero_points(), knowing_olmo2():
        builder.create_model(*where, **options)


@contextmanager
def fusing_without_zero_points() -> Iterator[None]:
    """Let the builder fuse q, k and v of a symmetric checkpoint, whose zero points it takes for granted."""
    fuse = builder.Model.make_packed_matmul_int4_class

    def fuse_any(model: Any, *parts: Any) -> Any:
        if any(getattr(part, "qzeros", "none needed") is not None for part in parts):
            return fuse(model, *parts)
        for part in parts:
            part.qzeros = torch.empty(0)
        fused = fuse(model, *parts)
        for each in (fused, *parts):
            each.qzeros = None
        return fused

    builder.Model.make_packed_matmul_int4_class = fuse_any
    try:
        yield
    finally:
        builder.Model.make_packed_matmul_int4_class = fuse


@contextmanager
def knowing_olmo2() -> Iterator[None]:
    """Let the builder make OLMo 2 and 3, which it has no class for, where it would make OLMo."""
    olmo = builder.OLMoModel
    builder.OLMoModel = Olmo2Model
    try:
        yield
    finally:
        builder.OLMoModel = olmo


def keep_every_position(genai_config: Path) -> None:
    """Let the runtime keep all keys and values of a model with a sliding window.

    The attention masks what is outside the window. The runtime's own window would drop keys in the middle of
    a long prompt, and then stops with an error.
    """
    config = json.loads(genai_config.read_text(encoding="utf-8"))
    config["model"]["decoder"].pop("sliding_window", None)
    genai_config.write_text(json.dumps(config, indent=4), encoding="utf-8")


def for_the_builder(source: Path, target: Path) -> tuple[PackedEmbedding | None, list[str]]:
    """Write the checkpoint as the builder reads it; return what of it the graph needs beside that.

    That is its embedding, where it is packed, and the names of its projections.

    The builder knows no packed embedding, so it gets an empty one, to be replaced in the graph. It finds no
    head where Olive ties a packed one to the embedding, so that is written out. And it cuts the zero points
    of fused projections at the wrong rows, so these come apart here.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(source)
    check_head(tensors, config, source)
    embedding, modules = take_embedding(tensors, config), projections(tensors)
    split_fused(tensors, config)
    explain_rope(config)
    explain_family(config, float_config(source))
    # clones, as two names may not share memory in a file
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return embedding, modules


def read_tensors(folder: Path) -> Tensors:
    """Return every tensor of a checkpoint by name."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def check_head(tensors: Tensors, config: dict, folder: Path) -> None:
    """Raise `UserError` where there is no head and nothing says that it is the embedding."""
    tied = config.get("tie_word_embeddings") or config["quantization_config"]["tie_word_embeddings"]
    if not tied and not {f"{HEAD}.weight", f"{HEAD}.qweight"} & set(tensors):
        raise UserError(f"{folder}: lm_head.weight is missing, and config.json does not tie it")


def split_fused(tensors: Tensors, config: dict) -> None:
    """Cut fused projections into those that the builder reads, by rows, in place."""
    overrides = config["quantization_config"].get("overrides") or {}
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        stem, _, leaf = module.rpartition(".")
        if leaf in FUSED:
            # Olive packs along the inputs, so a row of any kind (integers, scales, zero points) is one output
            pieces = tensors.pop(name).split(widths(leaf, config))
            for part, piece in zip(FUSED[leaf], pieces, strict=True):
                tensors[f"{stem}.{part}.{kind}"] = piece
                if module in overrides:
                    overrides[f"{stem}.{part}"] = overrides[module]


def explain_rope(config: dict) -> None:
    """Write the rope settings as the builder reads them, in place.

    It reads longrope's type by its old name only, and takes every phi3 that was trained on shorter texts for
    longrope. Of every other type it overlooks or refuses some part in some family, so it is told of plain
    positions: PyTorch's are put into the graph (`rotate_as_pytorch`).
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "longrope":
        rope["type"] = kind
        return
    config.pop("rope_scaling", None)
    config.pop("original_max_position_embeddings", None)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    if part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor")):
        plain["partial_rotary_factor"] = part
    config["rope_parameters"] = plain
    if config["model_type"] == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]


def explain_family(config: dict, full: PretrainedConfig) -> None:
    """Name the family as the builder knows it, in place.

    The builder goes by the architecture, and reads its settings through the class of the model type.
    """
    family = config["model_type"]
    if built_as := FAMILIES[family].built_as:
        # what the file leaves to its own class, another class would fill in otherwise: Gemma 2 caps logits
        config |= {key: value for key, value in full.to_dict().items() if key not in config}
        config["model_type"], architecture = built_as
        config["architectures"] = [architecture]
    if family == "gemma3_text":
        # its name of old, which the builder asks for; PyTorch's tables replace what is made of it
        config["rope_local_base_freq"] = 10000.0
    if family == "smollm3":
        # the builder stops at a layer that does not rotate: `rotate_as_pytorch` sees to those
        config["no_rope_layers"] = [1] * config["num_hidden_layers"]


def widths(fused: str, config: dict) -> list[int]:
    """Return the output widths of a fused projection's parts."""
    if fused == "gate_up_proj":
        return [config["intermediate_size"]] * 2
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    keys = (config.get("num_key_value_heads") or heads) * size
    return [heads * size, keys, keys]


def projections(tensors: Tensors) -> list[str]:
    """Return the names of a checkpoint's linear layers, as its modules are cut: what adapters may target."""
    names = re.findall(r"layers\.\d+\.\w+\.(\w+)\.q?weight", "\n".join(tensors))
    return sorted({name for name in names if name.endswith("_proj")})


def float_config(checkpoint: Path) -> PretrainedConfig:
    """Return a packed checkpoint's settings without those of its packing."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    del config.quantization_config
    return config


def windows(config: PretrainedConfig) -> list[int]:
    """Return how many tokens each layer's attention looks back on, -1 for all of them."""
    window = getattr(config, "sliding_window", None) or -1
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def rope_switch(checkpoint: Path) -> int | None:
    """Return the longest text, in tokens, that a longrope model rotates by its short factors."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings")
    return original or config.original_max_position_embeddings


def sign_weights(graph: ir.Graph, path: Path) -> None:
    """Store 4-bit weights as the signed numbers that their element type says, as TensorRT-RTX reads them.

    The builder copies Olive's unsigned ones, whose middle is 8, and calls them INT4: every product would be
    another. A bit of each is turned, in the data file.
    """
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        tensor = node.inputs[0].const_value
        if len(node.inputs) > 2 or tensor.dtype != ir.DataType.INT4:
            raise ValueError(f"{node.name} has a zero point: quantize.symmetric must be true")
        with path.with_name(tensor.location).open("r+b") as data:
            data.seek(tensor.offset or 0)
            packed = np.frombuffer(data.read(tensor.nbytes), np.uint8)
            data.seek(tensor.offset or 0)
            data.write((packed ^ 0x88).tobytes())


def finish(
    path: Path, embedding: PackedEmbedding | None, modules: list[str], config: PretrainedConfig
) -> None:
    """Put into a saved graph what the builder leaves out.

    That are the sliding windows, PyTorch's rotations, the packed embedding and its exact scale, and the names
    of the base's modules.
    """
    model = ir.load(path)
    # the builder adds the commit of the repository around its own package: ours, where .venv lies in it
    model.producer_version = (model.producer_version or "").partition("+")[0]
    model.metadata_props[BASE_MODULES] = ",".join(modules)
    sign_weights(model.graph, path)
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node, window in zip(attention, windows(config), strict=True):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
    rotate_as_pytorch(attention, config, path)
    if config.model_type == "gemma3_text":
        scale_embedding(model.graph, config.hidden_size**0.5)
    if embedding is not None:
        pack_embedding(model, path, embedding)
    ir.save(model, path)
