"""The opening that all rows of a step share is computed once, and nothing that is learned changes."""

from itertools import chain

import pytest
import torch

from stages.text.chat_encoder import NOT_LEARNED
from stages.training.shared_prefix import prefix_length, share_prefix
from stages.weights.checkpoint import load_dequantized
from support.tiny_models import FAMILIES, checkpoint, tokens


def packed(rows: list[list[int]], prompt: int) -> dict[str, torch.Tensor]:
    """Rows end to end, [1, tokens], of which all but the first `prompt` tokens are learned."""
    labels = [[NOT_LEARNED] * prompt + row[prompt:] for row in rows]
    positions = [list(range(len(row))) for row in rows]
    values = {"input_ids": rows, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([list(chain(*value))]) for name, value in values.items()}


def gradient(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of the learned tokens, and its gradient for a weight of the first layer."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[0, 1:]
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=NOT_LEARNED)
    loss.backward()
    return loss.detach(), model.model.layers[0].self_attn.o_proj.weight.grad.clone()


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gemma3", "granite"])
def model(request, tmp_path_factory):
    folder = checkpoint(tmp_path_factory.mktemp("base") / "base", FAMILIES[request.param])
    model = load_dequantized(folder)
    model.set_attn_implementation("eager")
    return model


def rows(*lengths: int, opening: int = 6) -> list[list[int]]:
    text = tokens(200)
    return [text[:opening] + text[20 * n : 20 * n + length] for n, length in enumerate(lengths, 1)]


def test_loss_and_gradients_are_those_of_whole_rows(model):
    inputs = packed(rows(5, 9, 7), prompt=8)
    shared = share_prefix(inputs, model.config)
    assert shared["input_ids"].numel() == inputs["input_ids"].numel() - 2 * 6
    for ours, whole in zip(gradient(model, shared), gradient(model, inputs), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_rows_longer_than_an_attention_window_stay_whole(model):
    inputs = packed(rows(80, 9), prompt=8)
    window = getattr(model.config, "sliding_window", None)
    assert (share_prefix(inputs, model.config) is inputs) == (window is not None)


@pytest.mark.parametrize(
    ("texts", "prompt", "shared"),
    [
        ([[1, 2, 3, 4, 5], [1, 2, 9, 8]], 3, 2),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 3, 2),  # what a learned token is predicted from stays
        ([[1, 2, 3], [4, 2, 3]], 2, 0),
        ([[1, 2, 3, 4]], 3, 0),
        ([[1, 2, 3], [1, 2, 3]], 3, 0),  # nothing is learned
        ([[1, 2, 3], [1, 2, 3]], 0, 0),
    ],
)
def test_the_opening_ends_where_rows_differ_or_learning_begins(texts, prompt, shared):
    inputs = packed(texts, prompt)
    assert prefix_length(*(inputs[n][0] for n in ("input_ids", "position_ids", "labels"))) == shared
