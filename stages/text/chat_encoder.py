"""A row's tokens by one tokenizer and its chat template, and which of them are learned.

    chat = ChatEncoder(tokenizer).chat(row)      # prompt, labels, answer

The prompt is the template's generation prompt, as at inference; the answer is what the template writes behind
it, up to the one token that ends it.

What people typed never becomes a control token: "<|im_end|>" in a question is ten characters. A control token
is one that the tokenizer calls special, or that the template writes around turns. "<think>" and other added
tokens are words of the model: a user who writes one gets that token.

Of a tokenizer only `chat_template`, `apply_chat_template`, `eos_token_id` and `backend_tokenizer` (the
`tokenizers.Tokenizer`) are used.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.text.conversation import Conversation, Turn

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


NOT_LEARNED = -100  # the label that cross entropy leaves out
THOUGHT = ("<think>", "</think>")  # of an answer: never control tokens
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a turn, by model family
STAND_INS = range(0xE000, 0xF900)  # private use: for answers and typed control tokens in a template
# Templates of the Llama 3 family write today's date, and the same row would be other tokens tomorrow. They
# get the day that those templates themselves fall back to.
DATE = {
    "%d": "26",
    "%-d": "26",
    "%B": "July",
    "%b": "Jul",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
}
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in DATE.items())
    + " }}{%- endmacro -%}"
)
OWN_NAMES = 0x100000  # private use: for the template's own control tokens, in `disarmed`


@dataclass
class Chat:
    """A row's tokens."""

    prompt: list[int]
    prompt_labels: list[int]  # earlier answers and their ends; NOT_LEARNED elsewhere
    answer: list[int]
    changed: bool  # an answer is not shown word for word


def said_by(role: str, content: str = "?") -> Turn:
    """Return a turn."""
    return {"role": role, "content": content}


def refusal(row: Conversation, reason: str) -> UserError:
    """Return an error that names the row."""
    return UserError(f"{row.source}: {reason}")


def common_start(one: str, other: str) -> str:
    """Return the text with which both begin."""
    pairs = zip(one, other, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(member, change) for member in value]
    if isinstance(value, dict):
        return {change(key): mapped(member, change) for key, member in value.items()}
    return value


class Disguised:
    """A row whose typed control tokens are single characters that stand nowhere in it.

    So they pass through a template, and the control tokens of the rendered text are the template's own.
    Answers lose their outer white space, which should not be learned.
    """

    def __init__(self, row: Conversation, typed: re.Pattern):
        messages = [
            turn | {"content": turn["content"].strip()} if turn["role"] == "assistant" else turn
            for turn in row.messages
        ]
        self.plain = replace(row, messages=messages)
        text = json.dumps([messages, row.tools], ensure_ascii=False)
        self.unused = (chr(code) for code in STAND_INS if chr(code) not in text)
        self.names: dict[str, str] = {}  # what was typed, by the character that stands for it

        def disguise(match: re.Match) -> str:
            known = {typed: name for name, typed in self.names.items()}
            name = known.get(match[0]) or next(self.unused)
            self.names[name] = match[0]
            return name

        messages, tools = mapped([messages, row.tools], lambda text: typed.sub(disguise, text))
        self.content = replace(row, messages=messages, tools=tools)

    def revealed(self, text: str) -> str:
        """Return a text with what was typed in it."""
        return "".join(self.names.get(character, character) for character in text)


class ChatEncoder:
    """Turns rows into tokens by one tokenizer and its chat template. Raises `UserError` naming the row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.template = None  # the tokenizer's own
        if "strftime_now" in tokenizer.chat_template:
            self.template = FIXED_DATE + tokenizer.chat_template
        self.core: Tokenizer = tokenizer.backend_tokenizer
        self.controls = self.find_controls()
        self.control_ids = set(self.controls.values())
        self.own_names = {control: chr(OWN_NAMES + n) for n, control in enumerate(self.controls)}
        either = "|".join(map(re.escape, self.controls)) or "(?!)"
        self.control = re.compile(either)
        self.typed = re.compile(either, re.IGNORECASE)  # a template may change the case
        self.end, self.ending = self.find_end()
        asked, answered = [said_by("user")], [said_by("user"), said_by("assistant")]
        without = self.render(Conversation(asked), prompt=False)
        self.has_generation_prompt = self.render(Conversation(answered), prompt=True) != without

    def find_controls(self) -> dict[str, int]:
        """Return text and id of the control tokens, longest first.

        The template writes one around turns if further turns bring more of it.
        """
        around_turns = {self.tokenizer.eos_token_id}
        for roles in (("user", "assistant", "user"), ("system", "user")):
            around_turns |= set(self.tokens_of_turns(*roles) - self.tokens_of_turns("user"))
        found = {
            token.content: number
            for number, token in self.core.get_added_tokens_decoder().items()
            if (token.special or number in around_turns)
            and token.content.strip()
            and token.content not in THOUGHT
        }
        return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))

    def tokens_of_turns(self, *roles: str) -> Counter[int]:
        """Count the tokens of a chat of empty turns; none where the template refuses their roles."""
        try:
            text = self.render(Conversation([said_by(role, "") for role in roles]), prompt=False)
        except UserError:
            return Counter()
        return Counter(self.encode(text).ids)

    def find_end(self) -> tuple[int, str]:
        """Return the token that ends an answer, and the text that the template puts behind one.

        That is not always the tokenizer's end-of-text token: Phi-3 ends a turn with <|end|>.
        """
        stand_in = chr(STAND_INS[0])
        chat = [said_by("user"), said_by("assistant", stand_in)]
        _, shown, behind = self.render(Conversation(chat), prompt=False).rpartition(stand_in)
        if not shown:
            raise UserError(
                "the model's chat template does not show what an assistant says as text"
            )
        tokens = self.encode(behind).ids
        end = next((t for t in tokens if t in self.control_ids), self.tokenizer.eos_token_id)
        if end is None:
            raise UserError("the model's tokenizer has no token that ends an answer (eos_token)")
        return end, behind

    def prompt(self, row: Conversation) -> list[int]:
        """Return the tokens before the reference answer."""
        shown = Disguised(row, self.typed)
        return self.encode(*self.disarm(shown, self.text(shown, prompt=True))).ids

    def chat(self, row: Conversation) -> Chat:
        """Return a row's tokens, and which of them are learned."""
        shown = Disguised(row, self.typed)
        prompt = self.text(shown, prompt=True)
        answer = self.answer_text(shown, prompt)
        answers = [t["content"] for t in shown.content.messages if t["role"] == "assistant"]
        pieces = self.around_answers(shown, prompt) if answers[1:] else [prompt]
        tokens, labels = self.labelled(shown, pieces)
        shown_answers = [*pieces[1::2], prompt[-len(answers[-1]) :] + answer]
        changed = len(shown_answers) < len(answers) or not all(
            said in text for said, text in zip(answers, shown_answers, strict=True)
        )
        return Chat(tokens, labels, self.answer_tokens(shown, prompt, answer), changed)

    def answer_text(self, shown: Disguised, prompt: str) -> str:
        """Return the text that the template writes behind the prompt.

        A generation prompt may hold what the whole chat does not show: an empty thought (Gemma 4), or the
        beginning of one (DeepSeek-R1). There the answer follows the generation prompt, as at inference.
        """
        answer = shown.content.messages[-1]["content"]
        if not answer:
            raise refusal(shown.plain, "the answer is empty")
        whole = self.text(shown, prompt=False)
        if whole.startswith(prompt):
            text = whole[len(prompt) :]
            if not self.control.sub("", text).strip():
                raise refusal(shown.plain, "the model's chat template shows nothing of the answer")
            header, found, behind = text.partition(answer)
            if found and header.strip() and not self.has_generation_prompt:
                return answer + behind  # no prompt ends with that header at inference
            return text
        opening = prompt[len(common_start(prompt, whole)) :].strip()
        if opening and answer.startswith(opening):
            answer = answer[len(opening) :].lstrip("\n")
        elif opening.count("<think>") > opening.count("</think>") and "</think>" not in answer:
            raise refusal(
                shown.plain,
                "the model's chat template opens <think> before an answer: begin this one with its "
                "thought and </think>, or with </think> alone",
            )
        return answer + self.ending

    def answer_tokens(self, shown: Disguised, prompt: str, answer: str) -> list[int]:
        """Return the answer's tokens behind those of the prompt, up to the one that ends it.

        Where the tokenizer would join the prompt's last token to the answer's first, the prompt stays as it
        is at inference, and the answer is encoded by itself.
        """
        before = self.encode(*self.disarm(shown, prompt)).ids

        def behind(answer: str) -> list[int]:
            whole = self.encode(*self.disarm(shown, prompt + answer)).ids
            if whole[: len(before)] == before:
                return whole[len(before) :]
            alone = self.encode(*self.disarm(shown, answer)).ids
            if self.words(before + alone) != self.words(whole):
                raise refusal(
                    shown.plain, "the model's tokenizer joins the prompt's end to the answer"
                )
            return alone

        tokens = behind(answer)
        if self.end in tokens:
            return tokens[: tokens.index(self.end) + 1]
        return [*behind(answer.rstrip()), self.end]

    def around_answers(self, shown: Disguised, prompt: str) -> list[str]:
        """Return the prompt in pieces, of which every second one is an answer as the template shows it.

        The template renders the chat with one character for each answer: what stands in the prompt in its
        place is the answer. What cannot be found like that is in no piece of its own.
        """
        stand_ins = []

        def stood_in(turn: Turn) -> Turn:
            if turn["role"] != "assistant":
                return turn
            stand_ins.append(next(shown.unused))
            kept = {key: value for key, value in turn.items() if key not in REASONING}
            return kept | {"content": stand_ins[-1]}

        messages = [stood_in(turn) for turn in shown.content.messages]
        text = self.render(replace(shown.content, messages=messages), prompt=True)
        # "Q {answer 1} Q {answer 2} Q": between the stand-ins is the template's own text. Where that text is
        # found in the real prompt, the gaps are the answers
        around = re.split(f"[{''.join(stand_ins)}]", text)
        found = re.fullmatch("(.*?)".join(map(re.escape, around)), prompt, re.DOTALL)
        if not found:
            return [prompt]
        pieces = [around[0]]
        for answer, after in zip(found.groups(), around[1:], strict=True):
            pieces += [answer, after]
        return pieces

    def labelled(self, shown: Disguised, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Return a prompt's tokens and labels: every second piece is learned, and the token that ends it."""
        armed = [self.disarm(shown, piece)[0] for piece in pieces]
        # a mark for each character, so that a token across a border is learned if any part of it is
        learned = "".join("01"[n % 2] * len(piece) for n, piece in enumerate(armed))
        encoded = self.encode("".join(armed), bool(shown.names))
        labels, in_answer = [], False
        for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
            ends = in_answer and token == self.end
            if "1" in learned[first:last]:
                in_answer = True
            elif token in self.control_ids:
                in_answer = False
            labels.append(token if ends or "1" in learned[first:last] else NOT_LEARNED)
        return encoded.ids, labels

    def leaves_out(self, row: Conversation) -> bool:
        """Return whether the template leaves out the reasoning of an earlier answer.

        Raises `UserError` where it leaves out tools, or the reasoning of the last answer.
        """
        advice = (
            "which the model's chat template does not show: remove them, or choose another model"
        )
        messages = row.messages
        if row.tools and self.same(row, replace(row, tools=None)):
            raise refusal(row, f"has tools, {advice}")
        left_out = False
        for number, said in enumerate(messages):
            for key in set(REASONING) & set(said):
                without = {k: v for k, v in said.items() if k != key}
                bare = [*messages[:number], without, *messages[number + 1 :]]
                if self.same(row, replace(row, messages=bare)):
                    if number == len(messages) - 1:
                        raise refusal(row, f"turn {number + 1} has {key}, {advice}")
                    left_out = True
        return left_out

    def same(self, row: Conversation, other: Conversation) -> bool:
        """Return whether the template makes the same of two rows."""
        return self.render(row, prompt=False) == self.render(other, prompt=False)

    def text(self, shown: Disguised, prompt: bool) -> str:
        """Return what the template makes of a row, or of all but its answer; what was typed is disguised."""
        text = self.render(shown.content, prompt)
        if shown.names and shown.revealed(text) != self.render(shown.plain, prompt):
            typed = ", ".join(sorted(set(shown.names.values())))
            raise refusal(shown.plain, f"the model's chat template changes text that holds {typed}")
        return text

    def render(self, row: Conversation, prompt: bool) -> str:
        """Return messages in the model's chat template: all of them, or those before the answer."""
        messages = row.messages[:-1] if prompt else row.messages
        tools = {"tools": row.tools} if row.tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **tools,
            )
        except Exception as error:  # noqa: BLE001  # jinja2's, and what a template's expressions raise
            reason = " ".join(str(error).split())
            raise refusal(row, f"the model's chat template refuses it: {reason}") from None

    def disarm(self, shown: Disguised, text: str) -> tuple[str, bool]:
        """Return what to encode instead of a text where control tokens were typed, and whether they were.

        The template's own control tokens get other names; what was typed is written out and matches nothing.
        """
        if not shown.names:
            return text, False
        if taken := next((c for c in text if ord(c) >= OWN_NAMES), None):
            raise refusal(shown.plain, f"holds U+{ord(taken):X} beside a control token: remove one")
        # first the template's own control tokens get names that nothing can type, then what was typed comes
        # back as it was: now it is text like any other
        text = self.control.sub(lambda match: self.own_names[match[0]], text)
        return shown.revealed(text), True

    def encode(self, text: str, disarmed: bool = False) -> Encoding:
        """Return the encoding (ids, offsets) of a rendered text."""
        core = self.disarmed if disarmed else self.core
        core.no_truncation()  # these three: what a tokenizer.json or an earlier call may have left on
        core.no_padding()
        core.encode_special_tokens = False
        return core.encode(text, add_special_tokens=False)

    def words(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return self.core.decode(tokens, skip_special_tokens=False)

    @cached_property
    def disarmed(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens, so that none can be typed."""
        from tokenizers import Tokenizer

        names = self.own_names
        parts = json.loads(self.core.to_str())
        for token in parts["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = parts["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(k, k): v for k, v in model["vocab"].items()}
        elif "vocab" in model:
            model["vocab"] = [[names.get(k, k), score] for k, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        core = Tokenizer.from_str(json.dumps(parts))
        if any(core.token_to_id(names[c]) != number for c, number in self.controls.items()):
            raise UserError(
                "a control token was typed, and the model's tokenizer cannot read it as text"
            )
        return core
