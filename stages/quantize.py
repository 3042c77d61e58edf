"""Quantize the base model to 4 bits: models/base to models/quantized (Olive's packed checkpoint).

    python -m stages.quantize        # conf/quantize says how: awq or rtn

The raw metrics compare perplexity, on prose and on task text that calibration never saw, of the float model,
of plain rounding (RTN) and of what was made. With several GPUs each does a part of AWQ, in a process of its
own that runs this module again (`quantize_model`); the first alone writes and measures.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from stages.core.errors import UserError
from stages.core.files import in_megabytes, size_of, write_json, written_beside
from stages.core.places import places
from stages.core.ranks import join, place, rank, run_ranks
from stages.core.running import run, run_as_rank
from stages.core.settings import Quantize, Settings
from stages.quantization.architecture import bits_by_module, projections
from stages.quantization.awq import Awq
from stages.quantization.calibration import calibration_set, heldout_prose, task_text
from stages.quantization.perplexity import perplexities
from stages.text.conversation import read_conversations
from stages.weights.checkpoint import empty_model
from stages.weights.hardware import device

BASE = Path("models/base")
PREPARED = Path("data/prepared")
QUANTIZED = Path("models/quantized")
HELDOUT = Path("data/heldout.txt")
METRICS = Path("metrics/raw/quantize.json")
COST = Path("metrics/speed/quantize.json")
AGAIN = "run `dvc repro` again (with fewer quantize.processes if the machine's memory ran out)"
SMALLEST_GROUP = 16  # of the kernels that run the graph


def quantize(settings: Settings) -> str:
    """Check, then quantize, in as many processes as settings and GPUs ask for."""
    options = settings.quantize
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    check(options, config)
    gpus = places_of(options, config.num_hidden_layers)
    if len(gpus) == 1:
        quantize_model(settings)
    else:
        run_ranks("stages.quantize", gpus, AGAIN)
    before, after = in_megabytes(size_of(BASE)), in_megabytes(size_of(QUANTIZED))
    ranks = f", {len(gpus)} processes" if len(gpus) > 1 else ""
    return f"{QUANTIZED} by {options.method} ({before} to {after}){ranks}"


def quantize_model(settings: Settings) -> None:
    """Quantize, measure, save; all ranks do their part of the first, the first rank the others."""
    options = settings.quantize
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    texts = heldout_texts(options)  # before the work: they may be too short
    join("gloo")
    with tempfile.TemporaryDirectory() as scratch:
        awq_or_rtn = make_pass(options, config, Path(scratch))
        if rank() > 0:
            awq_or_rtn.run(base_handler(options), scratch)
            return
        with written_beside(QUANTIZED) as folder:
            awq_or_rtn.run(base_handler(options), str(folder))
            metrics = perplexities(BASE, folder, texts, options) if texts else {}
            metrics |= {"bytes_base": size_of(BASE), "bytes_quantized": size_of(folder)}
            write_json(METRICS, metrics)


def places_of(options: Quantize, layers: int) -> list[str]:
    """Return a GPU for every process that quantize.processes asks for; rounding alone needs one."""
    wanted = options.processes
    if options.method == "rtn":
        if wanted not in ("auto", 1):
            print("quantize: quantize.processes changes nothing with quantize=rtn", flush=True)
        wanted = 1
    return places("quantize.processes", wanted, layers, device() == "cuda")


def check(options: Quantize, config: PretrainedConfig) -> None:
    """Raise before any work when the model and the settings do not fit."""
    if unknown := set(options.eight_bit_modules) - set(projections(config)):
        raise UserError(
            f"quantize.eight_bit_modules has {min(unknown)!r}: "
            f"must be some of {', '.join(projections(config))}"
        )
    if options.processes != "auto" and options.processes > config.num_hidden_layers:
        raise UserError(
            f"quantize.processes is {options.processes}: must be auto or at most {config.num_hidden_layers}, "
            "the number of layers, of which each process takes some"
        )
    check_group_size(config, options.group_size)


def heldout_texts(options: Quantize) -> dict[str, torch.Tensor]:
    """Return what perplexity is measured on, [sequences, length] each; nothing where none is wanted."""
    if not options.perplexity_sequences:
        return {}
    task = task_text(BASE, read_conversations(PREPARED / "validation.jsonl"), options)
    return {"perplexity": heldout_prose(BASE, HELDOUT, options), "task_perplexity": task}


def check_group_size(config: PretrainedConfig, group_size: int) -> None:
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
                f"{fitting} does"
                if fitting >= SMALLEST_GROUP
                else "none that the kernels support does"
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


def make_pass(options: Quantize, config: PretrainedConfig, scratch: Path) -> Pass:
    """Return the Olive pass that `quantize.method` names, configured."""
    described = pass_config(options, config)
    if options.method == "rtn":
        return create_pass_from_dict(Rtn, described, disable_search=True)
    tokens = calibration_set(BASE, read_conversations(PREPARED / "calibration.jsonl"), options)
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    described |= {"scale_grid": options.scale_grid, "tuning_steps": options.tuning_steps}
    described |= {"calibration": str(scratch / "tokens.safetensors")}
    return create_pass_from_dict(Awq, described, disable_search=True)


def pass_config(options: Quantize, config: PretrainedConfig) -> dict[str, Any]:
    """Return what every quantizing pass of Olive is told."""
    bits = bits_by_module(options, config)
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "lm_head": options.lm_head_bits < 16,
        "embeds": options.embedding_bits < 16,
        "overrides": {name: {"bits": number} for name, number in bits.items() if number < 16},
    }


if __name__ == "__main__":
    run_as_rank(quantize_model) if place() else run(quantize, COST)
