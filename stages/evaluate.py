"""Measure the ONNX model with and without its adapter on the test split.

    python -m stages.evaluate        # conf/evaluate says what

Answers come from onnxruntime-genai, greedily. Quality goes to metrics/raw; what never repeats (speed, memory)
goes to an output of its own, metrics/speed/decode.json.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.answers import parity
from stages.answers.decode_speed import measure_in_own_process
from stages.answers.generation import OnnxModel
from stages.core.files import read_jsonl, size_of, write_json, written_beside
from stages.core.running import run
from stages.core.settings import Evaluate, Settings
from stages.scoring import scores
from stages.scoring.metrics import MODELS, summarize
from stages.text.chats import (
    Row,
    answer_ids,
    load_tokenizer,
    prompt_ids,
    question_of,
    reference_of,
)

ONNX = Path("models/onnx")
ADAPTER_FILE = Path("models/onnx_adapter/adapter.onnx_adapter")
TEST = Path("data/prepared/test.jsonl")
RAW = Path("metrics/raw/evaluate.json")
PREDICTIONS = Path("metrics/raw/predictions.jsonl")
SPEED = Path("metrics/speed/decode.json")
QUANTIZED = Path("models/quantized")  # with PEFT_ADAPTER, what PyTorch answers with
PEFT_ADAPTER = Path("models/adapter")
COST = Path("metrics/speed/evaluate.json")
ADAPTER = "adapter"


def evaluate(settings: Settings) -> str:
    """Time it, let it answer, compare with PyTorch, score, save."""
    options = settings.evaluate
    tokenizer = load_tokenizer(ONNX)
    rows = sample(read_jsonl(TEST), options)
    predictions = [tokenize(tokenizer, row) for row in rows]
    write_json(SPEED, speed(predictions, options))
    base = OnnxModel(ONNX)
    answer(base, "base", None, predictions, options)
    long_prompt = long_prompt_of(tokenizer, options, base.context_length)
    tuned = OnnxModel(ONNX, {ADAPTER: ADAPTER_FILE})
    answer(tuned, "adapter", ADAPTER, predictions, options)
    metrics = {"long_prompt_perplexity": perplexity(tuned, long_prompt)}
    metrics |= parity.compare(
        QUANTIZED, PEFT_ADAPTER, predictions, long_prompt, options.batch_size, tuned.rope_switch
    )
    score(tokenizer, predictions)
    metrics = summarize(predictions) | metrics | sizes()
    write_json(RAW, metrics)
    write_predictions(predictions)
    return f"{RAW} on {len(rows)} prompts ({first_figure(metrics)})"


def sample(rows: list[Row], options: Evaluate) -> list[Row]:
    """Draw up to evaluate.prompts rows of every kind, in an order that the seed alone decides."""
    drawn: list[Row] = []
    for kind in sorted({row["kind"] for row in rows}):
        members = [row for row in rows if row["kind"] == kind]
        count = min(options.prompts, len(members))
        drawn += random.Random(f"{options.seed}:{kind}").sample(members, count)
    return drawn


def speed(predictions: list[Row], options: Evaluate) -> dict[str, float]:
    """Return speed and memory at a fixed prompt and answer length; those without adapter end in _base."""
    job = options.speed.model_dump()
    length = job.pop("prompt_tokens")
    text = [token for prediction in predictions for token in prediction["prompt"]]
    prompt = (text * math.ceil(length / len(text)))[:length]
    return {
        name + suffix: value
        for suffix, adapter in {"": ADAPTER_FILE, "_base": None}.items()
        for name, value in measure_in_own_process(ONNX, adapter, prompt, job).items()
    }


def tokenize(tokenizer, row: Row) -> Row:
    """Return what is known of a prompt before anything answers it."""
    return {
        "kind": row["kind"],
        "question": question_of(row),
        "reference": reference_of(row),
        "fact": row["answer"],
        "prompt": prompt_ids(tokenizer, row),
        "reference_ids": answer_ids(tokenizer, row),
    }


def answer(
    model: OnnxModel, name: str, adapter: str | None, predictions: list[Row], options: Evaluate
) -> None:
    """Answer every prompt with one model; keep its tokens, and what the reference costs it."""
    batches = list(of_one_length(predictions, options.batch_size))
    for batch in tqdm(batches, desc=f"answers ({name})", unit="batch"):
        prompts = [prediction["prompt"] for prediction in batch]
        answers = model.generate_many(prompts, options.max_new_tokens, adapter)
        references = [prediction["reference_ids"] for prediction in batch]
        likelihoods = model.negative_log_likelihoods(prompts, references, adapter)
        for prediction, tokens, likelihood in zip(batch, answers, likelihoods, strict=True):
            prediction[name] = {
                "tokens": tokens,
                "ended": tokens[-1] in model.ends,
                "likelihoods": likelihood.tolist(),
            }


def of_one_length(predictions: list[Row], size: int) -> Iterator[list[Row]]:
    """Yield batches of at most `size` prompts with one number of tokens: so nothing needs padding."""
    groups: dict[int, list[Row]] = {}
    for prediction in predictions:
        groups.setdefault(len(prediction["prompt"]), []).append(prediction)
    for _, members in sorted(groups.items()):
        for first in range(0, len(members), size):
            yield members[first : first + size]


def long_prompt_of(tokenizer, options: Evaluate, context_length: int) -> list[int]:
    """Return many chats in a row, within the context, to see that positions far out still work."""
    text: list[int] = []
    for row in read_jsonl(TEST):
        text += prompt_ids(tokenizer, row) + answer_ids(tokenizer, row)
    wanted = min(len(text), options.long_prompt_tokens)
    if wanted >= context_length:  # the runtime wants room for one token more
        print(
            f"evaluate: long_prompt_perplexity is of {context_length - 1} tokens, the whole context"
        )
    return text[: min(wanted, context_length - 1)]


def perplexity(model: OnnxModel, tokens: list[int]) -> float:
    """Return the adapted model's perplexity on a text."""
    likelihood = model.negative_log_likelihood(tokens[:1], tokens[1:], ADAPTER)
    return round(math.exp(likelihood.mean()), 3)


def score(tokenizer, predictions: list[Row]) -> None:
    """Add every prompt's own scores, with and without the adapter; the metrics are made of them."""
    exact = has_exact_answers(predictions)
    for p in predictions:
        for name in MODELS:
            # of several end tokens, some are no special ones: their text would count as the answer's
            said = p[name]["tokens"][: -1 if p[name]["ended"] else None]
            p[name]["text"] = without_thought(tokenizer.decode(said, skip_special_tokens=True))
        p["scores"] = {name: scores_of(p[name], p, exact(p)) for name in MODELS}


def without_thought(text: str) -> str:
    """Return an answer without the thought, empty or not, with which models such as Qwen3 begin theirs."""
    thought, end, answer = text.partition("</think>")
    return (answer if end else thought).strip()


def has_exact_answers(predictions: list[Row]):
    """Return which rows have an exact answer: those with a fact, or all where no row has one."""
    none_has_a_fact = all(p["fact"] is None for p in predictions)
    return lambda prediction: none_has_a_fact or prediction["fact"] is not None


def scores_of(answer: Row, prediction: Row, exact: bool) -> dict[str, Any]:
    """Return the scores of one answer; exact_match is None where the row has no exact answer."""
    text, fact, reference = answer["text"], prediction["fact"], prediction["reference"]
    likelihoods = answer["likelihoods"]
    return {
        "exact_match": int(scores.exact_match(text, fact, reference)) if exact else None,
        "rouge_l": round(scores.rouge_l(text, reference), 4),
        "chrf": round(scores.chrf(text, reference), 2),
        "negative_log_likelihood": round(float(sum(likelihoods)), 4),
        "tokens": len(likelihoods),
        "ended": int(answer["ended"]),
        "repetition_rate": round(scores.repetition_rate(answer["tokens"]), 4),
    }


def sizes() -> dict[str, int]:
    """Return the bytes that an application ships."""
    return {"bytes_onnx": size_of(ONNX), "bytes_onnx_adapter": size_of(ADAPTER_FILE)}


def first_figure(metrics: dict[str, float]) -> str:
    """Return the figure that people look at first, beside the base's."""
    name = next(n for n in ("recall_exact_match", "test_exact_match", "chrf") if n in metrics)
    return f"{name} {metrics[name]}, base {metrics[f'{name}_base']}"


def write_predictions(predictions: list[Row]) -> None:
    """Write what the report shows of every prediction: texts, verdicts and scores, no tokens."""
    with written_beside(PREDICTIONS) as beside, beside.open("w", encoding="utf-8") as stream:
        for p in predictions:
            shown = {key: p[key] for key in ("kind", "question", "reference", "fact")}
            shown |= {name: p[name]["text"] for name in MODELS}
            shown |= {key: p[key] for key in ("parity", "scores")}
            stream.write(json.dumps(shown, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(evaluate, COST)
