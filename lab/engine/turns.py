"""Many answers at once from one model: one thread owns all generators and gives each a turn after the other.

    engine = Engine(models)
    job = engine.submit(Request(prompt, max_new_tokens=64), sink=print)

A turn is one token, or the reading of some tokens of a prompt, so that a short question does not wait for
a long one; a newcomer's first turn is the next one. The engine knows tokens only, no text and no web: the
sink gets each token and at last an `End`.

The generator of a finished answer is kept, with its keys and values, for the conversation's next turn, which
then begins sooner. It goes on only with the adapter and the search options that it was made for. And it
changes no answer: keys and values of tokens that were made one by one differ a little from those of tokens
that are read together, so an idle engine reads the answer again, as the next turn would.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lab.engine.models import Adapter, Models
from stages.core.errors import UserError

# Tokens of a prompt that are read in one turn: about 80 ms of SmolLM2-135M on two cores. What is left to the
# last turn is never a few tokens only: kernels add those up in another order, and int8 activations make half
# a logit of that. From 65 tokens on keys and values are those of a prompt that is read at once, to the bit,
# if a piece begins where `even` and `exact` say: kernels take two tokens at a time, and one that is left over
# differently, once more so where it is the only one behind a multiple of 128.
CHUNK, LEAST = 128, 65
# for so many tokens more than asked a new generator has room: the conversation's next turn
ROOM = 512


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without it, it is the likeliest. A top_k of 0 leaves out none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def search(self) -> dict[str, Any]:
        """Return it as the runtime's search options."""
        found = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return found if self.seed is None else found | {"random_seed": self.seed}


@dataclass(frozen=True)
class Request:
    """What to answer, and with what."""

    prompt: list[int]
    max_new_tokens: int
    adapter: Adapter | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class End:
    """Why an answer ended: `stop` (by itself), `length`, or with an error's text."""

    reason: str
    error: str | None = None


Sink = Callable[["int | End"], None]


class QueueFullError(Exception):
    """As many requests wait as may."""


class ClosedError(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Job:
    """An answer in the making. All but `cancel` belongs to the engine's thread."""

    request: Request
    sink: Sink
    engine: Engine
    text: list[int] = field(default_factory=list)  # the prompt, and the answer so far
    stretches: list[int] = field(default_factory=list)  # lengths up to which to go with one cache
    generator: Any = None
    capacity: int = 0  # tokens for which the generator has room
    read: int = 0  # tokens that the generator has been given, the ones it made included
    reused: int = 0  # tokens of the prompt that it knew already
    started: float = field(default_factory=time.monotonic)
    begun: bool = False  # has had a turn
    left: bool = False
    worth_keeping: bool = False

    def cancel(self, keep: bool = False) -> None:
        """End the answer before its next turn; `keep` its keys and values for the next question."""
        self.worth_keeping = keep
        self.left = True
        self.engine.forget(self)


@dataclass(eq=False)
class Kept:
    """A generator at rest, and what it has read and made."""

    adapter: Adapter | None
    sampling: Sampling | None
    prompt: int  # tokens of its prompt
    text: list[int]
    generator: Any
    capacity: int
    sure: int  # tokens whose keys and values are those of a prompt that is read at once


class Engine:
    """The thread that owns the generators, and the queue before it."""

    def __init__(self, models: Models, slots: int = 8, queue: int = 16, keep: int = 4):
        self.models = models
        self.slots, self.queue, self.keep = slots, queue, keep
        self.counts: defaultdict[str, float] = defaultdict(float)  # what /metrics shows
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._kept: list[Kept] = []  # the one that was used last comes last
        self._retired: list[Adapter] = []
        self._newcomer = False  # had the last turn, before somebody else
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Say whether the thread runs."""
        return self._thread.is_alive()

    @property
    def loads(self) -> dict[str, int]:
        """Return how many answers are being made, how many wait, and how many generators are kept."""
        return {
            "running": len(self._active),
            "waiting": len(self._waiting),
            "kept": len(self._kept),
        }

    def submit(self, request: Request, sink: Sink) -> Job:
        """Queue a request. The sink is called by the engine's thread, and must not wait for anything.

        Raises `UserError` for lengths that the model cannot take, `QueueFullError` and `ClosedError`.
        """
        base = self.models.base
        base.check_lengths(len(request.prompt), request.max_new_tokens)
        stretches = base.limits.stretches(len(request.prompt), request.max_new_tokens)
        job = Job(request, sink, self, list(request.prompt), stretches)
        with self._changed:
            if self._closed:
                raise ClosedError
            adapter = request.adapter
            if adapter is not None and adapter not in self.models.adapters.values():
                raise UserError(f"adapter {adapter.name} has just been unloaded")
            if len(self._waiting) + len(self._active) >= self.slots + self.queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()
        return job

    def forget(self, job: Job) -> None:
        """Take a job out of the queue, should it be there still."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)
            self._changed.notify()

    def load(self, name: str, file: Any) -> Future:
        """Load an adapter between two turns."""
        return self._call(lambda: self.models.load(name, file))

    def unload(self, name: str) -> Future:
        """Take an adapter away; the answers that it is giving are finished first."""

        def retire() -> None:
            adapter = self.models.retire(name)
            self._kept = [kept for kept in self._kept if kept.adapter is not adapter]
            self._retired.append(adapter)

        return self._call(retire)

    def close(self) -> None:
        """Drop what is left, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _call(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise ClosedError
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            unsettled: list[Kept] = []
            with self._changed:
                while not (self._waiting or self._active or self._calls or self._closed):
                    if unsettled := [kept for kept in self._kept if kept.sure < len(kept.text)]:
                        break
                    self._changed.wait()
                if self._closed:
                    break
                while self._waiting and len(self._active) < self.slots:
                    self._active.append(self._waiting.popleft())
                calls, self._calls = self._calls, deque()
                job = self._next() if self._active else None
            for work, future in calls:
                answer(future, work)
            if job is not None:
                self._turn(job)
            if unsettled and not self._active:
                self._settle(unsettled[-1])
            if self._retired:
                self._free_retired()
        for job in [*self._active, *self._waiting]:
            job.sink(End("error", "the server is shutting down"))
        for _, future in self._calls:
            future.cancel()
        self._active, self._kept = [], []

    def _next(self) -> Job:
        """Return whose turn it is: a newcomer's, but at most every second while others wait."""
        new = [job for job in self._active if not job.begun]
        others = [job for job in self._active if job.begun]
        job = (others or new if self._newcomer else new or others)[0]
        self._newcomer, job.begun = bool(others) and not job.begun, True
        # another list, not a change of this one: other threads count it
        self._active = [*(each for each in self._active if each is not job), job]
        return job

    def _turn(self, job: Job) -> None:
        """Give a job its turn. What goes wrong ends that job alone."""
        try:
            end = End("left") if job.left else self._advance(job)
        except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
            self.counts["failures"] += 1
            job.generator = None
            end = End("error", " ".join(str(error).split()))
        if end is not None:
            self._end(job, end)

    def _advance(self, job: Job) -> End | None:
        """Read some of the prompt, or make a token; return the end where that is it."""
        if job.generator is None:
            self._open(job)
        if job.read < len(job.text) and not self._read_some(job):
            return None
        job.generator.generate_next_token()
        token = int(job.generator.get_next_tokens()[0])
        if len(job.text) == len(job.request.prompt):
            self.counts["first_tokens"] += 1
            self.counts["first_token_seconds"] += time.monotonic() - job.started
        job.text.append(token)
        job.read = len(job.text)
        self.counts["generated_tokens"] += 1
        job.sink(token)
        if token in self.models.base.ends:
            return End("stop")
        if len(job.text) == job.stretches[0]:
            job.stretches.pop(0)
            if not job.stretches:
                return End("length")
            # the rotation changes here: all is read again, by another generator
            job.generator = None
        return None

    def _open(self, job: Job) -> None:
        """Give a job a generator: one that knows the beginning of its text, or a new one."""
        request, length = job.request, job.stretches[0]
        if len(job.text) == len(request.prompt):
            self.counts["prompt_tokens"] += len(job.text)
            if self._resume(job, length):
                self.counts["reused_tokens"] += job.reused
                return
        search = request.sampling.search() if request.sampling else None
        room = length + ROOM if self.keep and len(job.stretches) == 1 else 0
        job.capacity = max(length, min(room, self.models.base.context_length))
        job.generator = self.models.generator(request.adapter, job.capacity, search)
        job.read = 0

    def _resume(self, job: Job, length: int) -> bool:
        """Take the kept generator of this conversation, if there is one with room for its next turn."""
        request, prompt = job.request, job.request.prompt
        for kept in reversed(self._kept):
            same = kept.adapter is request.adapter and kept.sampling == request.sampling
            # its whole question must be the beginning of this one: a conversation that only has the system
            # message in common would else lose its generator to this one
            if not same or prompt[: kept.prompt] != kept.text[: kept.prompt]:
                continue
            self._kept.remove(kept)
            known = min(common(kept.text, prompt), kept.sure, len(prompt) - LEAST)
            known = exact(known, len(prompt))
            reach = self.models.base.limits.reach
            if length > kept.capacity or known < LEAST or reach(known) != reach(len(prompt)):
                return False  # it is of this conversation, and of no use for what comes
            rewind(kept.generator, known)
            job.generator, job.capacity = kept.generator, kept.capacity
            job.read = job.reused = known
            return True
        return False

    def _settle(self, kept: Kept) -> None:
        """Read some of a kept answer as the conversation's next turn would."""
        start = even(min(kept.sure, len(kept.text) - LEAST))
        try:
            rewind(kept.generator, start)
            kept.sure = start + self._read(kept.generator, kept.text, start)
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            self._kept.remove(kept)

    def _read_some(self, job: Job) -> bool:
        """Read the next tokens of a prompt; return whether that was all."""
        job.read += self._read(job.generator, job.text, job.read)
        return job.read == len(job.text)

    def _read(self, generator: Any, text: list[int], start: int) -> int:
        """Read the next tokens of a text, which lie behind `start`; return how many."""
        left = len(text) - start
        count = left if left < CHUNK + LEAST else CHUNK
        switch = self.models.base.limits.rope_switch
        if switch is not None and start <= switch < len(text):
            # all tokens must be turned as a long text's are, from the first one on
            count = max(count, switch + 1 - start)
        for piece in self.models.base.pieces([text[start : start + count]]):
            generator.append_tokens(piece)
        return count

    def _end(self, job: Job, end: End) -> None:
        with self._changed:
            self._active.remove(job)
        if end.reason in ("stop", "length") or job.worth_keeping:
            self._put_away(job)
        job.generator = None
        self.counts[f"ended_{end.reason}"] += 1
        job.sink(end)

    def _put_away(self, job: Job) -> None:
        """Keep a job's generator for the next turn of its conversation."""
        request, prompt, text = job.request, len(job.request.prompt), job.text
        seeded = request.sampling is not None and request.sampling.seed is not None
        reach = self.models.base.limits.reach
        if (
            self.keep == 0
            or job.generator is None
            or seeded  # its draws begin with the generator
            or request.adapter in self._retired
            or reach(prompt) != reach(len(text))  # keys of both rotations
            or not LEAST <= prompt <= job.read
        ):
            return
        kept = Kept(
            request.adapter, request.sampling, prompt, text, job.generator, job.capacity, prompt
        )
        self._kept = [*self._kept, kept][-self.keep :]

    def _free_retired(self) -> None:
        """Free the adapters that were taken away, once nobody answers with them any more."""
        with self._changed:
            used = [job.request.adapter for job in (*self._active, *self._waiting)]
        for adapter in [each for each in self._retired if each not in used]:
            self._retired.remove(adapter)
            self._kept = [kept for kept in self._kept if kept.adapter is not adapter]
            self.models.unload(adapter)


def answer(future: Future, work: Callable[[], Any]) -> None:
    """Do some work for another thread."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001  # it is raised where it was asked for
        future.set_exception(error)


def rewind(generator: Any, known: int) -> None:
    """Make a generator forget all but its first tokens.

    Needed even to go on where it stopped: the token that it made last has never been read, though it counts,
    and appending behind it would leave a hole in keys and values, of which the runtime says nothing.
    """
    if generator.token_count() != known:
        generator.rewind_to(known)


def even(place: int) -> int:
    """Return the last place up to here where a piece may begin."""
    return place - place % 2


def exact(place: int, end: int) -> int:
    """Return the last place up to here from which reading to the end is as if from the start."""
    if end % 128 == 1:
        return place - place % 128
    place = even(place)
    return place - 2 if (end - place) % 128 == 1 else place


def common(left: list[int], right: list[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))
