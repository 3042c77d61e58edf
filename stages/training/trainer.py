"""The trainer: TRL's, on rows packed end to end, with the loss on answers only.

trainer = make_trainer(load_base(folder, options), tokenizer, train, validation, options, checkpoints)
train(trainer, checkpoints)
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from stages.core.errors import UserError
from stages.core.running import peak_memory
from stages.core.settings import Finetune
from stages.text.chat_encoder import NOT_LEARNED
from stages.training import checkpoints, together
from stages.training.lora_product import fuse_products
from stages.training.packed_attention import PACKED, boundaries
from stages.training.sharded import load_sharded
from stages.training.shared_prefix import share_prefix
from stages.training.trackers import add_trackers
from stages.training.watched import Watched
from stages.weights.checkpoint import load_dequantized, load_packed
from stages.weights.hardware import device, fast_dtype

PATIENCE = 4  # logged losses in a row: one may be a spike, from which a run recovers
LOWER = "nothing is saved: lower finetune.lr, or look at the data"
# Norms, activations and rotations in one kernel each; the loss is our own.
LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}


class Diverged(UserError):
    """The loss has left where it began, and does not come back."""


class NotFinite(Diverged):
    """A loss, gradient or trained weight is NaN or infinite."""


def load_base(folder: Path, options: Finetune) -> torch.nn.Module:
    """Return the frozen base in the fast dtype: dequantized, or packed to save memory."""
    if options.shard and together.count() > 1:
        model = load_sharded(folder, options, fast_dtype())
    else:
        load = load_packed if options.base == "packed" else load_dequantized
        model = load(folder, fast_dtype())
    check_targets(model, options)
    if device() == "cuda":
        model.set_attn_implementation(PACKED)
        apply_liger_kernel(model, LIGER)
    else:  # torch's fused kernel with a mask takes twice as long there as plain matrix products
        model.set_attn_implementation("eager")
    return model


def train(trainer: AnswerTrainer, folder: Path) -> None:
    """Train from the last complete checkpoint in `folder`, or from the start.

    Raises `Diverged` for a run that diverged. Its checkpoints go too: the next run would resume from one.
    """
    checkpoint = checkpoints.last_complete(folder)
    if checkpoint and together.rank() == 0:
        print(f"finetune: resumes from step {checkpoint.rpartition('-')[2]}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        refuse_not_finite(trainer.model)
    except Diverged:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class StopsWhenDiverged(TrainerCallback):
    """Stops with one line where the loss has left for good, or no gradient comes back any more."""

    def on_log(self, args, state, control, logs=None, model=None, **_):
        """Raise `Diverged`."""
        # of the trainer's own history, which a resumed run has too
        logged = [entry for entry in state.log_history if "loss" in entry]
        if "loss" not in (logs or {}) or len(logged) <= PATIENCE:
            return
        losses, last = [entry["loss"] for entry in logged], logged[-PATIENCE:]
        limit = highest_loss(losses, model.config.vocab_size)
        where = f"step {state.global_step}, in {PATIENCE} logs running"
        if min(losses[-PATIENCE:]) > limit:
            raise Diverged(
                f"the loss diverges: {losses[0]:.2f} at the start, {losses[-1]:.2f} at {where} "
                f"above {limit:.2f}: {LOWER}"
            )
        # of a model that has learned everything neither is exactly 0
        if not any(entry.get("grad_norm", 1.0) for entry in last) and min(losses[-PATIENCE:]) > 0.1:
            raise Diverged(
                f"the gradient is 0 at {where}, the loss {losses[-1]:.2f}, nothing more is learned: {LOWER}"
            )


def highest_loss(losses: Sequence[float], vocabulary: int) -> float:
    """Return the loss, in nats, above which a run has diverged that stays there.

    The first logged loss is the base's own, more or less: a mean of five steps of the warm-up. Rows differ,
    and a mean of five may be twice another's: so twice the start, and a nat for starts near 0. A run that was
    better than chance by a nat and then is not has diverged too: a model whose layers give nothing but zeros
    guesses evenly, at the logarithm of the vocabulary's size, which may be below twice the start.
    """
    chance = math.log(vocabulary) - 0.01
    return min(2 * losses[0] + 1, chance if min(losses) < chance - 1 else math.inf)


class StopsWhenNotFinite(TrainerCallback):
    """Stops with one line at the first logged loss or gradient that is not a number."""

    def on_log(self, args, state, control, logs=None, **_):
        """Raise `NotFinite`."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(float((logs or {}).get(name, 0.0))):
                raise NotFinite(f"{name} is not finite at step {state.global_step}: {LOWER}")


class Pace(TrainerCallback):
    """Keeps when the training loss was logged, which waits for the GPU; between two, only steps take time."""

    def __init__(self):
        self.logged: list[tuple[int, float]] = []

    def on_log(self, args, state, control, logs=None, **_):
        """Keep the step and the time."""
        if "loss" in (logs or {}):
            self.logged.append((state.global_step, time.perf_counter()))

    def seconds_a_step(self) -> float | None:
        """Return the median over the pieces between two logs: without start, checkpoints and validation."""
        pieces = [
            (later - sooner) / (last - first)
            for (first, sooner), (last, later) in pairwise(self.logged)
            if last > first
        ]
        return statistics.median(pieces) if pieces else None


def refuse_not_finite(model: torch.nn.Module) -> None:
    """Raise `NotFinite` if a trained weight is NaN or infinite, before anything is saved."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise NotFinite(f"the trained {name} is not finite: {LOWER}")


def check_targets(model: torch.nn.Module, options: Finetune) -> None:
    """Raise unless every name in finetune.target_modules is a linear of the model."""
    linears = linears_of(model)
    if options.target_modules != "all-linear" and (
        unknown := set(options.target_modules) - set(linears)
    ):
        raise UserError(
            f"finetune.target_modules has {min(unknown)!r}: "
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
    step_loss: torch.Tensor  # of the last step

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run both passes on this rank's rows; return the loss of the step, and leave its gradients."""
        if together.count() > 1:  # dropout: a resumed run has to draw what an undisturbed one does
            torch.manual_seed(hash((self.args.seed, self.state.global_step, together.rank())))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = together.summed(loss, trainable(model))
        return self.step_loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the answers' tokens in the step's rows of all ranks."""
        return together.total(super()._get_num_items_in_batch(batch_samples, device))

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Return the mean loss of the batches by their rows; the ranks take them in turns."""
        if together.count() == 1:
            prefix = {"metric_key_prefix": metric_key_prefix}
            return super().evaluation_loop(dataloader, description, *args, **prefix, **kwargs)
        self.model.eval()
        batches, rows = list(dataloader), len(dataloader.dataset)
        loss = 0.0
        for start in range(0, len(batches), together.count()):
            mine = start + together.rank()
            # a sharded base needs all ranks for a forward pass
            batch = self._prepare_inputs(batches[min(mine, len(batches) - 1)])
            weight = int((batch["position_ids"] == 0).sum()) if mine < len(batches) else 0
            with torch.no_grad():
                loss += weight * self.compute_loss(self.model, batch).item()
        metrics = {f"{metric_key_prefix}_loss": together.total(loss).item() / rows}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross entropy of the answers' tokens in one packed row, [1, tokens]."""
        self.tokens_seen += inputs["labels"].numel() if model.training else 0
        if device() == "cuda":
            inputs |= boundaries(inputs["position_ids"])
        else:
            inputs = share_prefix(inputs, model.config)
        targets = inputs.pop("labels")[0, 1:]
        # the head's product is as large as all layers' together; of most tokens its logits are not needed
        kept = (targets != NOT_LEARNED).nonzero()[:, 0]
        outputs = model(**inputs, use_cache=False, logits_to_keep=kept)
        total = cross_entropy(outputs.logits[0].float(), targets[kept], reduction="sum")
        # by the tokens of the whole step, or gradient accumulation would weigh short rows more
        loss = total / (len(kept) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    options: Finetune,
    checkpoints: Path,
) -> AnswerTrainer:
    """Put model, data and settings into TRL's trainer."""
    trainer = AnswerTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_arguments(options, checkpoints),
        train_dataset=together.my_rows(train, options.batch_size),
        eval_dataset=validation,
        peft_config=lora_config(options, model),
        callbacks=[StopsWhenNotFinite(), StopsWhenDiverged(), Pace()],
    )
    if together.rank() == 0:
        trainer.add_callback(Watched(trainer))
        add_trackers(trainer)
    together.start_alike(trainable(trainer.model))
    return trainer


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_config(options: Finetune, model: torch.nn.Module) -> LoraConfig:
    """Return PEFT's description of the adapter."""
    targets, layers = options.target_modules, None
    if options.layers == "upper_half":
        count = model.config.num_hidden_layers
        layers = list(range(count // 2, count))
        # PEFT takes layers only beside names
        targets = linears_of(model) if targets == "all-linear" else targets
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    fuse_products(config)
    return config


def training_arguments(options: Finetune, checkpoints: Path) -> SFTConfig:
    """Translate conf/finetune into TRL's arguments; nothing is uploaded or logged elsewhere."""
    first = together.rank() == 0  # it alone writes checkpoints and shows how far the training is
    return SFTConfig(
        output_dir=str(checkpoints),
        use_cpu=device() == "cpu",
        max_steps=options.max_steps,
        per_device_train_batch_size=len(together.my_share(options.batch_size)),
        per_device_eval_batch_size=options.batch_size,
        max_length=None,  # `truncate_rows` has cut the rows
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        logging_steps=5,
        logging_nan_inf_filter=False,  # it would report the loss before as this one's
        save_strategy="steps" if first else "no",
        disable_tqdm=not first,
        save_steps=options.eval_steps,
        save_total_limit=1,
        report_to=[],
        seed=options.seed,
        train_sampling_strategy="sequential",  # `order_rows` has chosen the order
        bf16=False,  # no autocast: the base is in the fast dtype already, the adapter in float32
        padding_free=True,  # rows end to end, each with positions of its own, so none sees another
        gradient_checkpointing=options.gradient_checkpointing,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def save_adapter(model: torch.nn.Module, folder: Path, base: str) -> None:
    """Save the adapter in PEFT's format: settings in an order that does not change, its base by name."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base  # PEFT would write this machine's path
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
    """Return the loop's seconds, a step's, all ranks' tokens per second, and the most memory that one took.

    A collective operation: every rank has to call it.
    """
    seconds = next(e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e)
    tokens = int(together.total(trainer.tokens_seen))
    cost = {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds)}
    pace = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Pace))
    if seconds_a_step := pace.seconds_a_step():
        cost["step_seconds"] = round(seconds_a_step, 4)
    most = {
        name: float(together.total(each, greatest=True)) for name, each in peak_memory().items()
    }
    return cost | most
