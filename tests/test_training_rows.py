"""What the trainer is given: rows that fit, in an order laid out beforehand; and when it stops."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stages.core.errors import UserError
from stages.core.settings import validate
from stages.text.chat_encoder import NOT_LEARNED
from stages.training import rows as rows_of_training
from stages.training import trainer


@pytest.fixture
def options(params):
    """Return the finetune settings, changed by keyword."""

    def changed(**changes):
        params["finetune"] |= changes
        return validate(params).finetune

    return changed


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fit(monkeypatch, options):
    """Fit rows of (prompt tokens, answer tokens) into 16 tokens; every token is a 1."""

    def tokens(_, row):
        prompt, answer = row.lengths
        return [1] * (prompt + answer), [NOT_LEARNED] * prompt + [1] * answer

    monkeypatch.setattr(rows_of_training, "training_tokens", tokens)

    def fitted(*lengths):
        rows = [
            SimpleNamespace(lengths=pair, source=f"mine.jsonl:{n}")
            for n, pair in enumerate(lengths, 1)
        ]
        return rows_of_training.truncate_rows(None, rows, "train", options(max_length=16))

    return fitted


def test_rows_that_fit_stay_whole_and_nothing_is_said(fit, capsys):
    assert [len(row["labels"]) for row in fit((4, 4), (10, 6))] == [8, 16]
    assert capsys.readouterr().out == ""


def test_a_row_without_room_for_its_answer_is_left_out_and_named(fit, capsys):
    rows = fit((4, 4), (16, 3), (30, 2), (12, 9))
    assert [len(row["labels"]) for row in rows] == [8, 16]
    said = capsys.readouterr().out
    assert "keep no answer and are left out: 2 (mine.jsonl:2, mine.jsonl:3)" in said
    assert "answer loses its end: 1 (mine.jsonl:4)" in said


def test_rows_of_which_none_keeps_an_answer_stop_the_stage(fit):
    with pytest.raises(UserError, match=r"max_length is 16: no row .*mine\.jsonl:1, mine\.jsonl:2"):
        fit((16, 3), (30, 2))


def test_every_pass_over_the_rows_is_complete_and_in_another_order(options):
    rows = Dataset.from_list([{"row": number} for number in range(8)])
    order = rows_of_training.order_rows(rows, options(max_steps=6, batch_size=4))["row"]
    passes = [list(order[first : first + 8]) for first in (0, 8, 16)]
    assert [sorted(rows) for rows in passes] == [list(range(8))] * 3
    assert passes[0] != passes[1] != passes[2]


def test_fewer_rows_than_a_step_takes_are_repeated(options):
    rows = Dataset.from_list([{"row": number} for number in range(3)])
    assert len(rows_of_training.order_rows(rows, options(max_steps=2, batch_size=8))) == 16


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
def test_a_loss_that_is_no_number_stops_the_run(name):
    at = SimpleNamespace(global_step=5)
    trainer.StopsWhenNotFinite().on_log(None, at, None, logs={name: 1.5})
    with pytest.raises(UserError, match=f"{name} is not finite at step 5: nothing is saved"):
        trainer.StopsWhenNotFinite().on_log(None, at, None, logs={name: float("nan")})


def test_a_run_that_diverged_leaves_no_checkpoint(tmp_path):
    class Diverges:
        def train(self, resume_from_checkpoint):
            assert resume_from_checkpoint == str(tmp_path / "kept/checkpoint-5")
            raise trainer.NotFinite("loss is not finite at step 7")

    (tmp_path / "kept/checkpoint-5").mkdir(parents=True)
    (tmp_path / "kept/checkpoint-5/trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="at step 7"):
        trainer.train(Diverges(), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_trained_weight_that_is_infinite_is_refused_by_name():
    model = torch.nn.Linear(2, 2)
    trainer.refuse_not_finite(model)
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(UserError, match="trained bias is not finite"):
        trainer.refuse_not_finite(model)


def test_the_upper_half_of_the_layers_is_adapted_where_that_is_wanted(options):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=5,
        vocab_size=8,
    )
    adapted = {
        layers: get_peft_model(
            model := LlamaForCausalLM(config), trainer.lora_config(options(layers=layers), model)
        )
        for layers in ("all", "upper_half")
    }
    names = {layers: names_of(model) for layers, model in adapted.items()}
    assert len(names["all"]) == 5 * 7 * 2
    assert names["upper_half"] == {n for n in names["all"] if int(n.split(".")[4]) >= 2}


def names_of(model: torch.nn.Module) -> set[str]:
    """Return the names of what is trained."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}
