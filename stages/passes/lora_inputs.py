"""An Olive pass that gives an ONNX graph optional LoRA inputs: one base graph for every adapter.

    create_pass_from_dict(LoraInputs, {"target_modules": ["q_proj"]}).run(onnx_model, out)

Behind the matrix product of every targeted projection, y = x·W, the graph becomes y = x·W + (x·A)·B.
A, [in, rank], and B, [rank, out], are graph inputs with rank-0 defaults, so without an adapter the sum
adds nothing. A projection that the graph fuses (qkv_proj) gets one pair of inputs for all its parts:
`adapt` puts their adapters side by side. lora_inputs.json beside the graph lists the pairs.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from onnx import GraphProto, NodeProto, TensorProto, helper

SITES_FILE = "lora_inputs.json"
PROJECTION = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul(NBits)?$")
# the modules that an adapter may target, by the projection of the graph that they end up in
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class Site:
    """A projection of the graph that takes an adapter: x, [.., in_features] to [.., out_features].

    `parts` maps the modules that the projection is made of to their [first, last) output columns.
    """

    prefix: str
    projection: str
    in_features: int
    out_features: int
    parts: dict[str, list[int]]

    @property
    def input_names(self) -> tuple[str, str]:
        """Return the names of the graph inputs A and B."""
        stem = f"{self.prefix}.{self.projection}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


class LoraInputs(Pass):
    """Add optional LoRA inputs to a graph that ModelBuilder made."""

    @classmethod
    def _default_config(cls, accelerator_spec):
        return {
            "target_modules": PassConfigParam(
                type_=list[str],
                default_value=None,
                description="modules that adapters may target; all projections by default",
            )
        }

    def _run_for_config(self, model: ONNXModelHandler, config, output_model_path):
        source, folder = Path(model.model_path), Path(output_model_path)
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        proto = onnx.load(folder / source.name, load_external_data=False)
        heads = head_columns(folder / "genai_config.json")
        sites = add_inputs(proto.graph, config.target_modules, heads)
        onnx.save(proto, folder / source.name)
        listed = [asdict(site) for site in sites]
        (folder / SITES_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        return ONNXModelHandler(folder, onnx_file_name=source.name)


def read_sites(folder: str | Path) -> list[Site]:
    """Read the sites of a graph that this pass wrote."""
    text = Path(folder, SITES_FILE).read_text(encoding="utf-8")
    return [Site(**site) for site in json.loads(text)]


def head_columns(genai_config: Path) -> list[int]:
    """Return the output columns of q_proj, k_proj and v_proj."""
    decoder = json.loads(genai_config.read_text(encoding="utf-8"))["model"]["decoder"]
    keys = decoder["num_key_value_heads"] * decoder["head_size"]
    return [decoder["num_attention_heads"] * decoder["head_size"], keys, keys]


def add_inputs(graph: GraphProto, targets: list[str] | None, heads: list[int]) -> list[Site]:
    """Edit the graph in place and return the sites that now take an adapter."""
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    nodes, sites = [], []
    for node in graph.node:
        nodes.append(node)
        site = site_of(node, sizes, heads)
        if site is not None and is_targeted(site, targets):
            nodes += lora_nodes(node, site)
            declare_inputs(graph, site, element_type(graph))
            sites.append(site)
    del graph.node[:]
    graph.node.extend(nodes)
    return sites


def site_of(node: NodeProto, sizes: dict[str, list[int]], heads: list[int]) -> Site | None:
    """Return the site at a projection's matrix product, None at any other node."""
    match = PROJECTION.match(node.name)
    if match is None:
        return None
    layer, block, projection = match.group(1), match.group(2), match.group(3)
    in_features, out_features = features(node, sizes)
    names = PARTS.get(projection, (projection,))
    widths = heads if len(names) == 3 else [out_features]
    parts, first = {}, 0
    for name, width in zip(names, widths, strict=True):
        parts[name] = [first, first + width]
        first += width
    prefix = f"model.layers.{layer}.{'self_attn' if block == 'attn' else 'mlp'}"
    return Site(prefix, projection, in_features, out_features, parts)


def features(node: NodeProto, sizes: dict[str, list[int]]) -> tuple[int, int]:
    """Return (in, out) of a MatMulNBits or MatMul node."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return attributes["K"], attributes["N"]
    in_features, out_features = sizes[node.input[1]]
    return in_features, out_features


def is_targeted(site: Site, targets: list[str] | None) -> bool:
    """Say whether an adapter for `targets` puts anything at this site."""
    if targets is None:
        return True
    accepted = set(site.parts) | {FUSED.get(part, part) for part in site.parts}
    return bool(accepted & set(targets))


def lora_nodes(product: NodeProto, site: Site) -> list[NodeProto]:
    """Return the nodes that add (x·A)·B to a product, whose output they take over by name."""
    output = product.output[0]
    stem = product.name.rsplit("/", 1)[0] + "/lora"
    base, low, high = f"{stem}/base", f"{stem}/low", f"{stem}/high"
    product.output[0] = base
    a, b = site.input_names
    return [
        helper.make_node("MatMul", [product.input[0], a], [low], name=f"{stem}/A/MatMul"),
        helper.make_node("MatMul", [low, b], [high], name=f"{stem}/B/MatMul"),
        helper.make_node("Add", [base, high], [output], name=f"{stem}/Add"),
    ]


def declare_inputs(graph: GraphProto, site: Site, dtype: int) -> None:
    """Declare A and B as inputs of any rank, with defaults of rank 0."""
    rank = f"{site.prefix}.{site.projection}.rank"
    shapes = ([site.in_features, rank], [rank, site.out_features])
    for name, shape in zip(site.input_names, shapes, strict=True):
        graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
        empty = [0 if dimension == rank else dimension for dimension in shape]
        graph.initializer.append(TensorProto(name=name, data_type=dtype, dims=empty, raw_data=b""))


def element_type(graph: GraphProto) -> int:
    """Return the activations' type: that of the logits."""
    return graph.output[0].type.tensor_type.elem_type
