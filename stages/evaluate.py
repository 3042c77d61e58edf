"""Measure the ONNX model with and without its adapter on the test split.

    python -m stages.evaluate        # conf/evaluate says what

Answers come from onnxruntime-genai, greedily. Quality goes to metrics/raw (cached by DVC, part of
dvc.lock); speed and memory, which never repeat, go to metrics/speed.json.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages import parity, scores, summary
from stages.chats import Row, answer_ids, prompt_ids, read_rows
from stages.checkpoint import load_tokenizer
from stages.decode_speed import measure_in_own_process
from stages.generation import OnnxModel
from stages.places import adapter_name, place
from stages.running import run, size_of, write_json, written_beside
from stages.settings import Evaluate, Settings

ONNX = Path("models/onnx")
ADAPTER_FILE = place("models/onnx_adapter/adapter.onnx_adapter")
TEST = place("data/prepared/test.jsonl")
RAW = place("metrics/raw/evaluate.json")
PREDICTIONS = place("metrics/raw/predictions.jsonl")
SPEED = place("metrics/speed.json")
MERGED = place("models/onnx_adapter/merged")
ADAPTER = "adapter"
DEFAULT_FILE = Path("models/onnx_adapter/adapter.onnx_adapter")
DEFAULT = "default"
Models = dict[str, tuple[OnnxModel, str | None]]


def evaluate(settings: Settings) -> str:
    """Time it, let it answer, compare with PyTorch, score, save."""
    options = settings.evaluate
    tokenizer = load_tokenizer(ONNX)
    rows = sample(read_rows(TEST), options)
    write_json(SPEED, speed(tokenizer, rows, options))
    models = load_models()
    predictions = [predict(models, tokenizer, row, options) for row in tqdm(rows, desc="answers")]
    model, _ = models["adapter"]
    long_prompt = long_prompt_of(tokenizer, options)
    long_likelihood = model.negative_log_likelihood(long_prompt[:1], long_prompt[1:], ADAPTER)
    health = {"long_prompt_perplexity": round(math.exp(long_likelihood.mean()), 3)}
    long_logits = model.logits(long_prompt, ADAPTER)
    health |= parity.compare(predictions, long_prompt, long_logits, options)
    score(predictions)
    metrics = summary.summarize(predictions) | health | sizes()
    write_json(RAW, metrics)
    write_predictions(predictions)
    recall = metrics.get("recall_exact_match", metrics.get("test_exact_match"))
    return f"{RAW} on {len(rows)} prompts (exact match {recall}, base {base_of(metrics)})"


def sample(rows: list[Row], options: Evaluate) -> list[Row]:
    """Draw up to evaluate.prompts rows of every kind, in an order that the seed alone decides."""
    drawn: list[Row] = []
    for kind in sorted({row["kind"] for row in rows}):
        members = [row for row in rows if row["kind"] == kind]
        count = min(options.prompts, len(members))
        drawn += random.Random(f"{options.seed}:{kind}").sample(members, count)
    return drawn


def speed(tokenizer, rows: list[Row], options: Evaluate) -> dict[str, float]:
    """Return speed and memory at a fixed prompt and answer length; those without adapter end in _base."""
    job = options.speed.model_dump()
    length = job.pop("prompt_tokens")
    text = [token for row in rows for token in prompt_ids(tokenizer, row)]
    prompt = (text * math.ceil(length / len(text)))[:length]
    shipped = {"": (ONNX, ADAPTER_FILE), "_base": (ONNX, None), "_merged": (MERGED, None)}
    return {
        name + suffix: steady(value)
        for suffix, (folder, adapter) in shipped.items()
        if folder.is_dir()
        for name, value in measure_in_own_process(folder, adapter, prompt, job).items()
    }


def steady(value: float) -> float:
    """Round to two significant digits: the third is another one on every run."""
    return float(f"{value:.2g}")


def load_models() -> Models:
    """Return the base alone and with the adapter, and the merged model where conf/optimize asks for it.

    A named adapter shares one base in memory with the default one, whose answers it is compared with.
    """
    default = {DEFAULT: DEFAULT_FILE} if adapter_name() else {}
    model = OnnxModel(ONNX, {ADAPTER: ADAPTER_FILE, **default})
    merged = {"merged": (OnnxModel(MERGED), None)} if MERGED.is_dir() else {}
    rival = {DEFAULT: (model, DEFAULT)} if default else {}
    return {"base": (model, None), "adapter": (model, ADAPTER), **merged, **rival}


def predict(models: Models, tokenizer, row: Row, options: Evaluate) -> Row:
    """Answer one question with every model; keep tokens, texts and likelihoods."""
    prompt, reference = prompt_ids(tokenizer, row), answer_ids(tokenizer, row)
    prediction = {
        "kind": row["kind"],
        "question": row["prompt"][-1]["content"],
        "reference": row["completion"][-1]["content"],
        "fact": row["answer"],
        "prompt": prompt,
    }
    for name, (model, adapter) in models.items():
        tokens = model.generate(prompt, options.max_new_tokens, adapter)
        prediction[name] = {
            "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            "tokens": tokens,
            "ended": tokens[-1] in model.ends,
            "likelihoods": model.negative_log_likelihood(prompt, reference, adapter).tolist(),
        }
    return prediction


def long_prompt_of(tokenizer, options: Evaluate) -> list[int]:
    """Return many chats in a row, to see that positions far out still work."""
    text: list[int] = []
    for row in read_rows(TEST):
        text += prompt_ids(tokenizer, row) + answer_ids(tokenizer, row)
    return text[: options.health.long_prompt_tokens]


def score(predictions: list[Row]) -> None:
    """Add every prompt's own scores, with and without the adapter; the metrics are made of them."""
    for p in predictions:
        exact = counts(p, predictions)
        p["scores"] = {name: scores_of(p[name], p, exact) for name in summary.MODELS if name in p}


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


def counts(prediction: Row, predictions: list[Row]) -> bool:
    """Say whether a row has an exact answer: its fact, or the whole text where no row has a fact."""
    return prediction["fact"] is not None or all(p["fact"] is None for p in predictions)


def sizes() -> dict[str, int]:
    """Return the bytes that an application ships."""
    merged = {"bytes_onnx_merged": size_of(MERGED)} if MERGED.is_dir() else {}
    return {"bytes_onnx": size_of(ONNX), "bytes_onnx_adapter": size_of(ADAPTER_FILE), **merged}


def base_of(metrics: dict[str, float]) -> float:
    """Return the exact match without the adapter."""
    return metrics.get("recall_exact_match_base", metrics.get("test_exact_match_base", 0.0))


def write_predictions(predictions: list[Row]) -> None:
    """Write what the report shows of every prediction: texts, verdicts and scores, no tokens."""
    with written_beside(PREDICTIONS) as beside, beside.open("w", encoding="utf-8") as stream:
        for p in predictions:
            shown = {key: p[key] for key in ("kind", "question", "reference", "fact")}
            shown |= {name: p[name]["text"] for name in ("base", "adapter")}
            shown |= {key: p[key] for key in ("parity", "scores")}
            stream.write(json.dumps(shown, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(evaluate)
