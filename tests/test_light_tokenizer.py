"""The tokenizer that `lab chat` loads in a moment gives what transformers' own gives."""

import pytest
from transformers import AutoTokenizer

from lab.models.light_tokenizer import LightTokenizer
from stages.core.errors import UserError
from stages.sources import random_model
from stages.text.chats import generation_prompt_ids
from support.project import ROOT

TEXTS = ["plain words", "👩‍👩‍👧‍👦 emoji 🇨🇭", "<|im_end|> typed", "漢字\n\n  indented", ""]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "where is <b>Zürich</b>?"},
    {"role": "assistant", "content": "in Switzerland", "name": None},
    {"role": "user", "content": "and Chicago?"},
]
TEMPLATES = {
    "chatml": random_model.CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "none dropped": "{% for m in messages %}{{ 'name' in m }}{% endfor %}",
    "prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}\n  >{% endif %}",
    "blocks": "{% if true %}\n  a\n{% endif %}\n  {% if true %}b{% endif %}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return LightTokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_same_tokens(both, text):
    light, full = both
    tokens = light.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens == full(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_has_the_tokens_that_training_used(both, text):
    light, full = both
    chat = [*CHAT, {"role": "user", "content": text or "?"}]
    assert generation_prompt_ids(light, chat) == generation_prompt_ids(full, chat)


@pytest.mark.parametrize("skip", [False, True])
def test_tokens_have_the_same_text(both, skip):
    tokens = list(range(0, 400, 7))
    light, full = both
    assert light.decode(tokens, skip_special_tokens=skip) == full.decode(
        tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


def test_it_knows_the_same_control_tokens(both):
    light, full = both
    assert light.eos_token_id == full.eos_token_id
    assert light.special_tokens_map == full.special_tokens_map


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_the_same_text(folder, template, prompt):
    light, full = LightTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    light.chat_template = full.chat_template = template
    assert light.apply_chat_template(
        CHAT, add_generation_prompt=prompt
    ) == full.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)


def test_a_template_cannot_reach_python(folder):
    light = LightTokenizer(folder)
    light.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(Exception, match="unsafe"):
        light.apply_chat_template(CHAT)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        LightTokenizer(tmp_path)
