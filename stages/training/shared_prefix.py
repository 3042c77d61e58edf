"""What all rows of a step begin with is computed once.

    inputs = share_prefix(inputs, model.config)

A chat template opens every row with the same tokens: a system message, 22 of the 58 tokens of a SmolLM2 row.
A causal model gives them the same states in every row, so the packed rows keep the first one's opening and
look back on it: the same loss and gradients, for a third fewer tokens.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from stages.text.chat_encoder import NOT_LEARNED

Inputs = dict[str, torch.Tensor]


def share_prefix(inputs: Inputs, config: PretrainedConfig) -> Inputs:
    """Return packed rows, each value [1, tokens], without the later rows' openings, and their mask.

    The mask, [1, 1, tokens, tokens], is added to attention scores. Where a row is longer than the attention
    window of a model, the rows come back as they are.
    """
    tokens, positions, labels = (inputs[n][0] for n in ("input_ids", "position_ids", "labels"))
    window = getattr(config, "sliding_window", None)
    opening = prefix_length(tokens, positions, labels)
    if opening == 0 or (window is not None and positions.max() >= window):
        return inputs
    row = (positions == 0).cumsum(0)
    # every row's own tokens, and of the openings the first row's
    kept = (positions >= opening) | (row == 1)
    row, shared = row[kept], positions[kept] < opening
    # a token sees its own row and the shared opening, and nothing behind itself. Positions are kept, so the
    # rotations are those of whole rows
    looks = ((row[:, None] == row) | shared).tril()
    mask = torch.zeros(looks.shape).masked_fill(~looks, torch.finfo(torch.float32).min)
    values = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    return {name: value[kept][None] for name, value in values.items()} | {
        "attention_mask": mask[None, None]
    }


def prefix_length(tokens: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> int:
    """Return how many tokens all rows begin with alike, before the first that any of them predicts from."""
    starts = (positions == 0).nonzero()[1:, 0].tolist()
    rows = tokens.tensor_split(starts)
    learned = positions[labels != NOT_LEARNED]
    if len(rows) == 1 or len(learned) == 0:
        return 0
    # the token before the first learned one predicts it, so it has to stay in every row
    length = min(*map(len, rows), max(0, int(learned.min()) - 1))
    alike = torch.stack([row[:length] for row in rows]) == rows[0][:length]
    return int(alike.all(0).long().cumprod(0).sum())
