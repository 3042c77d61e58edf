"""OpenAI's HTTP interface to an engine, as an ASGI application.

    app = make_app(Service(engine, tokenizer, "SmolLM2-135M-Instruct"))

Answers are greedy unless the request asks for draws; prompts come from the chat template that training used.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from lab.engine import turns as engines
from lab.engine.models import Adapter
from lab.engine.turns import ClosedError, End, Engine, QueueFullError
from lab.models.light_tokenizer import LightTokenizer
from lab.serve.answer import Answer
from lab.serve.metrics import exposition
from lab.serve.page import HEADERS, PAGE
from lab.serve.protocol import (
    ApiError,
    Asked,
    ChatRequest,
    LoadRequest,
    TextRequest,
    UnloadRequest,
    parse,
)
from stages.core.errors import UserError
from stages.text.chats import generation_prompt_ids

# what ASGI passes around
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LARGEST = (
    2 * 2**20
)  # bytes of a body: more text than a context holds, and a second of the tokenizer's time
OPEN = ("/livez", "/readyz")  # what asks for no key
# Seconds between two pieces of a stream, the first and the last of which come at once. Whoever reads sees no
# difference, and a write for every token takes a twentieth of two cores from those that make tokens.
PACE = 0.03
CHUNKS = {"chat": "chat.completion.chunk", "text": "text_completion"}
WHOLE = {"chat": "chat.completion", "text": "text_completion"}


@dataclass
class Service:
    """What the routes share."""

    engine: Engine
    tokenizer: LightTokenizer
    base: str  # the name of the model without adapter
    max_tokens: int = 256  # of an answer whose request says nothing
    api_key: str | None = None
    may_load: bool = False
    behind_gateway: bool = False  # somebody in front checks who asks, and under which name
    on_ready: Callable[[], None] = lambda: None
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def adapter(self, model: str) -> Adapter | None:
        """Return the adapter of a model's name, None for the base."""
        if model == self.base:
            return None
        adapters = self.engine.models.adapters
        if model not in adapters:
            there = ", ".join([self.base, *adapters])
            message = f"the model {model} does not exist; there are: {there}"
            raise ApiError(404, message, "model_not_found", "model")
        return adapters[model]

    def listed(self) -> list[dict[str, Any]]:
        """Return the base and its adapters, as vLLM lists them."""
        models = self.engine.models
        common = {"object": "model", "created": self.created, "owned_by": "olive-lab"}
        base = {"id": self.base, **common, "root": str(models.folder), "parent": None}
        return [
            base | {"max_model_len": models.base.context_length},
            *(
                {"id": each.name, **common, "root": str(each.file), "parent": self.base}
                for each in models.adapters.values()
            ),
        ]


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.on_ready()
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(404, http_error)
    app.add_exception_handler(405, http_error)
    app.add_exception_handler(Exception, bug)
    app.add_middleware(Guard, service=service)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=HEADERS)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.listed()}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        service.adapter(model)
        return next(each for each in service.listed() if each["id"] == model)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await body_of(request))
        return complete(service, asked, "chat", chat_prompt(service, asked))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(TextRequest, await body_of(request))
        return complete(service, asked, "text", text_prompt(service, asked))

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> dict[str, str]:
        allow_loading(service)
        asked = parse(LoadRequest, await body_of(request))
        if asked.lora_name == service.base:
            raise ApiError(400, f"{service.base} is the base model's name", param="lora_name")
        await called(service.engine.load(asked.lora_name, Path(asked.lora_path)))
        return {"status": "success", "message": f"adapter {asked.lora_name} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> dict[str, str]:
        allow_loading(service)
        asked = parse(UnloadRequest, await body_of(request))
        if asked.lora_name not in service.engine.models.adapters:
            service.adapter(asked.lora_name)
            raise ApiError(400, f"{service.base} is the base model", param="lora_name")
        await called(service.engine.unload(asked.lora_name))
        return {"status": "success", "message": f"adapter {asked.lora_name} is unloaded"}

    @app.get("/livez")
    async def livez() -> Response:
        return PlainTextResponse(
            "ok\n" if service.engine.alive else "dead\n", health(service, False)
        )

    @app.get("/readyz")
    async def readyz() -> Response:
        return PlainTextResponse(
            "draining\n" if service.draining else "ok\n", health(service, True)
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        text = exposition(service.engine)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def health(service: Service, ready: bool) -> int:
    """Return 200 while the engine lives, and if `ready` while new requests are taken."""
    return 200 if service.engine.alive and not (ready and service.draining) else 503


def allow_loading(service: Service) -> None:
    """Raise `ApiError` unless adapters may come and go: whoever asks names files of this machine."""
    if not service.may_load:
        raise ApiError(
            403, "adapters are fixed: start the server with --allow-loading", "forbidden"
        )


async def called(future: Any) -> None:
    """Wait for the engine to do something that users may have got wrong."""
    try:
        await asyncio.wrap_future(future)
    except UserError as error:
        raise ApiError(400, str(error)) from None


async def body_of(request: Request) -> bytes:
    """Read a body of bounded size, sent as JSON.

    A page of another site can make a browser send plain text here, but not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise ApiError(413, f"the body is larger than {LARGEST} bytes")
        parts.append(part)
    return b"".join(parts)


class Guard:
    """Lets requests in: those with the key, or where there is none those to loopback names.

    The latter because a page of another site may point its own name at 127.0.0.1 (DNS rebinding). Behind a
    gateway, which has done all that, everybody.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], service: Service):
        self.app, self.key = app, service.api_key
        self.behind_gateway = service.behind_gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        wrong = None
        if scope["type"] == "http" and scope["path"] not in OPEN:
            wrong = self.refusal(Request(scope))
            if scope["path"] == "/" and self.key is not None:
                wrong = None  # the page asks people for the key: a browser cannot send it along
        passed = self.app if wrong is None else JSONResponse(wrong.body, wrong.status)
        await passed(scope, receive, send)

    def refusal(self, request: Request) -> ApiError | None:
        """Return why a request must not pass, if so."""
        if self.key is None:
            if self.behind_gateway or loopback(request.url.hostname or ""):
                return None
            host = request.headers.get("host")
            return ApiError(403, f"{host} is not this machine's loopback name", "forbidden")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.key.encode()):
            return None
        message = "the API key is missing or wrong: send Authorization: Bearer KEY"
        return ApiError(401, message, "invalid_api_key", kind="authentication_error")


def loopback(host: str) -> bool:
    """Say whether a host's name or address means this machine alone."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def chat_prompt(service: Service, asked: ChatRequest) -> list[int]:
    """Return the tokens of a chat, by the code of `lab chat`."""
    turns = [message.turn() for message in asked.messages]
    if turns[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    refuse_broken_text([turn["content"] for turn in turns], "messages")
    try:
        return generation_prompt_ids(service.tokenizer, turns)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None


def text_prompt(service: Service, asked: TextRequest) -> list[int]:
    """Return the tokens of a bare text, which may hold control tokens; or tokens as they are."""
    core = service.tokenizer.backend_tokenizer
    if isinstance(asked.prompt, str):
        refuse_broken_text([asked.prompt], "prompt")
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = False
        return core.encode(asked.prompt).ids
    size = core.get_vocab_size()
    if not all(0 <= token < size for token in asked.prompt):
        raise ApiError(400, f"tokens are numbers from 0 to {size - 1}", param="prompt")
    return asked.prompt


def refuse_broken_text(texts: list[str], param: str) -> None:
    """Raise `ApiError` for half of a surrogate pair, which JSON can hold and no text."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "half a surrogate pair is no text", param=param) from None


def complete(service: Service, asked: Asked, kind: str, prompt: list[int]) -> Response:
    """Give a request to the engine, and return the response that follows its tokens."""
    adapter = service.adapter(asked.model)
    context, limit = service.engine.models.base.context_length, asked.limit
    if len(prompt) + (limit or 1) > context:
        message = (
            f"the prompt has {len(prompt)} tokens, and with {limit or 1} of an answer it does not "
            f"fit into the model's context of {context}"
        )
        raise ApiError(
            400, message, "context_length_exceeded", "messages" if kind == "chat" else "prompt"
        )
    limit = limit or min(service.max_tokens, context - len(prompt))
    reply = Reply(service, asked, kind)
    try:
        request = engines.Request(prompt, limit, adapter, asked.sampling)
        reply.job = service.engine.submit(request, reply.sink())
    except UserError as error:
        raise ApiError(400, str(error)) from None
    except QueueFullError:
        raise ApiError(
            429, "as many requests wait as may: try again", "queue_full", kind="rate_limit_error"
        ) from None
    except ClosedError:
        raise ApiError(503, "the server is shutting down", kind="server_error") from None
    return reply


class Reply(Response):
    """A response that follows an answer as it is made, and ends it when the client leaves."""

    job: engines.Job

    def __init__(self, service: Service, asked: Asked, kind: str):
        super().__init__()
        self.service, self.asked, self.kind = service, asked, kind
        self.answer = Answer(service.tokenizer, service.engine.models.base.ends, asked.stops)
        self.usage_wanted = asked.usage_wanted
        self.head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": (CHUNKS if asked.stream else WHOLE)[kind],
            "created": int(time.time()),
            "model": asked.model,
        }
        self.events: deque[int | End] = deque()
        self.news = asyncio.Event()

    def sink(self) -> engines.Sink:
        """Return what the engine's thread calls. It wakes this one only to send something."""
        wake = asyncio.get_running_loop().call_soon_threadsafe
        pace = PACE if self.asked.stream or self.asked.stops else math.inf
        next_time = 0.0 if pace == PACE else math.inf

        def sink(event: int | End) -> None:
            nonlocal next_time
            self.events.append(event)
            now = time.monotonic()
            if now >= next_time or isinstance(event, End):
                next_time = now + pace
                with suppress(RuntimeError):  # the loop is closed: nobody is there any more
                    wake(self.news.set)

        return sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes, unless the client goes first."""
        work = asyncio.ensure_future((self.stream if self.asked.stream else self.whole)(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # an answer that is over takes no harm; one that stop ended is kept for the next turn
            self.job.cancel(keep=self.answer.stopped)
            gone.cancel()
            if not work.done():
                work.cancel()
        if not work.cancelled() and work.done():
            with suppress(OSError):
                work.result()

    async def pieces(self) -> AsyncIterator[tuple[str, End | None]]:
        """Yield the answer's text in pieces, the last one with its end."""
        end = None
        while end is None:
            await self.news.wait()
            self.news.clear()
            tokens = []
            while self.events:
                event = self.events.popleft()
                if isinstance(event, End):
                    end = event
                else:
                    tokens.append(event)
            text = self.answer.push(*tokens)
            if end is not None and not self.answer.stopped:
                text += self.answer.flush()
            if self.answer.stopped:
                end = End("stop")
            if text or end:
                yield text, end

    async def whole(self, send: Send) -> None:
        """Send the answer when it is complete."""
        text, end = "", None
        async for piece, end in self.pieces():  # noqa: B007  # the last end is read below
            text += piece
        if end is None or end.error is not None:
            response = JSONResponse(failure(end).body, 500)
        else:
            said = (
                {"message": {"role": "assistant", "content": text}}
                if self.kind == "chat"
                else {"text": text}
            )
            choice = {"index": 0, **said, "logprobs": None, "finish_reason": end.reason}
            response = JSONResponse(self.head | {"choices": [choice], "usage": self.usage()})
        await response({"type": "http"}, nothing, send)

    async def stream(self, send: Send) -> None:
        """Send the answer as server-sent events."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(*records: dict[str, Any] | str) -> None:
            texts = [
                r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records
            ]
            body = "".join(f"data: {text}\n\n" for text in texts).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await say(
            *([self.chunk({"role": "assistant", "content": ""})] if self.kind == "chat" else [])
        )
        async for text, end in self.pieces():
            records: list[dict[str, Any] | str] = [self.chunk({"content": text})] if text else []
            if end is not None and end.error is not None:
                records.append(failure(end).body)
            elif end is not None:
                records.append(self.chunk({}, end.reason))
                if self.usage_wanted:
                    records.append(self.head | {"choices": [], "usage": self.usage()})
            await say(*records, *(["[DONE]"] if end is not None else []))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """Return one event of a stream."""
        said = {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        usage = {"usage": None} if self.usage_wanted else {}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return self.head | {"choices": [choice]} | usage

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens; cached ones were known from the conversation's last turn."""
        prompt = len(self.job.request.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.answer.tokens,
            "total_tokens": prompt + self.answer.tokens,
            "prompt_tokens_details": {"cached_tokens": self.job.reused},
        }


def failure(end: End | None) -> ApiError:
    """Return the error for an answer that could not be made."""
    return ApiError(500, (end.error if end else None) or "no answer", kind="server_error")


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def nothing() -> Any:
    """Stand for a client that says nothing more."""


async def api_error(_: Request, error: Exception) -> Response:
    """Answer with an error of ours."""
    assert isinstance(error, ApiError)  # noqa: S101  # as it is registered
    return JSONResponse(
        error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None
    )


async def http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that is not there."""
    status, detail = getattr(error, "status_code", 404), getattr(error, "detail", "Not Found")
    body = ApiError(status, f"{request.method} {request.url.path}: {detail}").body
    return JSONResponse(body, status, getattr(error, "headers", None))


async def bug(_: Request, error: Exception) -> Response:
    """Answer for a mistake of ours, whose traceback is in the server's log."""
    return JSONResponse(ApiError(500, type(error).__name__, kind="server_error").body, 500)
