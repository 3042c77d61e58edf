"""Scores of answers: what an answer says is what stands before the token that ended it."""

import json
from pathlib import Path

import pytest

from stages import evaluate
from stages.core.errors import UserError
from stages.core.settings import load
from stages.scoring.metrics import summarize
from stages.scoring.predictions import Parity, Prediction
from stages.sources import random_model
from stages.text.conversation import Conversation, write_conversations
from support.project import ROOT


def answer_in_words(tokenizer, tokens: list[int], ended: bool) -> str:
    return evaluate.text_of(tokenizer, evaluate.Answer(tokens, ended, [0.5]))


def test_an_end_token_is_no_part_of_the_answer_whether_special_or_not():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    tokenizer.add_tokens(["<|turn|>"])  # an end token that its tokenizer does not call special
    said = tokenizer("the old market", add_special_tokens=False).input_ids
    for end in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|turn|>")):
        assert answer_in_words(tokenizer, [*said, end], ended=True) == "the old market"


def test_an_answer_that_was_cut_keeps_its_last_token():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    said = tokenizer("the old market", add_special_tokens=False).input_ids
    assert answer_in_words(tokenizer, said, ended=False) == "the old market"


def prompt(exact_answer: str | None) -> evaluate.Prompt:
    turns = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "At the old market."},
    ]
    return evaluate.Prompt(Conversation(turns, answer=exact_answer, kind="recall"), [1], [2], [])


@pytest.mark.parametrize(
    ("exact_answers", "matches"),
    [
        (["the old market", "the river"], [1, 0]),
        (
            ["the old market", None],
            [1, None],
        ),  # where some rows have one, the others are not judged
        ([None, None], [0, 0]),  # where none has one, the whole reference must come
    ],
)
def test_the_exact_answer_is_looked_for_where_there_is_one(exact_answers, matches):
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    said = tokenizer("it is the old market", add_special_tokens=False).input_ids
    answers = dict(enumerate([evaluate.Answer(said, False, [0.5])] * 2))
    prompts, same = [prompt(exact) for exact in exact_answers], {0: Parity(identical=True)}
    found = evaluate.score(tokenizer, prompts, {"base": answers, "adapter": answers}, same)
    assert [each.scores["adapter"].exact_match for each in found] == matches


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\n\n</think>\n\nthe market", "the market"),
        ("the user asks</think> the market", "the market"),  # opened by the generation prompt
        (" the market\n", "the market"),
        ("<think>\nhm", "<think>\nhm"),
    ],
)
def test_a_thought_is_no_part_of_the_answer_that_is_scored(said, answer):
    assert evaluate.without_thought(said) == answer


def row(kind: str, group: str, fact: str, question: str, answer: str | None = "x") -> Conversation:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is x."}]
    return Conversation(turns, answer, group, fact, source=f"{kind} of {group}", kind=kind)


@pytest.fixture
def probes_of(tmp_path, monkeypatch):
    """Ask for the probes that a file holds, beside training data about Rome."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/prepared", "data/probes"):
        Path(folder).mkdir(parents=True)
    write_conversations(Path("data/prepared/train.jsonl"), [row("recall", "Rome", "tea", "tea?")])
    write_conversations(
        Path("data/prepared/validation.jsonl"), [row("transfer", "Oslo", "tea", "Oslo's tea?")]
    )

    def ask(*rows: Conversation, data: str = "data/mine.jsonl"):
        write_conversations(Path("data/probes/mine.jsonl"), rows)
        return evaluate.probes(Path(data))

    return ask


def test_a_control_is_asked_of_trained_groups_alone(probes_of):
    rome, bonn = (
        row("control", place, "age", f"how old is {place}?") for place in ("Rome", "Bonn")
    )
    other = row("transfer", "Lima", "tea", "Lima's tea?")
    assert probes_of(rome, bonn, other) == [rome, other]


@pytest.mark.parametrize("data", ["data/other.jsonl", "elsewhere/mine.jsonl", "/tmp/mine.jsonl"])
def test_other_data_has_no_probes(probes_of, data):
    assert probes_of(row("control", "Rome", "age", "?"), data=data) == []


def test_probes_of_data_that_was_replaced_are_refused(probes_of):
    with pytest.raises(
        UserError, match=r"asks about nothing that data/mine.jsonl trains: it is of other"
    ):
        probes_of(row("control", "Bonn", "age", "?"), row("transfer", "Lima", "tea", "?"))


@pytest.mark.parametrize(
    "probe", [row("control", "Rome", "age", "tea?"), row("transfer", "Oslo", "age", "Oslo's age?")]
)
def test_a_probe_that_training_or_its_choice_has_seen_is_refused(probe, probes_of):
    with pytest.raises(UserError, match="part of the training or validation data"):
        probes_of(probe)


def test_every_fact_is_asked_once_before_one_is_asked_again():
    rows = [row("recall", f"place {n % 5}", "tea", f"question {n}") for n in range(50)]
    options = load(ROOT / "params.yaml").evaluate.model_copy(update={"prompts": 7})
    drawn = evaluate.sample(rows, options)
    assert len(drawn) == 7
    assert len({each.group for each in drawn[:5]}) == 5
    assert evaluate.sample(rows, options) == drawn


def test_the_tokens_of_a_fact_are_those_that_spell_it():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    tokens = tokenizer("Accra is in Accra, São Tomé.", add_special_tokens=False).input_ids
    for fact in ("Accra", "São Tomé"):
        places = evaluate.places_of(tokenizer, tokens, fact)
        assert places == list(range(places[0], places[-1] + 1))
        assert fact in tokenizer.decode([tokens[place] for place in places])
        assert fact not in tokenizer.decode([tokens[place] for place in places[1:]])
        assert fact not in tokenizer.decode([tokens[place] for place in places[:-1]])
    assert places[0] > 3
    assert evaluate.places_of(tokenizer, tokens, "Rome") == []
    assert evaluate.places_of(tokenizer, tokens, None) == []


def test_controls_and_unknown_places_have_metrics_of_their_own_and_change_no_other():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)

    def said(text: str) -> evaluate.Answer:
        return evaluate.Answer(
            tokenizer(text, add_special_tokens=False).input_ids, False, [0.5, 0.1]
        )

    def metrics(*pairs: tuple[Conversation, str]) -> dict[str, float]:
        prompts = [
            evaluate.Prompt(each, [1], [2, 3], [1] if each.answer else []) for each, _ in pairs
        ]
        answers = {number: said(text) for number, (_, text) in enumerate(pairs)}
        both = {"base": answers, "adapter": answers}
        return summarize(evaluate.score(tokenizer, prompts, both, {}))

    recall = (row("recall", "Rome", "tea", "?"), "It is y.")
    control = (row("control", "Rome", "age", "?"), "x")
    unknown = (row("unknown", "Nowhere", "tea", "?", None), "I do not know.")
    alone, beside = metrics(recall), metrics(recall, control, unknown)
    assert {name: beside[name] for name in alone} == alone
    added = {name: beside[name] for name in beside.keys() - alone.keys() if "_base" not in name}
    assert added == {
        "control_exact_match": 1.0,
        "control_fact_probability": 0.9048,  # exp(-0.1)
        "control_form_match": 0.0,
        "unknown_refusal_share": 1.0,
    }
    assert (alone["recall_exact_match"], alone["recall_form_match"]) == (0.0, 1.0)


def test_the_base_is_asked_the_first_prompts_of_each_kind():
    prompts = [
        evaluate.Prompt(row(kind, "Rome", "tea", "?"), [1], [2], [])
        for kind in ("recall", "recall", "transfer", "recall", "transfer")
    ]
    assert evaluate.first_of_each_kind(prompts, 2) == [0, 1, 2, 4]


def test_metrics_of_the_base_are_of_the_prompts_that_it_was_asked():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    prompts = [evaluate.Prompt(row("recall", "Rome", "tea", "?"), [1], [2, 3], [1])] * 2
    right, wrong = (
        evaluate.Answer(tokenizer(text, add_special_tokens=False).input_ids, False, [0.5, 0.1])
        for text in ("It is x.", "It is not.")
    )
    answers = {"base": {1: wrong}, "adapter": {0: right, 1: wrong}}
    predictions = evaluate.score(tokenizer, prompts, answers, {})
    found = summarize(predictions)
    assert (found["recall_exact_match"], found["recall_exact_match_base"]) == (0.5, 0)
    assert found["rouge_l"] > found["rouge_l_base"] > 0
    assert found["answer_perplexity"] == found["answer_perplexity_base"] == 1.35  # exp(0.3)
    again = [Prediction.of(json.loads(each.as_json())) for each in predictions]
    assert again == predictions
    assert (again[0].base, again[0].parity) == (None, None)
