"""Train the adapter: the body of the finetune stage.

    train(options, "SmolLM2")        # after keep_or_clear_checkpoints(options)

TRL trains on rows packed end to end, and only on the answers. The order of rows is laid out beforehand, for
all steps. A killed run leaves checkpoints outside DVC's outputs; the next run with the same settings, rows
and base goes on from the last one and ends with the same adapter, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations.liger import apply_liger_kernel
from trl import SFTConfig, SFTTrainer

from stages.core.errors import UserError
from stages.core.running import (
    RUNTIME,
    peak_memory,
    write_json,
    written_beside,
)
from stages.core.settings import Finetune
from stages.text.chats import (
    NOT_LEARNED,
    Row,
    check_rows,
    load_tokenizer,
    read_rows,
    training_tokens,
    writes_the_date,
)
from stages.training.lora_product import fuse_products
from stages.training.packed_attention import PACKED, boundaries
from stages.training.shared_prefix import share_opening
from stages.weights.checkpoint import load_dequantized, load_packed
from stages.weights.hardware import device, fast_dtype

QUANTIZED = Path("models/quantized")
PREPARED = Path("data/prepared")
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/raw/finetune.json")
COST = RUNTIME / "training.json"
CHECKPOINTS = Path("models/.finetune")
LOWER = "nothing is saved: lower finetune.lr, or look at the data"
NAMED = 20  # rows that a warning names; the others are counted
# Norms, activations and rotations in one kernel each; the loss is our own.
LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def train(options: Finetune, base: str) -> None:
    """Load, train, save the adapter, which names its base, and its loss curve."""
    set_seed(options.seed)
    tokenizer = load_tokenizer(QUANTIZED)
    train, validation = load_rows(tokenizer, options)
    train = laid_out(train, options)
    model = load_base(options)
    check_targets(model, options)
    trainer = make_trainer(model, tokenizer, train, validation, options)
    trainer.add_callback(StopsWhenNotFinite())
    fuse_products(trainer.model)
    checkpoint = last_complete_checkpoint()
    if checkpoint:
        print(f"finetune: goes on from step {checkpoint.rpartition('-')[2]}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    refuse_not_finite(trainer.model)
    with written_beside(ADAPTER) as folder:
        save(trainer.model, folder, base)
    write_json(METRICS, loss_curve(trainer))
    write_json(COST, training_cost(trainer))


def load_base(options: Finetune) -> torch.nn.Module:
    """Return the frozen base in the fast dtype: dequantized, or packed to save memory."""
    load = load_packed if options.base == "packed" else load_dequantized
    model = load(QUANTIZED, fast_dtype())
    if device() == "cuda":
        model.set_attn_implementation(PACKED)
        apply_liger_kernel(model, LIGER)
    else:  # torch's fused kernel with a mask takes twice as long there as plain matrix products
        model.set_attn_implementation("eager")
    return model


def load_rows(tokenizer: PreTrainedTokenizerBase, options: Finetune) -> tuple[Dataset, Dataset]:
    """Return the tokens and labels of training rows and of a sample of validation rows.

    Raises `UserError` that names the rows of which the chat template makes something else.
    """
    names = (
        "train",
        "validation",
        "test",
    )  # the last, so that evaluate does not fail after the training
    train, validation, test = (read_rows(PREPARED / f"{name}.jsonl") for name in names)
    changed = check_rows(tokenizer, [*train, *validation, *test])
    warn("rows with an answer that the chat template shows changed, cut or not at all", changed)
    if writes_the_date(tokenizer):
        print("finetune: the chat template writes today's date: 26 July 2024 in every row and chat")
    validation = validation[:: max(1, len(validation) // options.validation_rows)]
    splits = {"train": train, "validation": validation}
    return tuple(fitting(tokenizer, rows, name, options) for name, rows in splits.items())


def fitting(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], name: str, options: Finetune
) -> Dataset:
    """Return rows cut to finetune.max_length; those that keep no answer are left out, and named.

    A cut answer is trained on as far as it goes: nothing teaches the model to end there.
    Raises `UserError` where no row keeps an answer.
    """
    kept, cut, left_out = [], [], []
    for row in rows:
        tokens, labels = training_tokens(tokenizer, row)
        short = {"input_ids": tokens[: options.max_length], "labels": labels[: options.max_length]}
        if all(label == NOT_LEARNED for label in short["labels"][1:]):
            left_out.append(row["source"])
            continue
        kept.append(short)
        if len(tokens) > options.max_length:
            cut.append(row["source"])
    limit = f"finetune.max_length is {options.max_length}"
    if not kept:
        raise UserError(
            f"{limit}: no row of {name} keeps a token of its answer "
            f"({named(left_out)}): raise it, or bring shorter prompts"
        )
    warn(f"{limit}: {name} rows that keep no answer and are left out", left_out)
    warn(f"{limit}: {name} rows whose answer loses its end", cut)
    return Dataset.from_list(kept)


def warn(what: str, sources: list[str]) -> None:
    """Print how many rows something happened to, and which."""
    if sources and int(os.environ.get("RANK", "0")) == 0:
        print(f"finetune: {what}: {len(sources)} ({named(sources)})", flush=True)


def named(sources: list[str]) -> str:
    """Return the first of the rows' file:line, and dots for the others."""
    return ", ".join([*sources[:NAMED], *(["..."] if len(sources) > NAMED else [])])


def laid_out(rows: Dataset, options: Finetune) -> Dataset:
    """Return the rows of all steps in their order: shuffled anew for every pass over them.

    Read from first to last, they need no random state that a resumed run would have to restore.
    """
    shuffle = random.Random(options.seed)
    order: list[int] = []
    while len(order) < options.max_steps * options.batch_size:
        order += shuffle.sample(range(len(rows)), len(rows))
    return rows.select(order[: options.max_steps * options.batch_size])


class StopsWhenNotFinite(TrainerCallback):
    """Stops with one line at the first logged loss or gradient that is no number."""

    def on_log(self, args, state, control, logs=None, **_):
        """Raise `UserError`; the checkpoints go too, for the next run would go on from one of them."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(float((logs or {}).get(name, 0.0))):
                shutil.rmtree(CHECKPOINTS, ignore_errors=True)
                raise UserError(f"{name} is not finite at step {state.global_step}: {LOWER}")


def refuse_not_finite(model: torch.nn.Module) -> None:
    """Raise `UserError` if a trained weight is NaN or infinite, before anything is saved."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            shutil.rmtree(CHECKPOINTS, ignore_errors=True)
            raise UserError(f"the trained {name} is not finite: {LOWER}")


def check_targets(model: torch.nn.Module, options: Finetune) -> None:
    """Raise unless every name in finetune.target_modules is a linear of the model."""
    linears = linears_of(model)
    if options.target_modules != "all-linear" and (
        unknown := set(options.target_modules) - set(linears)
    ):
        raise UserError(
            f"finetune.target_modules has {sorted(unknown)[0]!r}: "
            f"must be all-linear or some of {', '.join(linears)}"
        )


def linears_of(model: torch.nn.Module) -> list[str]:
    """Return the names that linears have in the decoder's layers."""
    modules = model.model.named_modules()
    return sorted(
        {name.rpartition(".")[2] for name, part in modules if isinstance(part, torch.nn.Linear)}
    )


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, with logits for the answers' tokens alone.

    Its own fused head also computes entropy and accuracy for logging: a CPU spends more time on those
    than on the rest of the step.
    """

    tokens_seen = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross entropy of the answers' tokens in one packed row, [1, tokens]."""
        self.tokens_seen += inputs["labels"].numel() if model.training else 0
        if device() == "cuda":
            inputs |= boundaries(inputs["position_ids"])
        else:
            inputs = share_opening(inputs, model.config)
        targets = inputs.pop("labels")[0, 1:]
        kept = (targets != NOT_LEARNED).nonzero()[:, 0]
        outputs = model(**inputs, use_cache=False, logits_to_keep=kept)
        total = cross_entropy(outputs.logits[0].float(), targets[kept], reduction="sum")
        loss = total / (len(kept) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def keep_or_clear_checkpoints(options: Finetune) -> None:
    """Keep the checkpoints that a killed run of the same settings and inputs left, clear others.

    They live outside DVC's outputs, which DVC removes before it starts the stage.
    """
    wanted = fingerprint(options)
    mark = CHECKPOINTS / "fingerprint"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(CHECKPOINTS, ignore_errors=True)
        CHECKPOINTS.mkdir(parents=True)
        mark.write_text(wanted, encoding="utf-8")


def last_complete_checkpoint() -> str | None:
    """Return the newest checkpoint whose last file, the trainer's state, was written to its end."""
    steps = {int(f.name.rpartition("-")[2]): f for f in CHECKPOINTS.glob("checkpoint-*")}
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return str(folder)
    return None


def fingerprint(options: Finetune) -> str:
    """Return a sha256 over the settings and over all that dvc.yaml has finetune depend on."""
    digest = hashlib.sha256(f"{options.model_dump_json()} torch {torch.__version__}".encode())
    stage = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]["finetune"]
    for path in map(Path, stage["deps"]):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def make_trainer(model, tokenizer, train, validation, options: Finetune) -> AnswerTrainer:
    """Put model, data and settings into TRL's trainer."""
    return AnswerTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_arguments(options),
        train_dataset=train,
        eval_dataset=validation,
        peft_config=lora_config(options, model),
    )


def lora_config(options: Finetune, model: torch.nn.Module) -> LoraConfig:
    """Return PEFT's description of the adapter."""
    targets, layers = options.target_modules, None
    if options.layers == "upper_half":
        count = model.config.num_hidden_layers
        layers = list(range(count // 2, count))
        # PEFT takes layers only beside names
        targets = linears_of(model) if targets == "all-linear" else targets
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def training_arguments(options: Finetune) -> SFTConfig:
    """Translate conf/finetune into TRL's arguments; nothing is uploaded or logged elsewhere."""
    return SFTConfig(
        output_dir=str(CHECKPOINTS),
        use_cpu=device() == "cpu",
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        max_length=None,  # `fitting` has cut the rows
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        logging_steps=5,
        logging_nan_inf_filter=False,  # it would report the loss before as this one's
        save_strategy="steps",
        save_steps=options.eval_steps,
        save_total_limit=1,
        report_to=[],
        seed=options.seed,
        train_sampling_strategy="sequential",  # `laid_out` has chosen the order
        bf16=False,  # no autocast: the base is in the fast dtype already, the adapter in float32
        padding_free=True,  # rows end to end, each with positions of its own, so none sees another
        gradient_checkpointing=options.gradient_checkpointing,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def save(model, folder: Path, base: str) -> None:
    """Save the adapter in PEFT's format, with its settings in an order that does not change."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def loss_curve(trainer: AnswerTrainer) -> dict[str, Any]:
    """Return the training and validation loss by step, and the last of each."""
    history = trainer.state.log_history
    train = [{"step": e["step"], "loss": round(e["loss"], 4)} for e in history if "loss" in e]
    validation = [
        {"step": e["step"], "loss": round(e["eval_loss"], 4)} for e in history if "eval_loss" in e
    ]
    return {"train": train, "validation": validation}


def training_cost(trainer: AnswerTrainer) -> dict[str, float]:
    """Return the seconds of the training loop, its tokens per second and the GPU memory that it took."""
    seconds = next(e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e)
    tokens = trainer.tokens_seen
    cost = {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds)}
    return cost | peak_memory()
