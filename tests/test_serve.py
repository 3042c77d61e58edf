"""`lab serve`: answers as `lab chat` gives them, many at once, to OpenAI's own client."""

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from lab.engine.models import Models
from lab.engine.turns import LEAST, End, Engine, QueueFullError, Request, Sampling, exact
from lab.models.chat import Speaker
from lab.models.light_tokenizer import LightTokenizer
from lab.serve import command
from lab.serve.answer import Answer
from lab.serve.page import HEADERS, PAGE
from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.text.chats import generation_prompt_ids
from support.browser import ENTER, Page
from support.processes import wait_until
from support.project import ROOT
from support.tiny_models import FAMILIES, checkpoint, exported, tokens, trained

NAMES = [None, "one", "two"]
LONG = tokens(150)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A tiny model's folder, and two adapters for it."""
    root = tmp_path_factory.mktemp("serve")
    packed = checkpoint(root, FAMILIES["llama"] | {"max_position_embeddings": 1024})
    folder, adapters = exported(packed, root / "onnx"), {}
    for seed, name in enumerate(("one", "two"), 1):
        trained(packed, root / name, seed)
        adapters[name] = root / f"{name}.onnx_adapter"
        convert(root / name, folder, adapters[name])
    return folder, adapters


@pytest.fixture(scope="module")
def direct(files) -> OnnxModel:
    """The model without a server; what the base says comes from the graph that the server uses for it."""
    model, base = OnnxModel(*files), OnnxModel(files[0])
    generate = model.generate
    model.generate = lambda prompt, count, adapter=None: (  # type: ignore[method-assign]
        generate(prompt, count, adapter) if adapter else base.generate(prompt, count)
    )
    return model


@pytest.fixture
def engine(files):
    engine = Engine(Models(*files), slots=3, queue=2)
    yield engine
    engine.close()


def submitted(engine, prompt, count=8, name=None, **options):
    """Submit a request; return its job and the queue that its tokens come to."""
    events = queue.Queue()
    adapter = engine.models.adapters[name] if name else None
    return engine.submit(Request(prompt, count, adapter, **options), events.put), events


def rest(events) -> tuple[list[int], End]:
    """Return an answer's tokens and its end."""
    found = []
    while not isinstance(event := events.get(timeout=60), End):
        found.append(event)
    return found, event


def said(engine, *words, **options) -> list[int]:
    return rest(submitted(engine, *words, **options)[1])[0]


def idle(engine) -> bool:
    """Say whether all kept answers have been read again."""
    return not engine.loads["running"] and all(k.sure == len(k.text) for k in engine._kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [8, 150, 400])
def test_tokens_are_those_of_the_model_alone(engine, direct, name, length):
    prompt = tokens(length)
    assert said(engine, prompt, 12, name) == direct.generate(prompt, 12, name)


def test_answers_at_once_are_those_of_the_model_alone(engine, direct):
    asked = [(tokens(20 + 40 * n), 10 + n, NAMES[n % 3]) for n in range(5)]
    streams = [submitted(engine, *each)[1] for each in asked]
    assert [rest(events)[0] for events in streams] == [direct.generate(*each) for each in asked]


def test_a_short_answer_is_done_before_a_long_one_that_came_first(engine):
    engine.models.base.ends = set()
    ends = queue.Queue()
    for name, count in (("long", 500), ("short", 3)):
        sink = lambda event, name=name: isinstance(event, End) and ends.put(name)  # noqa: E731
        engine.submit(Request(tokens(20), count), sink)
    assert [ends.get(timeout=60), ends.get(timeout=60)] == ["short", "long"]


def test_newcomers_come_first_and_leave_every_second_turn_to_the_others(engine, monkeypatch):
    turns, newcomers, read = [], [20, 30, 40], engine._read

    def reading(generator, text, start):
        turns.append(len(text))
        if newcomers:
            submitted(engine, tokens(newcomers.pop(0)), 1)
        return read(generator, text, start)

    monkeypatch.setattr(engine, "_read", reading)
    rest(submitted(engine, tokens(900), 1)[1])
    assert turns[:10] == [900, 20, 900, 30, 900, 40, *[900] * 4]


@pytest.mark.parametrize("name", [None, "one"])
def test_the_next_turn_reads_what_is_new_and_says_the_same(engine, direct, name):
    engine.models.base.ends = direct.ends = set()
    text, known = list(LONG), 0
    for turn in range(4):
        text += [30 + turn] * 9  # a question
        job, events = submitted(engine, list(text), 20, name)
        answer = rest(events)[0]
        assert answer == direct.generate(text, 20, name)
        assert job.reused == (0 if turn == 0 else exact(min(known, len(text) - LEAST), len(text)))
        text += answer
        known = len(text)
        wait_until(lambda: idle(engine))
    assert engine.loads["kept"] == 1


def test_an_answer_that_comes_back_otherwise_is_known_as_far_as_it_is_the_same(engine, direct):
    answer = said(engine, LONG, 20)
    wait_until(lambda: idle(engine))
    prompt = [*LONG, *answer[:3], *tokens(90)]
    job, events = submitted(engine, prompt, 8)
    assert rest(events)[0] == direct.generate(prompt, 8)
    assert 0 < job.reused <= len(LONG) + 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("one", {}), ("two", {})),
        (("one", {}), (None, {})),
        ((None, {}), ("one", {})),
        ((None, {}), (None, {"sampling": Sampling(0.5)})),
        ((None, {"sampling": Sampling(seed=1)}), (None, {"sampling": Sampling(seed=1)})),
    ],
)
def test_no_other_adapter_or_sampling_goes_on_with_what_is_kept(engine, first, second):
    answer = said(engine, LONG, 8, first[0], **first[1])
    wait_until(lambda: idle(engine))
    prompt = [*LONG, *answer, *tokens(90)]
    job, events = submitted(engine, prompt, 8, second[0], **second[1])
    rest(events)
    assert job.reused == 0


def test_a_conversation_that_outgrows_its_generator_is_read_again(engine, direct):
    answer = said(engine, LONG, 8)
    prompt = [*LONG, *answer, *tokens(300)]
    job, events = submitted(engine, prompt, 400)
    assert rest(events)[0] == direct.generate(prompt, 400)
    assert job.reused == 0


@pytest.mark.parametrize("length", [40, 60, 65, 120])
def test_a_change_of_rotation_changes_no_answer(length, tmp_path_factory):
    root = tmp_path_factory.mktemp("longrope")
    folder = exported(checkpoint(root, FAMILIES["phi3-longrope"]), root / "onnx")
    model, engine = OnnxModel(folder), Engine(Models(folder, {}))
    engine.models.base.ends = model.ends = set()
    text = tokens(length)
    for _ in range(3):
        answer = said(engine, list(text), 20)
        assert answer == model.generate(text, 20)
        text += [*answer, 7, 8, 9]
        wait_until(lambda: idle(engine))
    engine.close()


def test_a_seed_repeats_its_draws_and_another_does_not(engine):
    draws = [said(engine, tokens(9), 20, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_full_queue_refuses_and_who_leaves_makes_room(engine):
    engine.models.base.ends = set()
    jobs = [submitted(engine, tokens(9), 900)[0] for _ in range(5)]
    with pytest.raises(QueueFullError):
        submitted(engine, tokens(9))
    for job in jobs:
        job.cancel()
    wait_until(lambda: engine.loads == {"running": 0, "waiting": 0, "kept": 0})
    assert all(job.generator is None for job in jobs)


def test_what_fails_ends_alone(engine, direct, monkeypatch):
    real, broken = engine.models.generator, iter([True])

    def generator(*words, **options):
        if next(broken, False):
            raise RuntimeError("out of memory")
        return real(*words, **options)

    monkeypatch.setattr(engine.models, "generator", generator)
    bad, events = submitted(engine, tokens(8))
    other = submitted(engine, tokens(9), 8)[1]
    assert rest(events)[1] == End("error", "out of memory")
    assert rest(other)[0] == direct.generate(tokens(9), 8)
    assert bad.generator is None


def test_an_adapter_is_replaced_while_its_old_self_still_answers(engine, files, direct):
    engine.models.base.ends = set()
    old, (_, events) = engine.models.adapters["one"], submitted(engine, LONG, 300, "one")
    events.get(timeout=60)
    engine.unload("one").result(60)
    with pytest.raises(KeyError):
        submitted(engine, LONG, 8, "one")
    with pytest.raises(UserError, match="just been unloaded"):
        engine.submit(Request(LONG, 8, old), print)
    engine.load("one", files[1]["two"]).result(60)
    assert said(engine, LONG, 8, "one") == direct.generate(LONG, 8, "two")
    assert len(rest(events)[0]) == 299
    wait_until(lambda: not engine._retired)
    with pytest.raises(UserError, match="one is loaded already"):
        engine.load("one", files[1]["one"]).result(60)
    with pytest.raises(UserError, match=r"adapter three: .* does not exist"):
        engine.load("three", files[0] / "none").result(60)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_of_lab_chat_reads_what_is_new_and_says_the_same(files, name, capsys):
    with closing(Speaker(*files)) as speaker:
        model, turns, reused = OnnxModel(*files), [], []
        for question in ("the capital of France is a town " * 12, "and of Spain?", "why?"):
            turns.append({"role": "user", "content": question})
            prompt = generation_prompt_ids(speaker.tokenizer, turns)
            said = speaker.tokenizer.decode(
                model.generate(prompt, 20, name), skip_special_tokens=True
            )
            assert speaker.say(turns, name, 20) == said
            assert capsys.readouterr().out == said + "\n"
            turns.append({"role": "assistant", "content": said})
            reused.append(speaker.engine.counts["reused_tokens"])
    assert 0 == reused[0] < reused[1] < reused[2]


def test_lab_chat_says_in_one_line_why_there_is_no_answer(files, monkeypatch):
    with closing(Speaker(*files)) as speaker:
        monkeypatch.setattr(speaker.models, "generator", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="the model cannot answer: division by zero"):
            speaker.say(QUESTION, None, 4)


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, tokens, **_):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", [], "one two"),
        ("one two", ["two"], "one "),
        ("one two", ["wo", "e t"], "on"),
        ("aab", ["ab"], "a"),
        ("one t", ["two"], "one t"),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_not_shown(text, stops, expected):
    answer, shown = Answer(Letters(), {0}, stops), ""
    for letter in text:
        shown += answer.push(ord(letter))
        assert expected.startswith(shown)
        if answer.stopped:
            break
    assert shown + answer.flush() == expected
    assert answer.stopped == (expected != text)
    together = Answer(Letters(), {0}, stops)
    assert together.push(*map(ord, text)) + together.flush() == expected
    assert (together.tokens, together.stopped) == (answer.tokens, answer.stopped)


class Server:
    """`lab serve` as a process, and clients of it."""

    def __init__(self, *words, **environment):
        variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.cli", "serve", "--port", "0", *map(str, words)],
            stdout=subprocess.PIPE,
            env=variables,
            text=True,
        )
        self.line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+/v1", self.line)[0]
        self.http = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60)
        self.client = OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def figure(self, name: str) -> float:
        return float(
            re.search(rf"^lab_{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)[1]
        )

    def ask(self, **options):
        return self.client.chat.completions.create(**{"messages": QUESTION} | options)


QUESTION = [{"role": "user", "content": "what is the capital of France?"}]


@pytest.fixture(scope="module")
def server(files):
    folder, adapters = files
    words = [word for name, file in adapters.items() for word in ("--adapter", f"{name}={file}")]
    server = Server("--model", folder, *words, "--allow-loading", "--slots", 8, "--queue", 2)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def base(server) -> str:
    return server.client.models.list().data[0].id


@pytest.fixture(scope="module")
def chat(files, direct):
    """What `lab chat` says to the question, in up to 30 tokens."""
    tokenizer = LightTokenizer(files[0])
    prompt = generation_prompt_ids(tokenizer, QUESTION)
    return {
        name: tokenizer.decode(direct.generate(prompt, 30, name), skip_special_tokens=True)
        for name in NAMES
    }


def streamed(server, **options) -> str:
    chunks = server.ask(stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_base_and_its_adapters_are_listed_as_vllm_does(server, files, base):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == [base, "one", "two"]
    assert [model.parent for model in listed] == [None, base, base]
    assert [model.root for model in listed] == [str(files[0]), *map(str, files[1].values())]
    assert server.client.models.retrieve("one").id == "one"


def test_openais_client_gets_what_lab_chat_says(server, base, chat):
    for name in NAMES:
        answer = server.ask(model=name or base, max_tokens=30)
        assert answer.choices[0].message.content == chat[name]
        assert streamed(server, model=name or base, max_completion_tokens=30) == chat[name]
        assert answer.model == (name or base)
        assert (
            answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        )


def test_eight_at_once_get_what_lab_chat_says(server, base, chat):
    found = {}

    def ask(number: int) -> None:
        name = NAMES[number % 3]
        found[number] = (name, streamed(server, model=name or base, max_tokens=30))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(text == chat[name] for name, text in found.values())


def test_a_stream_says_its_usage_only_if_asked(server, base):
    def last(**options):
        return [*server.ask(model=base, stream=True, max_tokens=5, **options)][-1]

    assert last().choices[0].finish_reason in ("length", "stop")
    usage = last(stream_options={"include_usage": True}).usage
    assert 1 <= usage.completion_tokens <= 5


def test_a_stop_text_ends_an_answer(server, base, chat):
    stop = chat[None][2:4]
    whole = server.ask(model=base, max_tokens=30, stop=stop).choices[0]
    assert whole.message.content == chat[None][: chat[None].index(stop)]
    assert whole.finish_reason == "stop"
    assert streamed(server, model=base, max_tokens=30, stop=[stop, "zzz"]) == whole.message.content


def test_bare_texts_and_tokens_are_completed(server, base, files, direct):
    tokenizer = LightTokenizer(files[0])
    prompt = tokenizer.backend_tokenizer.encode("the capital").ids
    expected = tokenizer.decode(direct.generate(prompt, 8, "one"), skip_special_tokens=True)
    for given in ("the capital", prompt):
        answer = server.client.completions.create(model="one", prompt=given, max_tokens=8)
        assert answer.choices[0].text == expected
    pieces = server.client.completions.create(model="one", prompt=prompt, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_a_seed_repeats_an_answer(server, base):
    drawn = [
        server.ask(model=base, temperature=1.5, seed=seed, max_tokens=20).choices[0].message.content
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"model": "gpt-5"}, 404, "gpt-5 does not exist; there are: .*, one, two"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"n": 2}, 400, "n is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"extra_body": {"colour": "red"}}, 400, "colour is not supported"),
        ({"extra_body": {"logprobs": 0}}, 400, "logprobs is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": 2000}, 400, "does not fit into the model's context of 1024"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, 400, "not both"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"stop": ""}, 400, "stop must be"),
        ({"extra_body": {"stream": "yes"}}, 400, "stream: "),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "must be the user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, options, status, words):
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        server.ask(**{"model": "one"} | options)
    assert refused.value.status_code == status
    assert refused.value.body.keys() == {"message", "type", "param", "code"}


def test_what_asks_for_nothing_is_no_reason_to_refuse(server):
    nothing = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0}
    server.ask(model="one", max_tokens=1, user="me", response_format={"type": "text"}, **nothing)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    server.ask(model="one", max_tokens=1, messages=parts, extra_body={"colour": None})


def test_a_prompt_that_is_too_long_has_openais_code(server):
    long = [{"role": "user", "content": "the capital of France " * 500}]
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(model="one", messages=long)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * 9_000_000, {}, 413),
        (b"{}", {"host": "evil.example"}, 403),
    ],
    ids=["cut", "list", "surrogate", "plain text", "huge", "rebound name"],
)
def test_a_body_that_cannot_be_read_is_refused_in_openais_form(server, body, headers, status):
    headers = {"content-type": "application/json"} | headers
    found = server.http.post("/v1/chat/completions", content=body, headers=headers)
    assert found.status_code == status
    assert found.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_path_that_is_not_there_is_refused_in_openais_form(server):
    assert server.http.get("/v1/images").json()["error"]["message"] == "GET /v1/images: Not Found"
    assert server.http.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_makes_room(server, stream, base):
    """The tiny model may end an answer sooner than a client can leave it: some clients try."""
    body = {"model": base, "prompt": tokens(9), "max_tokens": 1000, "stream": stream}
    sent = json.dumps(body | {"temperature": 2.0, "seed": 1}).encode()
    host, port = server.url.split("/")[2].split(":")
    before = server.figure("ended_left_total")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as line:
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Length: {len(sent)}\r\nContent-Type: application/json\r\n\r\n"
            )
            line.sendall(head.encode() + sent)
        if server.figure("ended_left_total") > before:
            break
    wait_until(lambda: server.figure("ended_left_total") > before)
    wait_until(lambda: server.figure("running") + server.figure("waiting") == 0)


def test_adapters_come_and_go(server, files, chat):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    named = {"lora_name": "third", "lora_path": str(files[1]["two"])}
    assert server.http.post(load, json=named).status_code == 200
    assert streamed(server, model="third", max_tokens=30) == chat["two"]
    again = server.http.post(load, json=named)
    assert again.status_code == 400
    assert "third is loaded already" in again.json()["error"]["message"]
    assert server.http.post(unload, json={"lora_name": "third"}).status_code == 200
    assert server.http.post(unload, json={"lora_name": "third"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        server.ask(model="third")
    wrong = server.http.post(load, json=named | {"lora_path": str(files[0] / "model.onnx")})
    assert wrong.status_code == 400
    assert "third" not in [model.id for model in server.client.models.list()]


def test_health_and_figures_can_be_read(server):
    assert [server.http.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
    assert server.figure("generated_tokens_total") > 0
    assert server.figure("failures_total") == 0


def test_the_page_comes_with_its_policy(server):
    found = server.http.get("/")
    assert found.status_code == 200
    assert found.text == PAGE
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert HEADERS.items() <= {name.title(): value for name, value in found.headers.items()}.items()
    assert server.http.get("/", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.slow
def test_the_page_shows_what_lab_chat_says(server, base, chat, direct, files, browser):
    page = Page(browser, server.url.removesuffix("v1"))
    page.waits(
        lambda: (
            [box.get_attribute("value") for box in page.all("input[value]")] == [base, "one", "two"]
        )
    )
    page.all("#models input")[2].click()
    tokenizer, turns = LightTokenizer(files[0]), {name: [] for name in NAMES}
    for number, question in enumerate(("what is the capital of France?", "and of Spain?"), 1):
        page.all("#question")[0].send_keys(question, ENTER)
        page.waits(lambda number=number: len(page.all("article")) == 3 * number)
        page.waits(page.all("#send")[0].is_enabled)
        for name, shown in zip(NAMES, page.all("section:last-child .text"), strict=True):
            turns[name].append({"role": "user", "content": question})
            tokens = direct.generate(generation_prompt_ids(tokenizer, turns[name]), 256, name)
            said = tokenizer.decode(tokens, skip_special_tokens=True)
            assert shown.get_property("textContent") == said
            turns[name].append({"role": "assistant", "content": said})
    assert page.complaints() == []


def test_a_key_is_asked_for_and_sigterm_lets_an_answer_end(files):
    server = Server("--model", files[0], "--no-adapter", LAB_API_KEY="secret")
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/").text == PAGE  # which asks for the key
    client = OpenAI(base_url=server.url, api_key="secret", max_retries=0)
    name = client.models.list().data[0].id
    with pytest.raises(openai.PermissionDeniedError, match="--allow-loading"):
        client.post("/load_lora_adapter", body={}, cast_to=object)
    wild = {"temperature": 2.0, "seed": 1, "max_tokens": 900}
    pieces = client.completions.create(model=name, prompt=tokens(9), stream=True, **wild)
    next(pieces)
    server.process.send_signal(signal.SIGTERM)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] in ("stop", "length")
    assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0 is open to others: set --api-key or LAB_API_KEY"),
        ({"model": Path("nowhere"), "no_adapter": True}, "nowhere holds no ONNX model"),
        ({"no_adapter": True, "adapter": ["a=b"]}, "exclude each other"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    options = {"adapter": None, "no_adapter": False, "host": "127.0.0.1", "port": 0} | words
    with pytest.raises(UserError, match=message):
        command.serve(api_key=None, **options)


def test_a_model_with_its_adapter_in_it_takes_no_other(files, tmp_path):
    shutil.copytree(files[0], tmp_path / "merged")
    (tmp_path / "merged/lora.onnx").unlink()
    with pytest.raises(UserError, match="merged takes no adapter: leave --adapter out"):
        command.serve(["a=b"], model=tmp_path / "merged", host="127.0.0.1", port=0, api_key=None)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*in use.*--port"):
            command.serve(None, port=port, host="127.0.0.1", api_key=None)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs fastapi and uvicorn: `make setup` installs them"):
        command.need_packages()
