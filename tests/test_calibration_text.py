"""The text that a model writes for its own calibration: the tokenizer's ids alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.core.errors import UserError
from stages.core.settings import validate
from stages.quantization import calibration
from stages.sources import random_model
from stages.text.conversation import Conversation
from support.tiny_models import SHAPE

LENGTH = 64


@pytest.fixture
def base(tmp_path):
    """A tiny model with more embedding rows than its tokenizer has tokens."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "where is Chicago?"}) + "\n")
    random_model.make(SHAPE | {"model_type": "llama"}, 400, corpus, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(400, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_no_id_beyond_the_tokenizer_is_drawn(base):
    known = set(AutoTokenizer.from_pretrained(base).get_vocab().values())
    assert len(known) < 400
    written = calibration.self_text(base, 8, LENGTH, seed=1)
    assert written.shape == (8, LENGTH)
    assert set(written.flatten().tolist()) <= known


def test_a_token_without_an_embedding_row_is_not_drawn(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{n}>" for n in range(500 - len(tokenizer))])
    tokenizer.save_pretrained(base)
    assert calibration.self_text(base, 4, LENGTH, seed=1).max() < 400


def test_where_tokenizer_and_embedding_agree_every_id_is_drawn_as_before(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{n}>" for n in range(400 - len(tokenizer))])
    tokenizer.save_pretrained(base)
    firsts = calibration.self_text(base, 4, LENGTH, seed=1).view(-1, LENGTH // 2)[:, :1]
    torch.manual_seed(1)
    assert torch.equal(firsts, torch.randint(400, (8, 1)))


def test_rows_that_do_not_fit_the_chat_template_stop_the_stage_before_any_work(base, params):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        Conversation(turns, source=f"mine.jsonl:{n}", tools=[{"name": "f"}] * (n > 1))
        for n in range(1, 4)
    ]
    with pytest.raises(UserError, match=r"2 of 3 rows .*\nmine.jsonl:2: has tools, which"):
        calibration.calibration_set(base, rows, validate(params).quantize)
