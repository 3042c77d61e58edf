"""Parity finds the first token at which PyTorch would have answered otherwise, and by how much."""

import pytest

from stages.answers import parity
from stages.answers.limits import Limits
from stages.scoring.predictions import Parity
from stages.weights.checkpoint import load_dequantized
from support.tiny_models import FAMILIES, checkpoint, greedy, tokens

pytestmark = pytest.mark.slow
PROMPT, ANSWER_LENGTH = [5, 17, 33, 101, 7], 6
SAME = Parity(identical=True)


@pytest.fixture(scope="module")
def model(finished):
    return load_dequantized(finished.root / "models/quantized")


@pytest.fixture(scope="module")
def answer(model) -> list[int]:
    """The model's own greedy answer."""
    return greedy(model, PROMPT, ANSWER_LENGTH)


def diverging(answer: list[int], at: int) -> list[int]:
    return [*answer[:at], (answer[at] + 1) % 400, *answer[at + 1 :]]


def verdicts(model, *answers: list[int]) -> list[Parity]:
    """The verdicts on several answers of different lengths, read in one batch."""
    return parity.compare(model, [(PROMPT, answer) for answer in answers], len(answers), Limits())


def test_the_same_answer_is_identical(model, answer):
    assert verdicts(model, answer) == [SAME]


@pytest.mark.parametrize("at", [0, 2, ANSWER_LENGTH - 1])
def test_another_token_is_found_where_it_stands_beside_shorter_answers(model, answer, at):
    short, found = verdicts(model, answer[:2], diverging(answer, at))
    assert short == SAME
    assert (found.identical, found.token) == (False, at)
    assert found.logit_gap > 0


def test_an_answer_across_a_change_of_rotation_is_read_as_it_was_written(tmp_path):
    """A longrope model whose factors change after 64 tokens; one answer crosses that, one ends before."""
    model = load_dequantized(checkpoint(tmp_path / "phi3", FAMILIES["phi3-longrope"]))
    prompts = [tokens(length) for length in (60, 40)]
    texts = [(prompt, greedy(model, prompt, 10)) for prompt in prompts]
    assert parity.compare(model, texts, 2, Limits(rope_switch=64)) == [SAME, SAME]


def test_the_share_and_the_widest_gap_cover_all_answers(finished, answer):
    model = parity.load(finished.root / "models/quantized", finished.root / "models/adapter")
    texts = [(PROMPT, diverging(answer, 1)), (PROMPT, answer[:3])]
    verdicts = parity.compare(model, texts, 2, Limits())
    found = parity.summarize(verdicts)
    assert found["widest_divergence"] == verdicts[0].logit_gap > 0
    assert found["identical_answers"] in (0.0, 0.5)  # the adapter may change the short answer
    assert parity.perplexity(model, PROMPT * 4) > 1
