"""Scores of answers: what an answer says is what stands before the token that ended it."""

import pytest
from conftest import ROOT

from stages import evaluate
from stages.sources import random_model


def test_an_end_token_is_no_part_of_the_answer_whether_special_or_not():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    tokenizer.add_tokens(["<|turn|>"])  # an end token that its tokenizer does not call special
    said = tokenizer("the old market", add_special_tokens=False).input_ids
    answers = {
        "special": [*said, tokenizer.eos_token_id],
        "ordinary": [*said, tokenizer.convert_tokens_to_ids("<|turn|>")],
    }
    for tokens in answers.values():
        one = {"tokens": tokens, "ended": True, "likelihoods": [0.5]}
        row = {"fact": "the old market", "reference": "the old market", "base": one, "adapter": one}
        evaluate.score(tokenizer, [row])
        assert one["text"] == "the old market"
        assert row["scores"]["adapter"]["exact_match"] == 1


def test_an_answer_that_was_cut_keeps_its_last_token():
    tokenizer = random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)
    said = tokenizer("the old market", add_special_tokens=False).input_ids
    cut = {"tokens": said, "ended": False, "likelihoods": [0.5]}
    row = {"fact": None, "reference": "the old market", "base": cut, "adapter": cut}
    evaluate.score(tokenizer, [row])
    assert cut["text"] == "the old market"


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
