"""llm-compressor's AWQ on given tokens; benchmarks/awq.py runs this with the Python that has it.

    python peer_llm_compressor.py models/base FOLDER GROUP_SIZE

Prints seconds, peak memory and perplexity as one JSON line.
"""

import json
import math
import resource
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

if not torch.cuda.is_available():
    torch.Tensor.pin_memory = lambda self, *_: self  # it pins without asking whether there is a GPU


def scheme(group_size: int) -> dict:
    """Return 4-bit weights with zero points, as ours are."""
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights |= {"group_size": group_size, "dynamic": False, "observer": "minmax"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor) -> float:
    """Return the perplexity on token sequences, [sequences, length]."""
    total = 0.0
    for row in tokens:
        logits = model(row[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())


def main() -> None:
    """Quantize, then measure."""
    base, folder, group_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokens = load_file(f"{folder}/tokens.safetensors")
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = [
        {"input_ids": row, "attention_mask": [1] * len(row)}
        for row in tokens["calibration"].tolist()
    ]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(base),
        dataset=Dataset.from_list(rows),
        recipe=[AWQModifier(config_groups=scheme(group_size), ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=tokens["calibration"].shape[1],
    )
    seconds = round(time.monotonic() - started, 1)
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    value = round(perplexity(model, tokens["validation"]), 3)
    print(json.dumps({"seconds": seconds, "peak_memory_gib": memory, "perplexity": value}))


if __name__ == "__main__":
    main()
