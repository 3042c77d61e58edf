"""What clients may ask, as records, and errors in OpenAI's form.

Whatever would change the answer and is not done here is refused by name; never is it ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lab.engine.turns import Sampling

# of what is not done here, the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
}
STOPS = 16

Strict = ConfigDict(extra="forbid", strict=True)
Record = TypeVar("Record", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]


class ApiError(Exception):
    """An answer that is none. `kind` is what OpenAI calls its type."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Part(BaseModel):
    """A piece of a message; text alone is understood."""

    model_config = Strict
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat."""

    model_config = Strict
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def turn(self) -> dict[str, str]:
        """Return it as the chat template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream says besides text."""

    model_config = Strict
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of completions have."""

    model_config = Strict
    model: str
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks: it changes no answer

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, None where the client leaves that open."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The texts before which the answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > STOPS or "" in given:
            raise ApiError(400, f"stop must be up to {STOPS} texts, none empty", param="stop")
        return given

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; the likeliest, like `lab chat`, where nothing asks for draws."""
        narrowed = self.top_p not in (None, 1) or self.top_k not in (None, -1, 0)
        warmth = self.temperature if self.temperature is not None else float(narrowed)
        if warmth == 0 or self.top_k == 1:
            return None
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(warmth, top_p, max(self.top_k or 0, 0), self.seed)


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, by either of its names."""
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "give max_tokens or max_completion_tokens, not both", param="max_tokens"
            )
        return self.max_tokens or self.max_completion_tokens


class TextRequest(Asked):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[int], Field(min_length=1)]


class LoadRequest(BaseModel):
    """The body of /v1/load_lora_adapter."""

    model_config = Strict
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadRequest(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    model_config = Strict
    lora_name: str


def parse(record: type[Record], raw: bytes) -> Record:
    """Read a request's body. Raises `ApiError` that names the first field that is wrong."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    asked = {key: value for key, value in body.items() if value is not None}
    for key in asked.keys() - record.model_fields.keys():
        if any(same(asked[key], neutral) for neutral in NEUTRAL.get(key, ())):
            del asked[key]
    try:
        return record.model_validate(asked)
    except ValidationError as error:
        raise refusal(error) from None


def same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: in Python 0 == False, and `logprobs: 0` asks for something."""
    return value == neutral and type(value) is type(neutral)


def refusal(error: ValidationError) -> ApiError:
    """Return the error for the first field that is wrong."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        field = first["loc"][-1]
        return ApiError(400, f"{field} is not supported here: leave it out", "unsupported", param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param)
    return ApiError(400, f"{param}: {first['msg']}", param=param)
