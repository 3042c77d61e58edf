"""`lab serve` beside the model without a server: speed, first token, fairness, a next turn, memory.

    python -m benchmarks.serve          # in a workspace after `dvc repro`; six minutes on a quiet machine
    python -m benchmarks.serve --only memory batches     # some parts, printed and not kept

A real server, OpenAI's client in this process, the same prompts given to OnnxModel directly, in turns.
Writes benchmarks/results/serve.json; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

from benchmarks.machine import keep
from lab.models.light_tokenizer import LightTokenizer
from lab.models.text_stream import TextStream
from stages.answers.generation import OnnxModel
from stages.text.chats import generation_prompt_ids

ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
REPEATS, NEW, AT_ONCE = 3, 96, 8
BATCH, REQUESTS, EXTRA = 4, 1000, 5
PROSE = Path("data/heldout.txt").read_text(encoding="utf-8")
STORY = "Write a long story about a lighthouse keeper and every ship that passes by."


def main() -> None:
    """Measure, keep the figures, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, help="some parts, not kept")
    only = parser.parse_args().only
    figures: dict[str, Any] = {}
    for name in only or PARTS:
        found = PARTS[name]()
        print(name, found, flush=True)
        figures |= found
    if not only:
        keep("serve", figures)


def served() -> dict[str, Any]:
    """Return what clients of a server notice."""
    tokenizer = LightTokenizer(ONNX)
    with running() as (client, base, process, seconds):
        load = round(os.getloadavg()[0], 1)  # what else ran: above 0.5 no speed here means much
        figures: dict[str, Any] = {"load_average_before": load, "ready_s": seconds}
        answers: dict[str, list[str]] = {}
        for name, model, adapter in (
            ("base", OnnxModel(ONNX), None),
            ("adapter", OnnxModel(ONNX, {"a": ADAPTER}), "a"),
        ):
            served = "adapter" if adapter else base
            figures[name] = compare(client, served, model, adapter, tokenizer)
            answers[served] = [
                directly(model, adapter, tokenizer, question(number), NEW).text
                for number in range(AT_ONCE // 2)
            ]
        figures["same_text_at_once"] = at_once(client, answers)
        figures["short_beside_long_first_token_ms"] = beside(client, base)
        figures["next_turn"] = next_turn(client, base)
        figures["server_mib"] = round(psutil.Process(process.pid).memory_info().rss / 2**20)
        process.send_signal(signal.SIGTERM)
        figures["exit_code_after_sigterm"] = process.wait(60)
    return figures


def batches() -> dict[str, Any]:
    """Return what a batch of equal adapters would gain, and what it would do to greedy answers."""
    tokens = LightTokenizer(ONNX).backend_tokenizer.encode(PROSE).ids
    prompts = [tokens[90 * number : 90 * number + 70] for number in range(3 * BATCH)]
    figures: dict[str, Any] = {}
    for name, model, adapter in (
        ("base", OnnxModel(ONNX), None),
        ("adapter", OnnxModel(ONNX, {"a": ADAPTER}), "a"),
    ):
        model.ends = set()
        shares, same = [], 0
        for start in range(0, len(prompts), BATCH):
            group = prompts[start : start + BATCH]
            moments = [time.perf_counter()]
            together = model.generate_many(group, NEW, adapter)
            moments.append(time.perf_counter())
            alone = [model.generate(prompt, NEW, adapter) for prompt in group]
            moments.append(time.perf_counter())
            shares.append((moments[1] - moments[0]) / (moments[2] - moments[1]))
            same += sum(a == b for a, b in zip(together, alone, strict=True))
        figures[name] = {
            "share_of_the_sequence": round(statistics.median(shares), 3),
            "same_tokens": f"{same} of {len(prompts)}",
        }
    return {f"batch_of_{BATCH}": figures}


def memory() -> dict[str, Any]:
    """Return what the server grows by over many requests, adapters that come and go, and one adapter more."""
    with running("--allow-loading") as (client, base, process, _):
        names = [base, "adapter"]

        def mib() -> float:
            return psutil.Process(process.pid).memory_info().rss / 2**20

        def load(name: str) -> None:
            body = {"lora_name": name, "lora_path": str(ADAPTER.resolve())}
            client.post("/load_lora_adapter", body=body, cast_to=object)

        def unload(name: str) -> None:
            client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=object)

        def ask(number: int) -> None:
            text = PROSE[number % 50 * 100 :][: 40 + number % 7 * 60]
            stream(client, names[number % len(names)], said(text), 2 + number % 5)

        seen = []
        for number in range(REQUESTS):
            ask(number)
            if number % 20 == 19:  # an adapter comes, answers and goes
                load("guest")
                stream(client, "guest", said("hello"), 2)
                unload("guest")
            if number % 100 == 99:
                seen.append(mib())
        before = mib()
        for number in range(EXTRA):
            load(f"more{number}")
            stream(client, f"more{number}", said("hello"), 2)
        share = (mib() - before) / EXTRA / (ADAPTER.stat().st_size / 2**20)
    return {
        "memory": {
            "requests": REQUESTS,
            "mib_every_100": [round(each, 1) for each in seen],
            "growth_mib": round(seen[-1] - seen[len(seen) // 5], 1),  # once all has been used
            "another_adapter_by_its_file": round(share, 2),
        }
    }


PARTS = {"served": served, "batches": batches, "memory": memory}


@contextmanager
def running(*words: str) -> Iterator[tuple[OpenAI, str, subprocess.Popen, float]]:
    """A server with the trained adapter: a client, the base's name, the process, seconds to its start."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lab.cli", "serve", "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+/v1", process.stdout.readline())[0]
        seconds = round(time.perf_counter() - started, 2)
        client = OpenAI(base_url=url, api_key="none")
        yield client, client.models.list().data[0].id, process, seconds
    finally:
        process.kill()
        process.wait()


@dataclass
class Timed:
    """An answer, and when it came."""

    first_ms: float  # after the question
    per_s: float  # tokens, from the first one's moment to the last one's
    text: str

    @classmethod
    def of(cls, moments: list[float], tokens: int, text: str) -> Timed:
        """Reckon from the moments of the question and of all pieces, which may hold several tokens."""
        seconds = moments[-1] - moments[1]
        return cls(
            (moments[1] - moments[0]) * 1e3, (tokens - 1) / seconds if seconds else 0.0, text
        )


def stream(client: OpenAI, model: str, messages: list[dict], count: int) -> Timed:
    """Ask a server's model."""
    moments, text, tokens = [time.perf_counter()], "", 0
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=count,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in answer:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            moments.append(time.perf_counter())
            text += piece
    return Timed.of(moments if text else moments * 2, tokens, text)


def directly(
    model: OnnxModel,
    adapter: str | None,
    tokenizer: LightTokenizer,
    messages: list[dict],
    count: int,
) -> Timed:
    """Return what `stream` does, without a server."""
    moments, pieces = [time.perf_counter()], TextStream(tokenizer)
    prompt = generation_prompt_ids(tokenizer, messages)
    for token in model.stream(prompt, count, adapter):
        if token not in model.ends:
            pieces.push(token)
        moments.append(time.perf_counter())
    pieces.flush()
    return Timed.of(moments, len(moments) - 1, pieces.text)


def compare(
    client: OpenAI, name: str, model: OnnxModel, adapter: str | None, tokenizer: LightTokenizer
) -> dict[str, Any]:
    """Return speeds and first tokens of one model, by the server and directly, by turns."""
    found: dict[str, list[float]] = {"server": [], "direct": [], "server_ms": [], "direct_ms": []}
    same = 0
    for number in range(REPEATS):
        # another beginning each time: nothing that is kept may help
        messages = said(f"{number}: {PROSE[number * 400 : number * 400 + 500]}\n{STORY}")
        texts = []
        for way, answer in (
            ("server", lambda m=messages: stream(client, name, m, NEW)),
            ("direct", lambda m=messages: directly(model, adapter, tokenizer, m, NEW)),
        ):
            given = answer()
            texts.append(given.text)
            found[way].append(given.per_s)
            found[f"{way}_ms"].append(given.first_ms)
        same += texts[0] == texts[1]
    middle = {key: statistics.median(values[1:]) for key, values in found.items()}
    return {
        "tokens_per_s": round(middle["server"], 1),
        "tokens_per_s_directly": round(middle["direct"], 1),
        "ratio": round(
            statistics.median(s / d for s, d in zip(found["server"], found["direct"], strict=True)),
            3,
        ),
        "first_token_ms": round(middle["server_ms"], 1),
        "first_token_ms_directly": round(middle["direct_ms"], 1),
        "same_text": f"{same} of {REPEATS}",
    }


def question(number: int) -> list[dict]:
    """Return one of several chats."""
    return said(f"{PROSE[number * 300 : number * 300 + 200]}\n{STORY}")


def at_once(client: OpenAI, answers: dict[str, list[str]]) -> str:
    """Ask the base and the adapter all questions at once; return how many answers are those given alone."""
    found: list[bool] = []

    def ask(model: str, number: int, expected: str) -> None:
        found.append(stream(client, model, question(number), NEW).text == expected)

    threads = [
        threading.Thread(target=ask, args=(model, number, text))
        for model, texts in answers.items()
        for number, text in enumerate(texts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{sum(found)} of {len(threads)}"


def beside(client: OpenAI, name: str) -> float:
    """Return the milliseconds to a short question's first token while a long prompt is read and answered."""
    times = []
    for number in range(REPEATS):
        long = said(f"{number} {PROSE[:6000]}\n{STORY}")
        other = threading.Thread(target=stream, args=(client, name, long, 64))
        other.start()
        time.sleep(0.1 + 0.2 * number)
        times.append(stream(client, name, said("where is Chicago?"), 4).first_ms)
        other.join()
    return round(statistics.median(times), 1)


def next_turn(client: OpenAI, name: str) -> dict[str, float]:
    """Return the milliseconds to the first token of a second turn, kept and read anew."""
    kept, anew = [], []
    for number in range(REPEATS):
        messages = said(f"{number} {PROSE[:2500]}\n{STORY}")
        answer = stream(client, name, messages, NEW).text
        time.sleep(1.5)  # somebody reads the answer, and the server reads it again
        more = [*messages, {"role": "assistant", "content": answer}, *said("And then?")]
        kept.append(stream(client, name, more, 4).first_ms)
        other = [{"role": "system", "content": f"{number}"}, *more]
        anew.append(stream(client, name, other, 4).first_ms)
    middle = statistics.median(kept), statistics.median(anew)
    return {
        "first_token_ms": round(middle[0], 1),
        "read_anew_ms": round(middle[1], 1),
        "ratio": round(middle[0] / middle[1], 3),
    }


def said(text: str) -> list[dict]:
    """Return a chat of one question."""
    return [{"role": "user", "content": text}]


if __name__ == "__main__":
    main()
