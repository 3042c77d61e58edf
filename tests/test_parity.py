"""Parity finds the first token at which PyTorch would have answered otherwise, and what excuses it."""

import pytest
import torch

from stages import parity
from stages.checkpoint import load_dequantized

pytestmark = pytest.mark.slow
PROMPT, ANSWER_LENGTH = [5, 17, 33, 101, 7], 6


@pytest.fixture(scope="module")
def model(finished):
    return load_dequantized(finished.root / "models/quantized")


@pytest.fixture(scope="module")
def answer(model) -> list[int]:
    """The model's own greedy answer."""
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(ANSWER_LENGTH):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def diverging(answer: list[int], at: int) -> list[int]:
    return [*answer[:at], (answer[at] + 1) % 400, *answer[at + 1 :]]


def verdict(model, answer: list[int], near_tie: float) -> dict:
    with torch.no_grad():
        return parity.first_divergence(model, PROMPT, answer, near_tie)


def test_the_same_answer_is_identical(model, answer):
    assert verdict(model, answer, near_tie=0.0) == {"verdict": "identical"}


@pytest.mark.parametrize("at", [0, 2, ANSWER_LENGTH - 1])
def test_another_token_is_found_where_it_stands(model, answer, at):
    found = verdict(model, diverging(answer, at), near_tie=0.0)
    assert (found["verdict"], found["token"]) == ("different", at)
    assert found["logit_gap"] > 0


def test_a_gap_within_the_margin_is_a_near_tie(model, answer):
    gap = verdict(model, diverging(answer, 2), near_tie=0.0)["logit_gap"]
    assert verdict(model, diverging(answer, 2), near_tie=gap)["verdict"] == "near-tie"


def test_the_noise_is_what_the_export_does_to_the_gap_of_the_two_best_tokens():
    ours = torch.tensor([[3.0, 1.0, 0.0], [0.0, 5.0, 4.0]])
    theirs = torch.tensor([[3.0, 1.5, 9.0], [0.0, 5.0, 4.0]])
    assert parity.gap_noise(ours, theirs, 1.0) == pytest.approx(0.5)


def test_a_broken_export_does_not_excuse_itself(finished, params, model, answer, monkeypatch):
    from stages.settings import validate

    monkeypatch.chdir(finished.root)
    options = validate(params).evaluate.model_copy(update={"largest_tie": 1e-6})
    noise = torch.randn(len(PROMPT), model.config.vocab_size).numpy() * 1e3
    predictions = [{"prompt": PROMPT, "adapter": {"tokens": diverging(answer, 1)}}]
    shares = parity.compare(predictions, PROMPT, noise, options)
    assert shares["logit_gap_noise"] > 10
    assert shares["explained_answers"] == 0
