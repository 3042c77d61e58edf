"""Measure the ONNX model with and without its adapter on the test split, or on the validation split.

    python -m stages.evaluate        # conf/evaluate says what

Answers come from onnxruntime-genai, greedily. Beside the test split it asks what data/probes holds for the
data: more groups that were never trained on, and facts that nobody taught. Quality goes to metrics/raw; what
never repeats (speed, memory) goes to an output of its own, metrics/speed/decode.json.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stages.answers import parity
from stages.answers.decode_speed import measure_in_own_process
from stages.answers.generation import OnnxModel
from stages.core import live
from stages.core.errors import UserError
from stages.core.files import size_of, write_json, written_beside
from stages.core.running import run
from stages.core.settings import Evaluate, Settings
from stages.scoring import scores
from stages.scoring.metrics import summarize
from stages.scoring.predictions import (
    CONTROL,
    MODELS,
    UNKNOWN,
    Parity,
    Prediction,
    Scores,
    as_jsonl,
)
from stages.text.chats import answer_ids, load_tokenizer, prompt_ids
from stages.text.conversation import Conversation, read_conversations

ONNX = Path("models/onnx")
ADAPTER_FILE = Path("models/onnx_adapter/adapter.onnx_adapter")
PREPARED = Path("data/prepared")
PROBES = Path("data/probes")  # beside data/NAME.jsonl, a file of the same name may lie here
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
    asked = rows + probes(Path(settings.data.path)) if options.split == "test" else rows
    prompts = [tokenize(tokenizer, row) for row in sample(asked, options)]
    write_json(SPEED, speed(prompts, options))

    model = OnnxModel(ONNX)
    compared = first_of_each_kind(prompts, options.base_prompts)
    said = answer_all(model, None, [prompts[number] for number in compared], options)
    answers = {"base": dict(zip(compared, said, strict=True))}
    long_prompt = long_prompt_of(tokenizer, rows, options, model.context_length)
    model = OnnxModel(ONNX, {ADAPTER: ADAPTER_FILE})
    answers["adapter"] = dict(enumerate(answer_all(model, ADAPTER, prompts, options)))
    metrics = {"long_prompt_perplexity": perplexity(model, long_prompt)}

    torch_model = parity.load(QUANTIZED, PEFT_ADAPTER)
    read = sample_numbers(len(prompts), options)
    texts = [(prompts[number].tokens, answers["adapter"][number].tokens) for number in read]
    found = parity.compare(torch_model, texts, options.batch_size, model.limits)
    metrics |= parity.summarize(found)
    verdicts = dict(zip(read, found, strict=True))
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
    fact: list[int]  # which of them spell the exact answer


@dataclass(frozen=True)
class Answer:
    """What one model answered to one prompt."""

    tokens: list[int]
    ended: bool  # its last token ends it
    likelihoods: list[float]  # -log p of every token of the reference answer, in nats


def probes(data: Path) -> list[Conversation]:
    """Return what is asked beside the test split: controls of trained groups, facts of groups never seen.

    Raises `UserError` for a probe that the model was trained on or chosen by, and for probes of other data.
    """
    file = PROBES / data.name
    if not file.is_file() or data.resolve().parent != PROBES.resolve().parent:
        return []
    trained = read_conversations(PREPARED / "train.jsonl")
    seen = trained + read_conversations(PREPARED / "validation.jsonl")
    groups, known = ({row.group for row in rows} for rows in (trained, seen))
    questions = {row.question for row in seen}
    found = []
    for row in read_conversations(file):
        if row.question in questions or (row.kind not in (CONTROL, UNKNOWN) and row.group in known):
            raise UserError(
                f"{row.source} in {file} is part of the training or validation data: take it out there"
            )
        if row.kind != CONTROL or row.group in groups:
            found.append(row)
    if not any(row.kind == CONTROL for row in found):
        raise UserError(
            f"{file} asks about nothing that {data} trains: it is of other data, so remove it, or "
            f"give {data.name} another name"
        )
    return found


def sample(rows: list[Conversation], options: Evaluate) -> list[Conversation]:
    """Draw up to evaluate.prompts rows of every kind, in an order that the seed alone decides.

    Each fact is asked once before one is asked again: wordings of one fact tell little more than one does.
    """
    drawn: list[Conversation] = []
    for kind in sorted({str(row.kind) for row in rows}):
        members = [row for row in rows if row.kind == kind]
        shuffled = random.Random(f"{options.seed}:{kind}").sample(members, len(members))
        times: dict[tuple[str | None, str | None], int] = defaultdict(int)
        turns = []
        for row in shuffled:
            # without facts, every row is one of its own
            if row.fact is not None:
                times[row.group, row.fact] += 1
            turns.append(times[row.group, row.fact])
        order = sorted(range(len(members)), key=turns.__getitem__)  # stable
        drawn += [shuffled[place] for place in order[: options.prompts]]
    return drawn


def first_of_each_kind(prompts: list[Prompt], count: int) -> list[int]:
    """Return the numbers of the first prompts of each kind, whose order is drawn: the base answers those."""
    left: dict[str | None, int] = defaultdict(lambda: count)
    found = []
    for number, prompt in enumerate(prompts):
        if left[prompt.row.kind] > 0:
            found.append(number)
        left[prompt.row.kind] -= 1
    return found


def sample_numbers(count: int, options: Evaluate) -> list[int]:
    """Draw which prompts PyTorch is asked too."""
    wanted = min(count, options.parity_prompts)
    return sorted(random.Random(f"{options.seed}:parity").sample(range(count), wanted))


def tokenize(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Prompt:
    """Return a conversation's prompt and reference answer as tokens."""
    reference = answer_ids(tokenizer, row)
    return Prompt(
        row, prompt_ids(tokenizer, row), reference, places_of(tokenizer, reference, row.answer)
    )


def places_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int], fact: str | None) -> list[int]:
    """Return the places of the tokens that spell a fact, where it stands last; none if it does not."""
    if not fact:
        return []
    # of a letter that several tokens spell, the first ones say that it is none yet
    texts = [tokenizer.decode(tokens[:n]).rstrip("\ufffd") for n in range(len(tokens) + 1)]
    start = texts[-1].lower().rfind(fact.lower())
    if start < 0:
        return []
    end = start + len(fact)
    return [n for n in range(len(tokens)) if len(texts[n + 1]) > start and len(texts[n]) < end]


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
    texts, references = ([getattr(p, name) for p in prompts] for name in ("tokens", "reference"))
    read = model.examine(texts, references, options.max_new_tokens, adapter)
    steps = live.steps(prompts, f"answers ({adapter or 'base'})", "prompt")
    return [
        Answer(said, said[-1] in model.ends, likelihoods.tolist())
        for _, (said, likelihoods) in zip(steps, read, strict=True)
    ]


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
    answers: Mapping[str, Mapping[int, Answer]],
    verdicts: Mapping[int, Parity],
) -> list[Prediction]:
    """Return every prompt with its answers as text, and their scores. Answers and verdicts are by number."""
    facts: dict[str | None, set[str]] = defaultdict(set)  # what is known of a group
    for prompt in prompts:
        if prompt.row.answer is not None:
            facts[prompt.row.group].add(prompt.row.answer)
    none_is_exact = all(prompt.row.answer is None for prompt in prompts)
    predictions = []
    for number, prompt in enumerate(prompts):
        row, mine = prompt.row, {n: answers[n][number] for n in MODELS if number in answers[n]}
        texts = {name: text_of(tokenizer, answer) for name, answer in mine.items()}
        # where no row has an exact answer, the whole reference is one
        exact = none_is_exact or row.answer is not None
        known = facts[row.group] if row.group is not None else {row.answer or ""}
        found = {name: scores_of(texts[name], mine[name], prompt, exact, known) for name in mine}
        predictions.append(
            Prediction(
                kind=str(row.kind),
                question=row.question,
                reference=row.reference,
                exact_answer=row.answer,
                base=texts.get("base"),
                adapter=texts["adapter"],
                parity=verdicts.get(number),
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


def scores_of(
    text: str, answer: Answer, prompt: Prompt, exact: bool, facts: Collection[str]
) -> Scores:
    """Return the scores of one answer; exact_match is None where the prompt has no exact answer."""
    row, unknown = prompt.row, prompt.row.kind == UNKNOWN
    of_fact = sum(answer.likelihoods[place] for place in prompt.fact)
    return Scores(
        exact_match=int(scores.exact_match(text, row.answer, row.reference))
        if exact and not unknown
        else None,
        rouge_l=round(scores.rouge_l(text, row.reference), 4),
        chrf=round(scores.chrf(text, row.reference), 2),
        negative_log_likelihood=round(float(sum(answer.likelihoods)), 4),
        tokens=len(answer.likelihoods),
        ended=int(answer.ended),
        repetition_rate=round(scores.repetition_rate(answer.tokens), 4),
        fact_probability=round(math.exp(-of_fact), 6) if prompt.fact else None,
        form_match=scores.same_form(text, row.reference, facts) if row.answer else None,
        refusal=scores.refuses(text) if unknown else None,
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
