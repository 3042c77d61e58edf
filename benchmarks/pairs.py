"""Ask two adapters every prompt of recall and transfer with an exact answer: pairs for benchmarks.power.

    dvc exp run -S finetune.max_steps=60 --temp     # or any other adapter, as models/adapter is
    python -m benchmarks.pairs PEFT_DIR    # beside ours; minutes; writes benchmarks/results/pairs.json

Keeps, a row a prompt, whether the answer has the fact and the fact's probability: theirs, then ours.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import keep
from stages import evaluate
from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.settings import Evaluate, load_current
from stages.scoring.scores import exact_match
from stages.text.chats import load_tokenizer
from stages.text.conversation import read_conversations

KINDS = ("recall", "transfer")


def main() -> None:
    """Ask both, and keep what each knew."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("peft", type=Path, metavar="PEFT_DIR")
    theirs = arguments.parse_args().peft
    settings = load_current()
    tokenizer = load_tokenizer(evaluate.ONNX)
    rows = read_conversations(evaluate.PREPARED / "test.jsonl")
    rows += evaluate.probes(Path(settings.data.path))
    asked = [row for row in rows if row.kind in KINDS and row.answer is not None]
    prompts = [
        evaluate.tokenize(tokenizer, row) for row in evaluate.sample(asked, settings.evaluate)
    ]
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "theirs.onnx_adapter"
        convert(theirs, evaluate.ONNX, converted)
        model = OnnxModel(evaluate.ONNX, {"theirs": converted, "ours": evaluate.ADAPTER_FILE})
        both = [
            knows(model, tokenizer, name, prompts, settings.evaluate) for name in ("theirs", "ours")
        ]
    found: dict[str, Any] = {
        kind: [
            [*old, *new]
            for prompt, old, new in zip(prompts, *both, strict=True)
            if prompt.row.kind == kind
        ]
        for kind in KINDS
    }
    keep("pairs", found)


def knows(
    model: OnnxModel,
    tokenizer: Any,
    adapter: str,
    prompts: list[evaluate.Prompt],
    options: Evaluate,
) -> list[tuple[int, float]]:
    """Return, for every prompt, whether the answer has the fact, and the probability of the fact."""
    found = []
    for prompt, answer in zip(
        prompts, evaluate.answer_all(model, adapter, prompts, options), strict=True
    ):
        text = evaluate.text_of(tokenizer, answer)
        right = exact_match(text, prompt.row.answer, prompt.row.reference)
        surprise = sum(answer.likelihoods[place] for place in prompt.fact)
        found.append((int(right), round(math.exp(-surprise), 4)))
    return found


if __name__ == "__main__":
    main()
