"""The text of one answer, up to the first of its stop texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lab.models.light_tokenizer import LightTokenizer
from lab.models.text_stream import TextStream


class Answer:
    """Tokens in, text out. What may be the beginning of a stop text is held back until that is certain."""

    def __init__(self, tokenizer: LightTokenizer, ends: Collection[int], stops: Sequence[str] = ()):
        self.tokens = 0
        self.stopped = False
        self._stream = TextStream(tokenizer)
        self._ends = ends
        self._stops = stops
        self._held = ""

    def push(self, *tokens: int) -> str:
        """Take the next tokens, those after a stop text left out; return the text that is certain now."""
        if not self._stops:
            return self._take(*tokens)
        text = ""
        for token in tokens:
            text += self._take(token)
            if self.stopped:
                break
        return text

    def flush(self) -> str:
        """Return what is left when no token comes any more."""
        return self._release(self._stream.flush(), last=True)

    def _take(self, *tokens: int) -> str:
        self.tokens += len(tokens)
        return self._release(
            self._stream.push(*(token for token in tokens if token not in self._ends))
        )

    def _release(self, new: str, last: bool = False) -> str:
        if not self._stops:
            return new
        held = self._held + new
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        back = 0 if last else max(beginning(held, stop) for stop in self._stops)
        self._held = held[len(held) - back :]
        return held[: len(held) - back]


def beginning(text: str, stop: str) -> int:
    """Return how many characters at a text's end may begin a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
