"""Is a base model one that every later stage can work on? Asked at fetch, not at the first chat.

The model is loaded once, as later stages load it, and reads one chat: two seconds for 135 million parameters.
Tensors are compared both ways. One that is missing would be random, and one that nothing reads would be
dropped, each with a mere warning of transformers.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from stages.core.errors import UserError
from stages.core.files import read_json, write_json
from stages.core.running import what_ran_out
from stages.sources import headers
from stages.sources.headers import Stored, read_headers
from stages.weights.families import FAMILIES, rope_settings

HEAD_UNIT = (
    16  # of ONNX Runtime's GroupQueryAttention, for heads and the part of them that is rotated
)
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
IS_TIED = "set tie_word_embeddings to true in config.json if the head is tied, or copy it again"
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris. It is a city on the Seine."},
]


def check(folder: Path) -> str:
    """Raise `UserError` in one line for what quantize, finetune, optimize or chat could not take.

    Return what to say of a model that is whole, but answers no better than chance.
    """
    config = load_config(folder)
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {config.model_type!r} at model.source is not one of {known}")
    check_settings(config)
    tokenizer = load_tokenizer(folder)
    question = render(tokenizer, CHAT[:1], add_generation_prompt=True)
    check_tokens(folder, config, tokenizer, question)
    check_tied_head(config, read_headers(folder))
    model = load_model(folder, config)
    check_values(model)
    return answer(model, tokenizer)


def load_config(folder: Path) -> Any:
    """Load config.json."""
    with naming("config.json at model.source"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def check_settings(config: Any) -> None:
    """Raise for a setting that the exported graph does not follow: it would answer otherwise than PyTorch."""
    name, family = config.model_type, FAMILIES[config.model_type]
    for rope in rope_settings(config).values():
        check_rope(config, rope)
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    by_layer = layers and family.windows != "by layer"
    if window and (family.windows == "none" or by_layer):
        raise UserError(
            f"config.json at model.source has {'layer_types' if by_layer else 'sliding_window'}, which "
            f"PyTorch's {name} does not read: remove it there, or choose another model"
        )
    if "sliding_attention" in (layers or ()) and not getattr(config, "use_sliding_window", True):
        raise UserError(
            "config.json at model.source has layers of sliding_attention and use_sliding_window false, "
            "of which PyTorch on a CPU reads the one and on a GPU the other: choose another model"
        )
    for setting in family.refused:
        if value := getattr(config, setting, None):
            raise UserError(
                f"config.json at model.source has {setting} {value}, which a {name} graph and PyTorch "
                "do not both follow: choose another model"
            )


def check_rope(config: Any, rope: dict[str, Any]) -> None:
    """Raise for rotary positions that the exported graph cannot compute."""
    name, family = config.model_type, FAMILIES[config.model_type]
    if (kind := rope.get("rope_type", "default")) not in family.rope_types:
        raise UserError(
            f"config.json at model.source has rope type {kind!r}, which a {name} graph cannot "
            f"compute: choose a model with one of {', '.join(family.rope_types)}"
        )
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if part not in (None, 1) and not family.partial_rotation:
        raise UserError(
            f"config.json at model.source has partial_rotary_factor {part}, which a {name} graph "
            "cannot compute: choose another model"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for what, count in (("has", size), ("rotates", int(size * (part or 1)))):
        if count % HEAD_UNIT:
            raise UserError(
                f"config.json at model.source {what} {count} numbers in every head, which ONNX Runtime "
                f"takes in multiples of {HEAD_UNIT} only: choose another model"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer."""
    with naming("the tokenizer at model.source"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def render(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: bool) -> str:
    """Return a chat as text, or raise what the chat template says."""
    with naming("the chat template at model.source fails"):
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def check_tokens(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, question: str
) -> None:
    """Raise for a token that has no row in the embedding, where a text can contain it.

    Added tokens enter a text through the chat template or by their role only: what people type never
    becomes one (stages/text/chats.py).
    """
    added, rows = tokenizer.get_added_vocab(), config.vocab_size
    template = f"{question}{tokenizer.chat_template}"
    used = {token for name, token in added.items() if name in template}
    used |= set(tokenizer.get_vocab().values()) - set(added.values())
    used |= {token for role in ROLES if (token := getattr(tokenizer, role)) is not None}
    if beyond := sorted(token for token in used if token >= rows):
        name = tokenizer.convert_ids_to_tokens(beyond[0])
        raise UserError(no_row(name, beyond[0], rows))
    files = ("config.json", "generation_config.json")
    for file in (file for file in files if (folder / file).is_file()):
        settings = read_json(folder / file)
        for role in ROLES:
            values = settings.get(role)
            for token in values if isinstance(values, list) else [values]:
                if isinstance(token, int) and token >= rows:
                    raise UserError(no_row(f"{role} in {file} at model.source", token, rows))


def no_row(name: str, token: int, rows: int) -> str:
    """Say that a token is beyond the embedding."""
    return f"{name} is token {token}, but the embedding has {rows} rows: resize it, or take the token out"


def check_tied_head(config: Any, stored: dict[str, Stored]) -> None:
    """Raise for a head in the file that is not the embedding, though the config says that it is.

    The float model would use the file's head, the quantized one the embedding.
    """
    head = stored.get("lm_head.weight")
    named = [name for name in stored if name.endswith("embed_tokens.weight")]
    embedding = stored[named[0]] if named else None
    if not (config.tie_word_embeddings and head and embedding):
        return
    values = embedding.read()
    if not torch.equal(head.read().to(values.dtype), values):
        raise UserError(
            "lm_head.weight at model.source is not the embedding, though config.json ties them: "
            "set tie_word_embeddings to false there if the file's head is right, or remove it"
        )


def load_model(folder: Path, config: Any) -> torch.nn.Module:
    """Load the model. Raises unless its tensors are exactly those that the config describes.

    In bfloat16, which holds all that float16 and float32 can, roughly, in little memory.
    """
    with naming("config.json at model.source describes no model that can be built"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
        )
    unread, absent = sorted(found["unexpected_keys"]), sorted(found["missing_keys"])
    for name in absent:
        if like := [other for other in unread if other.endswith(name)]:
            raise UserError(
                f"{like[0]} at model.source should be {name}: save the model without its wrapper"
            )
    if absent:
        advice = IS_TIED if absent[0] == "lm_head.weight" else "copy the model again"
        raise UserError(f"{absent[0]} is missing from the weights at model.source: {advice}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{name} at model.source is {list(stored)}, but config.json asks for {list(wanted)}"
        )
    if unread:
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise UserError(
            f"nothing reads {unread[0]}{more} at model.source: {reader(unread[0], config)}"
        )
    return model.eval()


def reader(name: str, config: Any) -> str:
    """Name the setting of config.json with which a tensor would be read."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"num_hidden_layers is {config.num_hidden_layers} in config.json: correct it"
    for key in ("attention_bias", "mlp_bias"):
        changed = copy.deepcopy(config)
        setattr(changed, key, True)
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](changed)
        if name in model.state_dict():
            return f"set {key} to true in config.json, or take the tensor out"
    return f"a {config.model_type} has no such tensor: choose another model, or take the tensor out"


def check_values(model: torch.nn.Module) -> None:
    """Raise for a tensor that holds NaN or infinity."""
    for name, values in model.named_parameters():
        # both ends are infinite or NaN where any value is; looking at all values takes fifty times as long
        if not torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all():
            raise UserError(
                f"{name} at model.source holds NaN or infinity: "
                "copy it again, or choose a checkpoint from before training diverged"
            )


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Let the model read one chat. Raises unless its logits are numbers.

    Return a remark where it foresees the text no better than chance: random weights may, but trained ones
    that do were damaged, or belong to another tokenizer.
    """
    text = render(tokenizer, CHAT)
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with naming("the model at model.source cannot read a chat"):
        logits = model(tokens).logits[0].float()
    if not torch.isfinite(logits).all():
        raise UserError("the model at model.source answers NaN or infinity: choose another model")
    loss = cross_entropy(logits[:-1], tokens[0, 1:]).item()
    if loss < math.log(model.config.vocab_size):
        return ""
    return ", no better than chance at plain English (random weights?)"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn an error into one line that begins so: families, tokenizers and templates raise all kinds."""
    try:
        yield
    except Exception as error:
        if what_ran_out(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason}") from None


NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")


def check_is_loadable(folder: Path) -> None:
    """Raise unless the folder holds a config, safetensors weights and a tokenizer with a chat template."""
    for pattern in NEEDED:
        if not list(folder.glob(pattern)):
            raise UserError(f"the model at model.source has no {pattern}: choose one that has")
    headers.read_headers(folder)
    read_settings(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        read_settings(folder / "generation_config.json")
    settings = read_settings(folder / "tokenizer_config.json")
    if not (folder / "chat_template.jinja").exists() and not settings.get("chat_template"):
        raise UserError("the model at model.source has no chat template: choose an instruct model")


def read_settings(file: Path) -> dict[str, Any]:
    """Read a model's JSON settings. Raises `UserError` where they are none."""
    try:
        settings = read_json(file)
    except ValueError as error:
        raise UserError(f"{file.name} at model.source is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file.name} at model.source is not a JSON object: choose another model")
    return settings


def forget_remote_code(folder: Path) -> None:
    """Drop the pointers to Python files of the model's author: the classes of transformers are used."""
    for name in ("config.json", "tokenizer_config.json"):
        content = read_settings(folder / name)
        if content.pop("auto_map", None):
            write_json(folder / name, content)
