"""Quantize the base model to 4 bits: models/base to models/quantized (Olive's packed checkpoint).

    python -m stages.quantize        # conf/quantize says how: awq, rtn or gptq

The raw metrics compare perplexity, on text that calibration never saw, of the float model, of plain
rounding (RTN) and of what was made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from olive.common.quant.utils import WeightQuantizer
from olive.data.registry import Registry
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.gptq import Gptq
from olive.passes.pytorch.rtn import Rtn
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from stages.architecture import check_family, projections
from stages.chats import read_rows, sequences
from stages.checkpoint import load_dequantized, load_float, load_tokenizer
from stages.errors import UserError
from stages.passes.awq import Awq
from stages.perplexity import perplexity
from stages.running import in_megabytes, run, size_of, write_json, written_beside
from stages.settings import Quantize, Settings

BASE = Path("models/base")
PREPARED = Path("data/prepared")
QUANTIZED = Path("models/quantized")
METRICS = Path("metrics/raw/quantize.json")


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
    if options.method == "awq":
        check_family(config)
    if unknown := set(options.eight_bit_modules) - set(projections(config)):
        raise UserError(
            f"quantize.eight_bit_modules has {sorted(unknown)[0]!r}: "
            f"must be some of {', '.join(projections(config))}"
        )
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name, 0)  # RTN takes families that name it otherwise
        if width % options.group_size:
            raise UserError(
                f"quantize.group_size is {options.group_size}: must divide the model's {name} {width}"
            )
    if options.perplexity_sequences:
        validation_text(options)


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
    tokens = calibration_set(options)
    if options.method == "gptq":
        return create_pass_from_dict(
            Gptq, gptq_config(config, tokens, scratch), disable_search=True
        )
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    search = {
        "calibration": str(scratch / "tokens.safetensors"),
        "scale_grid": options.scale_grid,
        "clip_grid": options.clip_grid,
        "clip_min": options.clip_min,
    }
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


def gptq_config(config: dict[str, Any], tokens: torch.Tensor, scratch: Path) -> dict[str, Any]:
    """Return the settings of Olive's Gptq, fed with our calibration set."""
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    dataset = {
        "type": "calibration_tokens",
        "params": {"path": str(scratch / "tokens.safetensors")},
    }
    data = {
        "name": "calibration",
        "load_dataset_config": dataset,
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
    }
    return config | {"data_config": data}


@Registry.register_dataset()
def calibration_tokens(path: str, **_) -> list[tuple[dict, torch.Tensor]]:
    """Return the calibration set as Olive's data containers want it: inputs and (unused) labels."""
    rows = load_file(path)["tokens"]
    return [({"input_ids": row, "attention_mask": torch.ones_like(row)}, row) for row in rows]


def calibration_set(options: Quantize) -> torch.Tensor:
    """Return the calibration set, [sequences, length]."""
    rows = read_rows(PREPARED / "calibration.jsonl")
    return sequences(
        load_tokenizer(BASE), rows, options.calibration_sequences, options.calibration_length
    )


def validation_text(options: Quantize) -> torch.Tensor:
    """Return text that calibration never saw, [sequences, length]: unseen groups where there are any."""
    rows = read_rows(PREPARED / "validation.jsonl")
    unseen = [row for row in rows if row["kind"] == "transfer"] or rows
    return sequences(
        load_tokenizer(BASE), unseen, options.perplexity_sequences, options.calibration_length
    )


def measure(options: Quantize, quantized: Path) -> dict[str, Any]:
    """Return bytes before and after, and the perplexities unless none are wanted."""
    sizes = {"bytes_base": size_of(BASE), "bytes_quantized": size_of(quantized)}
    return perplexities(options, quantized) | sizes if options.perplexity_sequences else sizes


def perplexities(options: Quantize, quantized: Path) -> dict[str, float]:
    """Return the perplexity of the float model, of plain rounding, and of what was made."""
    text = validation_text(options)
    model = load_float(BASE)
    metrics = {"perplexity_float": perplexity(model, text, "float")}
    round_to_nearest(model, options)
    metrics["perplexity_rtn"] = perplexity(model, text, "RTN")
    del model
    metrics["perplexity_quantized"] = perplexity(load_dequantized(quantized), text, options.method)
    return {name: round(value, 3) for name, value in metrics.items()}


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, options: Quantize) -> None:
    """Round in place what a pass would quantize, as Olive's `Rtn` does."""
    special = mixed_bits(options)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied
    for name, module in model.named_modules():
        bits = special.get(name, options.bits)
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and bits < 16:
            quantizer = WeightQuantizer(bits, options.symmetric, options.group_size)
            module.weight.copy_(quantizer.fake_quantize(module.weight))


if __name__ == "__main__":
    run(quantize)
