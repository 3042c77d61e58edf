"""Random weights in a real architecture, with a small real tokenizer: conf/model/tiny.yaml.

For tests, which need every stage in seconds, and for measuring time and memory at full scale where
the real weights cannot be had. The answers of such a model are noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stages.core.errors import UserError

END, START = "<|im_end|>", "<|im_start|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(architecture: dict[str, Any], vocab_size: int, corpus: Path, folder: Path) -> None:
    """Save a randomly initialised model and a tokenizer trained on `corpus` into `folder`."""
    tokenizer = train_tokenizer(corpus, vocab_size)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    architecture = {"vocab_size": len(tokenizer), **ids, **architecture}
    model = initialise(architecture)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ChatML markers on the words of a JSONL file."""
    if not corpus.is_file():
        raise UserError(f"model.source.corpus {corpus} does not exist")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )
    fast.chat_template = CHATML
    return fast


def _texts(corpus: Path) -> list[str]:
    rows = (json.loads(line) for line in corpus.read_text(encoding="utf-8").split("\n") if line)
    return [str(value) for row in rows for value in row.values()]


def initialise(architecture: dict[str, Any]) -> torch.nn.Module:
    """Build the model with seeded random weights, in float16."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(**architecture)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.source.architecture cannot be built: {reason}") from None
    return model
