"""The work of `lab merge`: an adapter into 4-bit weights, and what that did to the answers.

add_adapter(quantized, peft, merged)                      # W + scaling·BA as a float checkpoint
quantize_merged(merged, rows, settings.quantize, packed)  # rounded again, with error compensation
predictions, figures = compare(merged_onnx, onnx, adapter_file, rows, settings)

Rounding W + scaling·BA to the grid that W lies on loses the adapter: most of its changes are below half a
step. So the merged weights get a grid of their own, and what rounding does to the task's own text is made
up for, column by column, as in the quantize stage.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from lab.review.intervals import intervals as changes_of
from stages.adapters.names import LORA_GRAPH, OPERATOR_GRAPH
from stages.adapters.peft_adapter import Pair
from stages.answers.decode_speed import measure_in_own_process
from stages.answers.generation import OnnxModel
from stages.answers.proof import prove_graph
from stages.core.errors import UserError
from stages.core.files import size_of
from stages.core.running import quietly
from stages.core.settings import Evaluate, Quantize, Settings
from stages.evaluate import ADAPTER, Answer, Prompt, answer_all, sample, score, tokenize
from stages.graph.export import export
from stages.graph.genai_builder import float_config
from stages.quantization.architecture import projections
from stages.quantization.awq import Awq
from stages.quantization.calibration import calibration_set
from stages.quantize import pass_config
from stages.scoring.bootstrap import intervals
from stages.scoring.metrics import summarize
from stages.scoring.predictions import MODELS, Parity, Prediction
from stages.text.chats import load_tokenizer
from stages.text.conversation import Conversation
from stages.weights.checkpoint import empty_model, load_dequantized

# Of calibration's text, the part that the merged model writes itself; the rest are training conversations.
# With a half, as quantize has it for prose, recall fell to 0.886, from 0.977 (benchmarks/results/merge.json)
SELF_TEXT_SHARE = 0.0
# off by at most 1/2048 of a merged weight, where a step of 4 bits is a fifteenth of its group's range
DTYPE = torch.float16


def check_fits(modules: dict[str, Pair], quantized: Path) -> None:
    """Raise `UserError` unless every module of the adapter is a projection of the model, in its shape."""
    config = float_config(quantized)
    linears = dict(linears_of(config))
    for module, (a, b) in modules.items():
        leaf = module.rpartition(".")[2]
        if leaf not in projections(config):
            raise UserError(
                f"the adapter targets {module}, but the model in {quantized} has no {leaf} in its "
                f"layers: it has {', '.join(projections(config))}"
            )
        if module not in linears:
            raise UserError(
                f"the adapter targets {module}, and the model in {quantized} has "
                f"{config.num_hidden_layers} layers: the adapter belongs to another model"
            )
        found, wanted = [b.shape[1], a.shape[0]], list(linears[module].weight.shape)
        if found != wanted:
            raise UserError(
                f"{module} is {found} in the adapter, but {wanted} in {quantized}: "
                "the adapter belongs to another model"
            )


def linears_of(config: PretrainedConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears that a model of this configuration has, by name, without values."""
    for name, module in empty_model(config).named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def disk_needed(quantized: Path) -> int:
    """Return the bytes that a merge fills at its widest: the float weights, and 4-bit ones three times."""
    config = float_config(quantized)
    weights = sum(linear.weight.numel() for _, linear in linears_of(config))
    weights += config.vocab_size * config.hidden_size
    # the checkpoint, the copy of it that the exporter reads, and the graph's weights
    return weights * DTYPE.itemsize + 3 * size_of(quantized)


@torch.no_grad()
def add_adapter(quantized: Path, modules: dict[str, Pair], target: Path) -> None:
    """Write a checkpoint in float16: the weights that the adapter was trained on, with its change added."""
    model = load_dequantized(quantized, DTYPE)
    for name, (a, b) in tqdm(modules.items(), desc="adding the adapter", unit="module"):
        weight = model.get_submodule(name).weight
        down, up = (
            torch.from_numpy(np.ascontiguousarray(part)).to(weight.device) for part in (a, b)
        )
        weight.copy_(weight.float() + (down @ up).T)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"merged weights are too large for {DTYPE}: train with a lower lr or alpha")
    model.save_pretrained(target)
    # the tokenizer, the chat template and what ends an answer; weights and config.json are the merged model's
    for file in quantized.iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith(("config.", "model.")):
            shutil.copy(file, target)


def quantize_merged(
    merged: Path,
    rows: list[Conversation],
    options: Quantize,
    target: Path,
    self_text_share: float = SELF_TEXT_SHARE,
) -> None:
    """Write the packed checkpoint of a merged one: bits and groups as the settings say, calibrated on `rows`.

    By AWQ with error compensation whatever `quantize.method` is: plain rounding loses the adapter.
    """
    config = AutoConfig.from_pretrained(merged, trust_remote_code=False)
    options = options.model_copy(update={"self_text_share": self_text_share})
    tokens = calibration_set(merged, rows, options)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "tokens.safetensors")
        save_file({"tokens": tokens}, file)
        how = {"scale_grid": options.scale_grid, "tuning_steps": options.tuning_steps}
        described = pass_config(options, config) | how | {"calibration": str(file)}
        olive_pass = create_pass_from_dict(Awq, described, disable_search=True)
        olive_pass.run(
            HfModelHandler(str(merged), load_kwargs={"torch_dtype": "auto"}), str(target)
        )


def export_merged(packed: Path, settings: Settings, folder: Path) -> str:
    """Write the ONNX model of a merged checkpoint, which takes no adapter; say how far PyTorch's is off."""
    with quietly():
        export(packed, settings.optimize, None, folder)  # its adapter is in the weights
    return prove_graph(packed, folder, settings.optimize)


def compare(
    merged: Path, onnx: Path, adapter: Path, rows: list[Conversation], settings: Settings
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Ask both models what evaluate asks; return the answers with their scores, and speed and size.

    In the predictions the merged model is the adapter's, and the unmerged one stands where the base does,
    as what it is compared with.
    """
    options, tokenizer = settings.evaluate, load_tokenizer(merged)
    prompts = [tokenize(tokenizer, row) for row in sample(rows, options)]
    figures = costs(merged, onnx, adapter, prompts, options)
    unmerged = answer_all(OnnxModel(onnx, {ADAPTER: adapter}), ADAPTER, prompts, options)
    alone = answer_all(OnnxModel(merged), None, prompts, options)
    return judge(tokenizer, prompts, alone, unmerged), figures


def judge(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    merged: list[Answer],
    unmerged: list[Answer],
) -> list[Prediction]:
    """Return the scores of both models' answers, and which are the same, word for word."""
    pairs = zip(merged, unmerged, strict=True)
    same = {
        number: Parity(identical=mine.tokens == theirs.tokens)
        for number, (mine, theirs) in enumerate(pairs)
    }
    both = {"adapter": dict(enumerate(merged)), "base": dict(enumerate(unmerged))}
    return score(tokenizer, prompts, both, same)


def costs(
    merged: Path, onnx: Path, adapter: Path, prompts: list[Prompt], options: Evaluate
) -> dict[str, dict[str, float]]:
    """Return speed and bytes of the merged model, of the adapter on its base, and of that base."""
    job = options.speed.model_dump()
    text = [token for prompt in prompts for token in prompt.tokens]
    repeated = list(islice(cycle(text), job.pop("prompt_tokens")))
    kinds = {"merged": (merged, None), "adapter": (onnx, adapter), "base": (onnx, None)}
    found = {}
    for name, (folder, file) in tqdm(kinds.items(), desc="speed", unit="model"):
        # a flat folder: what else lies in the merged one is not finished yet
        shipped = {each.name: size_of(each) for each in folder.iterdir() if each.is_file()}
        if name == "base":  # without an adapter, nobody ships a graph that takes one
            shipped = {
                n: size for n, size in shipped.items() if n not in (LORA_GRAPH, OPERATOR_GRAPH)
            }
        total = sum(shipped.values()) + (size_of(file) if file else 0)
        found[name] = measure_in_own_process(folder, file, repeated, job) | {"bytes": total}
        del found[name][
            "peak_memory_mib"
        ]  # Linux counts what this process held when it started the other
    return found


def summary(predictions: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Return every metric of the merged and the unmerged model, with 95 % intervals, theirs and the change's.

    Both answered the same prompts, so that what is hard for both cancels out.
    """
    values, sure = summarize(predictions), intervals(predictions)
    unmerged = [
        replace(each, scores=dict.fromkeys(MODELS, each.scores["base"])) for each in predictions
    ]
    changes = changes_of(unmerged, predictions)
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in values if not name.endswith(MODELS["base"])):
        other = name + MODELS["base"]
        found[name] = {
            "merged": values[name],
            "merged_interval": rounded(sure[name]),
            "unmerged": values[other],
            "unmerged_interval": rounded(sure[other]),
            "change": round(values[name] - values[other], 4),
            "change_interval": rounded(changes[name]),
        }
    return found


def rounded(interval: tuple[float, float]) -> list[float]:
    """Return an interval to four digits behind the point."""
    return [round(end, 4) for end in interval]


def made_of(modules: dict[str, Pair]) -> str:
    """Say how large an adapter is."""
    ranks = sorted({a.shape[1] for a, _ in modules.values()})
    return f"{len(modules)} modules of rank {', '.join(map(str, ranks))}"
