"""Quantize the base model to 4 bits: models/base to models/quantized (Olive's packed checkpoint).

    python -m stages.quantize        # conf/quantize says how: awq or rtn

The raw metrics compare perplexity, on prose and on task text that calibration never saw, of the float model,
of plain rounding (RTN) and of what was made.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from olive.common.quant.utils import WeightQuantizer
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, set_seed

from stages.core.errors import UserError
from stages.core.running import in_megabytes, run, size_of, write_json, written_beside
from stages.core.settings import Quantize, Settings
from stages.quantization.architecture import projections
from stages.quantization.awq import Awq
from stages.quantization.perplexity import perplexity
from stages.text.chats import check_rows, load_tokenizer, read_rows, sequences
from stages.weights.checkpoint import empty_model, load_dequantized, load_float
from stages.weights.hardware import fast_dtype

BASE = Path("models/base")
PREPARED = Path("data/prepared")
QUANTIZED = Path("models/quantized")
HELDOUT = Path("data/heldout.txt")
METRICS = Path("metrics/raw/quantize.json")
PIECES = 64  # more fill a GPU's memory with keys and values
SMALLEST_GROUP = 16  # of the kernels that run the graph


def quantize(settings: Settings) -> str:
    """Check, quantize, measure, save."""
    options = settings.quantize
    check(options)
    with written_beside(QUANTIZED) as folder:
        with tempfile.TemporaryDirectory() as scratch:
            make_pass(options, Path(scratch)).run(base_handler(options), str(folder))
        metrics = measure(options, folder)
        write_json(METRICS, metrics)
    before, after = in_megabytes(size_of(BASE)), in_megabytes(size_of(QUANTIZED))
    return f"{QUANTIZED} by {options.method} ({before} to {after})"


def check(options: Quantize) -> None:
    """Raise before any work when the model, the data and the settings do not fit."""
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    if unknown := set(options.eight_bit_modules) - set(projections(config)):
        raise UserError(
            f"quantize.eight_bit_modules has {sorted(unknown)[0]!r}: "
            f"must be some of {', '.join(projections(config))}"
        )
    check_group_size(config, options.group_size)
    if options.perplexity_sequences:
        task_text(options)


def check_group_size(config, group_size: int) -> None:
    """Raise unless the group size divides the input width of every linear; name one that does."""
    widths = {
        name: linear.in_features
        for name, linear in empty_model(config).named_modules()
        if isinstance(linear, nn.Linear)
    }
    for name, width in widths.items():
        if width % group_size:
            fitting = math.gcd(*widths.values())
            fitting &= -fitting  # the largest power of two that divides them all
            advice = (
                f"{fitting} does" if fitting >= SMALLEST_GROUP else "no size of the kernels does"
            )
            raise UserError(
                f"quantize.group_size is {group_size}: does not divide {name}'s input {width}: {advice}"
            )


def base_handler(options: Quantize) -> HfModelHandler:
    """Hand the base model to Olive: whole in float32, so that scales are not rounded twice.

    AWQ widens one layer at a time by itself.
    """
    dtype = "auto" if options.method == "awq" else "float32"
    return HfModelHandler(str(BASE), load_kwargs={"torch_dtype": dtype})


def make_pass(options: Quantize, scratch: Path):
    """Return the Olive pass that `quantize.method` names, configured."""
    config = pass_config(options)
    if options.method == "rtn":
        return create_pass_from_dict(Rtn, config, disable_search=True)
    save_file({"tokens": calibration_set(options)}, scratch / "tokens.safetensors")
    search = {"calibration": str(scratch / "tokens.safetensors"), "scale_grid": options.scale_grid}
    return create_pass_from_dict(Awq, config | search, disable_search=True)


def pass_config(options: Quantize) -> dict[str, Any]:
    """Return what every quantizing pass of Olive is told."""
    bits = mixed_bits(options)
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "lm_head": options.lm_head_bits < 16,
        "embeds": options.embedding_bits < 16,
        "overrides": {name: {"bits": number} for name, number in bits.items() if number < 16},
    }


def mixed_bits(options: Quantize) -> dict[str, int]:
    """Return the bits, by name, of the modules that do not follow quantize.bits."""
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    bits = {"lm_head": options.lm_head_bits, "model.embed_tokens": options.embedding_bits}
    for module in options.eight_bit_modules:
        for layer in range(config.num_hidden_layers):
            bits[f"model.layers.{layer}.{projections(config)[module]}.{module}"] = 8
    return bits


def calibration_set(options: Quantize) -> torch.Tensor:
    """Return the calibration set, [sequences, length]: task text, and text that the model itself writes."""
    rows, length = read_rows(PREPARED / "calibration.jsonl"), options.calibration_length
    check_rows(load_tokenizer(BASE), rows)  # all of them: finetune trains on what calibration skips
    own = round(options.calibration_sequences * options.self_text_share)
    task = options.calibration_sequences - own
    parts = [torch.tensor(sequences(load_tokenizer(BASE), rows, task, length))] if task else []
    return torch.cat([*parts, self_text(own, length, options.seed)] if own else parts)


@torch.no_grad()
def self_text(count: int, length: int, seed: int) -> torch.Tensor:
    """Return text sampled from the float model at temperature 1, [count, length].

    A sequence is four pieces that each begin with a token drawn at random, so that no two are alike
    (LLM-QAT, arXiv:2305.17888), and PIECES are written at once. An embedding may have more rows than the
    tokenizer has tokens; those are never drawn.
    """
    model = load_float(BASE, fast_dtype())
    rows = set(range(model.config.vocab_size))
    known = rows & set(load_tokenizer(BASE).get_vocab().values())
    tokens, nobodys = torch.tensor(sorted(known)), sorted(rows - known)
    set_seed(seed)
    first = tokens[torch.randint(len(tokens), (4 * count, 1))].to(model.device)
    words = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    words |= {"suppress_tokens": nobodys} if nobodys else {}
    words |= dict.fromkeys(("min_new_tokens", "max_new_tokens"), length // 4 - 1)
    written = [
        model.generate(part, attention_mask=torch.ones_like(part), **words).cpu()
        for part in tqdm(first.split(PIECES), desc="the model's own text", unit="batch")
    ]
    return torch.cat(written).reshape(count, -1)


def task_text(options: Quantize) -> torch.Tensor:
    """Return task text that calibration never saw, [sequences, length]: unseen groups, if there are any."""
    rows = read_rows(PREPARED / "validation.jsonl")
    unseen = [row for row in rows if row["kind"] == "transfer"] or rows
    count = max(1, options.perplexity_sequences // 3)
    packed = sequences(load_tokenizer(BASE), unseen, count, options.calibration_length)
    return torch.tensor(packed)


def heldout_prose(options: Quantize) -> torch.Tensor:
    """Return prose from elsewhere (data/README.md), [sequences, length]."""
    tokens = load_tokenizer(BASE)(HELDOUT.read_text(encoding="utf-8")).input_ids
    count = min(options.perplexity_sequences, len(tokens) // options.calibration_length)
    return torch.tensor(tokens[: count * options.calibration_length]).view(count, -1)


def measure(options: Quantize, quantized: Path) -> dict[str, Any]:
    """Return bytes before and after, and the perplexities unless none are wanted."""
    sizes = {"bytes_base": size_of(BASE), "bytes_quantized": size_of(quantized)}
    return perplexities(options, quantized) | sizes if options.perplexity_sequences else sizes


def perplexities(options: Quantize, quantized: Path) -> dict[str, float]:
    """Return the perplexities of the float model, of plain rounding, and of what was made."""
    texts = {"perplexity": heldout_prose(options), "task_perplexity": task_text(options)}

    def all_of(model: nn.Module, label: str) -> dict[str, float]:
        named = {f"{name}_{label}": text for name, text in texts.items()}
        return {name: perplexity(model, text, name) for name, text in named.items()}

    model = load_float(BASE)
    found = all_of(model, "float")
    round_to_nearest(model, options)
    found |= all_of(model, "rtn")
    del model
    found |= all_of(load_dequantized(quantized), "quantized")
    lost, left = (
        found[f"perplexity_{m}"] - found["perplexity_float"] for m in ("rtn", "quantized")
    )
    found["rtn_loss_recovered"] = 1 - left / lost if lost else 0.0
    return {name: round(value, 3) for name, value in found.items()}


@torch.no_grad()
def round_to_nearest(model: nn.Module, options: Quantize) -> None:
    """Round in place what a pass would quantize, as Olive's `Rtn` does."""
    special = mixed_bits(options)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # untied
    for name, module in model.named_modules():
        bits = special.get(name, options.bits)
        if isinstance(module, nn.Linear | nn.Embedding) and bits < 16:
            quantizer = WeightQuantizer(bits, options.symmetric, options.group_size)
            module.weight.copy_(quantizer.fake_quantize(module.weight))


if __name__ == "__main__":
    run(quantize)
