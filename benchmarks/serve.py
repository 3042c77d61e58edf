"""`lab serve` beside the model without a server: speed, first token, fairness, a conversation's next turn.

    python -m benchmarks.serve          # in a workspace after `dvc repro`; three minutes on a quiet machine

A real server, OpenAI's client in this process, the same prompts given to OnnxModel directly, in turns.
Writes benchmarks/results/serve.json; figures are medians.
"""

from __future__ import annotations

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
PROSE = Path("data/heldout.txt").read_text(encoding="utf-8")
STORY = "Write a long story about a lighthouse keeper and every ship that passes by."


def main() -> None:
    """Measure, keep the figures, print them."""
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
                directly(model, adapter, tokenizer, question(number), NEW)[1]
                for number in range(AT_ONCE // 2)
            ]
        figures["same_text_at_once"] = at_once(client, answers)
        print(figures, flush=True)
        figures["short_beside_long_first_token_ms"] = beside(client, base)
        figures["next_turn"] = next_turn(client, base)
        print(figures["short_beside_long_first_token_ms"], figures["next_turn"], flush=True)
        figures["server_mib"] = round(psutil.Process(process.pid).memory_info().rss / 2**20)
        process.send_signal(signal.SIGTERM)
        figures["exit_code_after_sigterm"] = process.wait(60)
    keep("serve", figures)


@contextmanager
def running() -> Iterator[tuple[OpenAI, str, subprocess.Popen, float]]:
    """A server with the trained adapter: a client, the base's name, the process, seconds to its start."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lab.cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+/v1", process.stdout.readline())[0]
        seconds = round(time.perf_counter() - started, 2)
        client = OpenAI(base_url=url, api_key="none")
        yield client, client.models.list().data[0].id, process, seconds
    finally:
        process.kill()
        process.wait()


def stream(client: OpenAI, model: str, messages: list[dict], count: int) -> tuple[list[float], str]:
    """Return the moments at which an answer's pieces came, the question's first, and its text."""
    moments, text = [time.perf_counter()], ""
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=count, stream=True
    )
    for chunk in answer:
        if piece := chunk.choices[0].delta.content:
            moments.append(time.perf_counter())
            text += piece
    return moments, text


def directly(
    model: OnnxModel,
    adapter: str | None,
    tokenizer: LightTokenizer,
    messages: list[dict],
    count: int,
) -> tuple[list[float], str]:
    """Return what `stream` does, without a server."""
    moments, pieces = [time.perf_counter()], TextStream(tokenizer)
    prompt = generation_prompt_ids(tokenizer, messages)
    for token in model.stream(prompt, count, adapter):
        if token not in model.ends and pieces.push(token):
            moments.append(time.perf_counter())
    pieces.flush()
    return moments, pieces.text


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
            moments, text = answer()
            texts.append(text)
            found[way].append((len(moments) - 2) / (moments[-1] - moments[1]))
            found[f"{way}_ms"].append((moments[1] - moments[0]) * 1e3)
        same += texts[0] == texts[1]
    middle = {key: statistics.median(values[1:]) for key, values in found.items()}
    return {
        "pieces_per_s": round(middle["server"], 1),
        "pieces_per_s_directly": round(middle["direct"], 1),
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
        found.append(stream(client, model, question(number), NEW)[1] == expected)

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
        moments, _ = stream(client, name, said("where is Chicago?"), 4)
        times.append((moments[1] - moments[0]) * 1e3)
        other.join()
    return round(statistics.median(times), 1)


def next_turn(client: OpenAI, name: str) -> dict[str, float]:
    """Return the milliseconds to the first token of a second turn, kept and read anew."""
    kept, anew = [], []
    for number in range(REPEATS):
        messages = said(f"{number} {PROSE[:2500]}\n{STORY}")
        answer = stream(client, name, messages, NEW)[1]
        time.sleep(1.5)  # somebody reads the answer, and the server reads it again
        more = [*messages, {"role": "assistant", "content": answer}, *said("And then?")]
        moments, _ = stream(client, name, more, 4)
        kept.append((moments[1] - moments[0]) * 1e3)
        other = [{"role": "system", "content": f"{number}"}, *more]
        moments, _ = stream(client, name, other, 4)
        anew.append((moments[1] - moments[0]) * 1e3)
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
