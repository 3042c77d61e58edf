"""Measure the ONNX model with and without its adapter on the test split, or on the validation split.

    python -m stages.evaluate        # conf/evaluate says what

Answers come from onnxruntime-genai, greedily. Quality goes to metrics/raw; what never repeats (speed, memory)
goes to an output of its own, metrics/speed/decode.json.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stages.answers import parity
from stages.answers.decode_speed import measure_in_own_process
from stages.answers.generation import OnnxModel
from stages.core import live
from stages.core.files import size_of, write_json, written_beside
from stages.core.running import run
from stages.core.settings import Evaluate, Settings
from stages.scoring import scores
from stages.scoring.metrics import summarize
from stages.scoring.predictions import MODELS, Parity, Prediction, Scores, as_jsonl
from stages.text.chats import answer_ids, load_tokenizer, prompt_ids
from stages.text.conversation import Conversation, read_conversations

ONNX = Path("models/onnx")
ADAPTER_FILE = Path("models/onnx_adapter/adapter.onnx_adapter")
PREPARED = Path("data/prepared")
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
    tokenizer, rows = load_tokenizer(ONNX), read_conversations(PREPARED / f"{options.split}.jsonl")
    prompts = [tokenize(tokenizer, row) for row in sample(rows, options)]
    write_json(SPEED, speed(prompts, options))

    model = OnnxModel(ONNX)
    answers = {"base": answer_all(model, None, prompts, options)}
    long_prompt = long_prompt_of(tokenizer, rows, options, model.context_length)
    model = OnnxModel(ONNX, {ADAPTER: ADAPTER_FILE})
    answers["adapter"] = answer_all(model, ADAPTER, prompts, options)
    metrics = {"long_prompt_perplexity": perplexity(model, long_prompt)}

    texts = [
        (prompt.tokens, answer.tokens)
        for prompt, answer in zip(prompts, answers["adapter"], strict=True)
    ]
    torch_model = parity.load(QUANTIZED, PEFT_ADAPTER)
    verdicts = parity.compare(torch_model, texts, options.batch_size, model.limits)
    metrics |= parity.summarize(verdicts)
    metrics["long_prompt_perplexity_torch"] = parity.perplexity(torch_model, long_prompt)

    predictions = score(tokenizer, prompts, answers, verdicts)
    metrics = summarize(predictions) | metrics | sizes()
    write_json(RAW, metrics)
    with written_beside(PREDICTIONS) as beside:
        beside.write_text(as_jsonl(predictions), encoding="utf-8", newline="\n")
    return f"{RAW} on {len(prompts)} prompts ({first_figure(metrics)})"


@dataclass(frozen=True)
class Prompt:
    """A test conversation as tokens."""

    row: Conversation
    tokens: list[int]  # up to where the answer begins
    reference: list[int]  # the reference answer's, with the token that ends it


@dataclass(frozen=True)
class Answer:
    """What one model answered to one prompt."""

    tokens: list[int]
    ended: bool  # its last token ends it
    likelihoods: list[float]  # -log p of every token of the reference answer, in nats


def sample(rows: list[Conversation], options: Evaluate) -> list[Conversation]:
    """Draw up to evaluate.prompts rows of every kind, in an order that the seed alone decides."""
    drawn: list[Conversation] = []
    for kind in sorted({str(row.kind) for row in rows}):
        members = [row for row in rows if row.kind == kind]
        count = min(options.prompts, len(members))
        drawn += random.Random(f"{options.seed}:{kind}").sample(members, count)
    return drawn


def tokenize(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Prompt:
    """Return a conversation's prompt and reference answer as tokens."""
    return Prompt(row, prompt_ids(tokenizer, row), answer_ids(tokenizer, row))


def speed(prompts: list[Prompt], options: Evaluate) -> dict[str, float]:
    """Return speed and memory at a fixed prompt and answer length; those without adapter end in _base."""
    job = options.speed.model_dump()
    length = job.pop("prompt_tokens")
    text = [token for prompt in prompts for token in prompt.tokens]
    repeated = (text * math.ceil(length / len(text)))[:length]
    return {
        name + suffix: value
        for suffix, adapter in {"": ADAPTER_FILE, "_base": None}.items()
        for name, value in measure_in_own_process(ONNX, adapter, repeated, job).items()
    }


def answer_all(
    model: OnnxModel, adapter: str | None, prompts: list[Prompt], options: Evaluate
) -> list[Answer]:
    """Answer every prompt greedily, and find what the model thinks of every reference answer."""
    found: dict[int, Answer] = {}
    batches = list(of_one_length(prompts, options.batch_size))
    for batch in live.steps(batches, f"answers ({adapter or 'base'})", "batch"):
        tokens = [prompts[number].tokens for number in batch]
        references = [prompts[number].reference for number in batch]
        said = model.generate_many(tokens, options.max_new_tokens, adapter)
        likelihoods = model.negative_log_likelihoods(tokens, references, adapter)
        for number, answer, likelihood in zip(batch, said, likelihoods, strict=True):
            found[number] = Answer(answer, answer[-1] in model.ends, likelihood.tolist())
    return [found[number] for number in range(len(prompts))]


def of_one_length(prompts: list[Prompt], size: int) -> Iterator[list[int]]:
    """Yield the places of at most `size` prompts with one number of tokens: so nothing needs padding."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt.tokens), []).append(number)
    for _, members in sorted(groups.items()):
        for first in range(0, len(members), size):
            yield members[first : first + size]


def long_prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Conversation],
    options: Evaluate,
    context_length: int,
) -> list[int]:
    """Return many chats in a row, within the context, to see that positions far out still work."""
    text: list[int] = []
    for row in rows:
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


def score(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    answers: dict[str, list[Answer]],
    verdicts: list[Parity],
) -> list[Prediction]:
    """Return every prompt with both answers as text, and their scores."""
    none_is_exact = all(prompt.row.answer is None for prompt in prompts)
    predictions = []
    for number, (prompt, verdict) in enumerate(zip(prompts, verdicts, strict=True)):
        row, mine = prompt.row, {name: answers[name][number] for name in MODELS}
        texts = {name: text_of(tokenizer, answer) for name, answer in mine.items()}
        # where no row has an exact answer, the whole reference is one
        exact = none_is_exact or row.answer is not None
        found = {name: scores_of(texts[name], mine[name], row, exact) for name in MODELS}
        predictions.append(
            Prediction(
                kind=str(row.kind),
                question=row.question,
                reference=row.reference,
                exact_answer=row.answer,
                **texts,
                parity=verdict,
                scores=found,
            )
        )
    return predictions


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """Return an answer as text, without the token that ended it.

    Of several end tokens, some are no special ones: their text would count as the answer's.
    """
    said = answer.tokens[: -1 if answer.ended else None]
    return without_thought(tokenizer.decode(said, skip_special_tokens=True))


def without_thought(text: str) -> str:
    """Return an answer without the thought, empty or not, with which models such as Qwen3 begin theirs."""
    thought, end, answer = text.partition("</think>")
    return (answer if end else thought).strip()


def scores_of(text: str, answer: Answer, row: Conversation, exact: bool) -> Scores:
    """Return the scores of one answer; exact_match is None where the prompt has no exact answer."""
    return Scores(
        exact_match=int(scores.exact_match(text, row.answer, row.reference)) if exact else None,
        rouge_l=round(scores.rouge_l(text, row.reference), 4),
        chrf=round(scores.chrf(text, row.reference), 2),
        negative_log_likelihood=round(float(sum(answer.likelihoods)), 4),
        tokens=len(answer.likelihoods),
        ended=int(answer.ended),
        repetition_rate=round(scores.repetition_rate(answer.tokens), 4),
    )


def sizes() -> dict[str, int]:
    """Return the bytes that an application ships."""
    return {"bytes_onnx": size_of(ONNX), "bytes_onnx_adapter": size_of(ADAPTER_FILE)}


def first_figure(metrics: dict[str, float]) -> str:
    """Return the figure that people look at first, beside the base's."""
    name = next(n for n in ("recall_exact_match", "test_exact_match", "chrf") if n in metrics)
    return f"{name} {metrics[name]}, base {metrics[f'{name}_base']}"


if __name__ == "__main__":
    run(evaluate, COST)
