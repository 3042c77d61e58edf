"""Generation on tiny models: in batches as alone, across a change of rotation, within the context."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.weights.checkpoint import load_dequantized
from support.tiny_models import FAMILIES, checkpoint, exported, logits, tokens, trained

PAD = 1  # of the tiny tokenizer; its end token as well


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a tiny model, and the file of an adapter for it."""
    root = tmp_path_factory.mktemp("llama")
    packed = checkpoint(root, FAMILIES["llama"])
    folder = exported(packed, root / "onnx")
    trained(packed, root / "adapter", 1)
    convert(root / "adapter", folder, root / "one.onnx_adapter")
    return folder, root / "one.onnx_adapter"


@pytest.fixture(scope="module")
def llama(files) -> OnnxModel:
    """A tiny model with one adapter, and a second end token that it happens to say."""
    folder, adapter = files
    model = OnnxModel(folder, {"one": adapter})
    model.ends |= {model.generate(tokens(8), 5)[-1]}
    return model


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A tiny model that turns keys by other factors beyond 64 tokens, in PyTorch and exported."""
    root = tmp_path_factory.mktemp("longrope")
    packed = checkpoint(root, FAMILIES["phi3-longrope"])
    return load_dequantized(packed), OnnxModel(exported(packed, root / "onnx"))


def prompts(count: int, length: int) -> list[list[int]]:
    return np.array(tokens(count * length)).reshape(count, length).tolist()


@pytest.mark.parametrize("adapter", [None, "one"])
def test_a_batch_answers_as_its_prompts_do_alone(llama, adapter):
    batch = [tokens(8), *prompts(3, 8)]
    alone = [llama.generate(prompt, 20, adapter) for prompt in batch]
    assert llama.generate_many(batch, 20, adapter) == alone
    if adapter is None:  # which says its second end token early in one of them
        assert len({len(answer) for answer in alone}) > 1


def test_an_answer_stops_at_any_end_token_and_includes_it(llama):
    answer = llama.generate_many([tokens(8)], 20)[0]
    assert answer[-1] in llama.ends
    assert not llama.ends & set(answer[:-1])


def test_prompts_that_end_in_the_padding_token_answer_in_a_batch_as_alone(llama):
    batch = [[*prompt[:-1], PAD] for prompt in prompts(3, 8)]
    assert llama.generate_many(batch, 6) == [llama.generate(prompt, 6) for prompt in batch]


@pytest.mark.parametrize("adapter", [None, "one"])
def test_likelihoods_of_a_batch_are_those_of_its_rows(llama, adapter):
    """Also where an answer holds the padding token, or is the longest and ends in it."""
    batch = prompts(4, 8)
    answers = [[20, 30, 40], [PAD], [50, PAD, 60, PAD], [70, 80, 90, 100, PAD, PAD]]
    together = llama.negative_log_likelihoods(batch, answers, adapter)
    for prompt, answer, found in zip(batch, answers, together, strict=True):
        text = llama.logits(prompt + answer, adapter)[len(prompt) - 1 : -1].astype(np.float64)
        normalizer = np.log(np.exp(text).sum(axis=-1))
        expected = normalizer - text[np.arange(len(answer)), answer]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "one"])
def test_one_reading_gives_the_answer_and_the_likelihoods_of_two(llama, adapter):
    """References are the greedy answer, begin as it does, end early, differ at once, or go on behind it."""
    opening = tokens(6)
    texts = [[*opening, *row] for row in prompts(5, 7)]
    said = [llama.generate(text, 20, adapter) for text in texts]
    other = (said[3][0] + 1) % 400
    references = [said[0], [*said[1][:2], 9, 9], said[2][:3], [other, 5], [*said[4], 5]]
    found = list(llama.examine(texts, references, 20, adapter))
    assert [answer for answer, _ in found] == said
    for text, reference, (_, likelihoods) in zip(texts, references, found, strict=True):
        alone = llama.negative_log_likelihood(text, reference, adapter)
        np.testing.assert_allclose(likelihoods, alone, atol=1e-4)


def test_an_answer_is_no_longer_than_asked_where_its_reference_is(llama, monkeypatch):
    monkeypatch.setattr(llama, "ends", set())
    said = llama.generate(tokens(8), 20)
    [(answer, likelihoods)] = llama.examine([tokens(8)], [said], 4)
    assert answer == said[:4]
    assert len(likelihoods) == len(said)


def test_one_reading_across_a_change_of_rotation_is_that_of_two(longrope):
    text, model = tokens(130), longrope[1]
    model.ends = set()
    [(answer, likelihoods)] = model.examine([text[:60]], [text[60:70]], 10)
    assert answer == model.generate(text[:60], 10)
    alone = model.negative_log_likelihood(text[:60], text[60:70])
    np.testing.assert_allclose(likelihoods, alone, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "one"])
def test_continuations_of_one_prompt_are_scored_as_each_alone(llama, adapter):
    prompt = tokens(9)
    greedy = llama.generate(prompt, 3, adapter)
    continuations = [greedy, [greedy[0], (greedy[1] + 1) % 400], [7]]
    found = llama.score(prompt, continuations, adapter)
    for more, (likelihood, _) in zip(continuations, found, strict=True):
        alone = llama.negative_log_likelihood(prompt, more, adapter).sum()
        assert likelihood == pytest.approx(-alone, abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [True, False, greedy[0] == 7]


@pytest.mark.parametrize("length", [40, 60, 63, 64, 65])
def test_an_answer_that_crosses_a_change_of_rotation_is_pytorchs(longrope, length):
    torch_model, model = longrope
    model.ends = set()
    text = tokens(length)
    answer = model.generate(text, 30)
    for token in answer:
        assert token == int(logits(torch_model, text)[-1].argmax())
        text.append(token)
    assert len(answer) == 30


def test_likelihoods_on_both_sides_of_a_change_of_rotation_are_those_of_its_rows(longrope):
    """A batch is turned by the factors of its longest row: rows of 40 and 90 tokens, the change after 64."""
    text, model = tokens(130), longrope[1]
    asked, answers = [text[:20], text[20:40]], [text[40:60], text[60:130]]
    for row, found in enumerate(model.negative_log_likelihoods(asked, answers)):
        alone = model.negative_log_likelihood(asked[row], answers[row])
        np.testing.assert_allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (0, 5, "the prompt is empty: there is nothing to answer"),
        (257, 1, "a prompt of 257 tokens and an answer of up to 1 do not fit into the model's "),
        (250, 7, "a prompt of 250 tokens and an answer of up to 7 .* context of 256"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_with_both_numbers(llama, prompt, new, message):
    with pytest.raises(UserError, match=message):
        llama.generate(tokens(prompt), new)


def test_an_answer_may_fill_the_context_or_be_empty(llama):
    assert 1 <= len(llama.generate(tokens(250), 6)) <= 6
    assert llama.generate(tokens(8), 0) == []


def test_the_cache_is_as_large_as_the_request(llama, monkeypatch):
    asked = []
    real = llama.generator
    monkeypatch.setattr(
        llama, "generator", lambda length, *a, **k: asked.append(length) or real(length, *a, **k)
    )
    llama.generate(tokens(8), 5)
    assert asked == [13]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:100], lambda b: b"hello", lambda b: b"", lambda b: b[:40] + bytes(40) + b[80:]],
    ids=["cut", "text", "empty", "overwritten"],
)
def test_an_adapter_file_that_is_none_is_one_line_with_a_way_out(damage, files, tmp_path):
    folder, adapter = files
    broken = tmp_path / "broken.onnx_adapter"
    broken.write_bytes(damage(adapter.read_bytes()))
    with pytest.raises(
        UserError, match="not an ONNX Runtime adapter, or is damaged: `lab adapt"
    ) as e:
        OnnxModel(folder, {"one": broken})
    assert "::" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.onnx", lambda b: b[:500]),
        ("model.onnx.data", lambda b: b[:500]),
        ("genai_config.json", lambda b: b"{"),
    ],
)
def test_a_model_that_is_cut_is_called_damaged(name, damage, files, tmp_path):
    folder = shutil.copytree(files[0], tmp_path / "onnx")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match="is damaged or incomplete") as e:
        OnnxModel(folder)
    assert ".cc:" not in str(e.value)


def test_a_missing_adapter_and_a_folder_are_told_apart(files, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        OnnxModel(files[0], {"one": tmp_path / "none"})
    with pytest.raises(UserError, match="is a folder"):
        OnnxModel(files[0], {"one": tmp_path})


def test_any_of_several_end_tokens_ends_an_answer(files, tmp_path):
    folder = shutil.copytree(files[0], tmp_path / "onnx")
    config = json.loads((folder / "genai_config.json").read_text())
    prompt = tokens(8)
    said = OnnxModel(folder).generate(prompt, 8)
    config["model"]["eos_token_id"] = [PAD, said[3]]
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert OnnxModel(folder).generate(prompt, 8) == said[: said.index(said[3]) + 1]
