"""What Prometheus reads: counters since the start, and what is there now."""

from __future__ import annotations

from lab.engine.turns import Engine

COUNTERS = {  # the engine's count: what it means
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that were known from the conversation's last turn.",
    "generated_tokens": "Tokens of answers.",
    "first_tokens": "Answers that have begun.",
    "first_token_seconds": "Seconds from a request's arrival to its first token, in all.",
    "ended_stop": "Answers that ended by themselves.",
    "ended_length": "Answers that were cut at their longest.",
    "ended_left": "Answers that a stop text or a client that left has ended.",
    "failures": "Answers that could not be made.",
}
GAUGES = {
    "running": "Answers being made.",
    "waiting": "Requests in the queue.",
    "kept": "Finished answers whose keys and values are kept.",
}


def exposition(engine: Engine) -> str:
    """Return the engine's figures in Prometheus' text format."""
    loads, lines = engine.loads, []
    for name, about in COUNTERS.items():
        lines += described(f"lab_{name}_total", "counter", about, engine.counts.get(name, 0))
    for name, about in GAUGES.items():
        lines += described(f"lab_{name}", "gauge", about, loads[name])
    return "\n".join([*lines, ""])


def described(name: str, kind: str, about: str, value: float) -> list[str]:
    """Return the lines of one figure."""
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value:.10g}"]
