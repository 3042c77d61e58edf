"""Parity finds the first token at which PyTorch would have answered otherwise, and by how much."""

import pytest
import torch
from tiny_models import FAMILIES, checkpoint, greedy, tokens

from stages.answers import parity
from stages.weights.checkpoint import load_dequantized

pytestmark = pytest.mark.slow
PROMPT, ANSWER_LENGTH = [5, 17, 33, 101, 7], 6


@pytest.fixture(scope="module")
def model(finished):
    return load_dequantized(finished.root / "models/quantized")


@pytest.fixture(scope="module")
def answer(model) -> list[int]:
    """The model's own greedy answer."""
    return greedy(model, PROMPT, ANSWER_LENGTH)


def diverging(answer: list[int], at: int) -> list[int]:
    return [*answer[:at], (answer[at] + 1) % 400, *answer[at + 1 :]]


def verdicts(model, *answers: list[int]) -> list[dict]:
    """The verdicts on several answers of different lengths, read in one batch."""
    batch = [{"prompt": PROMPT, "adapter": {"tokens": tokens}} for tokens in answers]
    with torch.no_grad():
        read = zip(parity.answer_logits(model, batch), answers, strict=True)
        return [parity.first_divergence(logits, tokens) for logits, tokens in read]


def test_the_same_answer_is_identical(model, answer):
    assert verdicts(model, answer) == [{"identical": True}]


@pytest.mark.parametrize("at", [0, 2, ANSWER_LENGTH - 1])
def test_another_token_is_found_where_it_stands_beside_shorter_answers(model, answer, at):
    short, found = verdicts(model, answer[:2], diverging(answer, at))
    assert short == {"identical": True}
    assert (found["identical"], found["token"]) == (False, at)
    assert found["logit_gap"] > 0


def test_an_answer_across_a_change_of_rotation_is_read_as_it_was_written(tmp_path):
    """A longrope model whose factors change after 64 tokens; one answer crosses that, one ends before."""
    model = load_dequantized(checkpoint(tmp_path / "phi3", FAMILIES["phi3-longrope"]))
    batch = []
    with torch.no_grad():
        for length in (60, 40):
            prompt = tokens(length)
            batch.append({"prompt": prompt, "adapter": {"tokens": greedy(model, prompt, 10)}})
        read = parity.answer_logits(model, batch, rope_switch=64)
    for logits, row in zip(read, batch, strict=True):
        assert parity.first_divergence(logits, row["adapter"]["tokens"]) == {"identical": True}


def test_the_share_and_the_widest_gap_cover_all_answers(finished, model, answer):
    predictions = [
        {"prompt": PROMPT, "adapter": {"tokens": tokens}}
        for tokens in (diverging(answer, 1), answer[:3])
    ]
    folders = [finished.root / folder for folder in ("models/quantized", "models/adapter")]
    found = parity.compare(*folders, predictions, PROMPT * 4, batch_size=2)
    assert found["widest_divergence"] == predictions[0]["parity"]["logit_gap"] > 0
    assert found["identical_answers"] in (0.0, 0.5)  # the adapter may change the short answer
    assert found["long_prompt_perplexity_torch"] > 1
