"""Scores of answers: what an answer says is what stands before the token that ended it."""

import pytest

from stages import evaluate
from stages.scoring.predictions import Parity
from stages.sources import random_model
from stages.text.conversation import Conversation
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
    return evaluate.Prompt(Conversation(turns, answer=exact_answer, kind="recall"), [1], [2])


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
    answers = [evaluate.Answer(said, False, [0.5])] * 2
    prompts, same = [prompt(exact) for exact in exact_answers], [Parity(identical=True)] * 2
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
