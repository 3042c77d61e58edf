"""The course of a search: which trials are there, which run, which comes next."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lab.review.revisions import Revision
from lab.search import report, runner
from lab.search.bench import PART, Bench
from lab.search.goals import Goal
from lab.search.runner import Job
from lab.search.space import LOOKED_AT, ON_TEST, Point
from lab.search.study import Trial, by_chance, propose
from stages.core.errors import UserError

TRIALS = 30  # where a space is larger, and nobody says how many
PATIENCE = 10  # collisions of a point's runs with another DVC before that is a failure
PAUSE = 0.3  # seconds between two looks at what runs


@dataclass(frozen=True)
class Budget:
    """What a search may take."""

    trials: int | None = None  # in all, with those that are there; None: all of a small space
    hours: float | None = None
    jobs: int = 1


class Course:
    """A search from its first trial to its last."""

    def __init__(self, bench: Bench, goals: Sequence[Goal], budget: Budget, seed: int) -> None:
        """Take up every experiment that is a point of the space; settle the order of what is to come."""
        self.bench, self.goals, self.jobs, self.seed = bench, goals, budget.jobs, seed
        size = bench.space.size
        self.count = int(min(size, budget.trials or min(size, TRIALS)))
        self.is_whole = size <= self.count
        # points that share stages follow each other: after Ctrl-C no stage was run for one point alone
        order = bench.outermost_first()
        self.order = [*bench.space.points(order)] if self.is_whole else []
        self.end = time.monotonic() + budget.hours * 3600 if budget.hours is not None else math.inf
        self.trials: dict[Point, Trial] = dict(bench.finished())
        self.running: dict[Point, Job] = {}
        self.waiting: list[
            Point
        ] = []  # begun, and between two runs, or waiting for another search's
        self.failures: dict[str, str] = {}  # recipe of a stage that failed: why
        self.never_kept: set[str] = set()  # stages that DVC always runs again
        self.collisions: Counter[Point] = Counter()
        self.over = False

    def ahead(self) -> list[Point]:
        """Return the points that are to come; where TPE will choose them, as many by chance."""
        if self.is_whole:
            return [point for point in self.order if point not in self.trials and self.valid(point)]
        points: list[Point] = []
        while len(points) + len(self.trials) < self.count:
            seed = self.seed + len(points)
            drawn = by_chance(self.bench.space, {*points, *self.trials}, seed)
            if drawn is None:
                break
            points.append(drawn)
        return [point for point in points if self.valid(point)]

    def work(self) -> None:
        """Run trials until there are enough."""
        while True:
            for job in [job for job in self.running.values() if job.ended]:
                self.take_up(job)
            for begun in [*self.waiting]:
                self.step(begun)
            while len(self.running) < self.jobs and (point := self.next()) is not None:
                self.step(point)
            if not self.running and not self.waiting:
                self.bench.take_parts()  # also of a search that was killed
                if self.over:
                    left = self.count - len(self.trials)
                    print(f"the hours do not suffice for {left} of {self.count} trials", flush=True)
                return
            time.sleep(PAUSE)

    def next(self) -> Point | None:
        """Return the next point to begin, None where there is none now."""
        busy = [*self.running, *self.waiting]
        if self.over or len(self.trials) + len(busy) >= self.count:
            return None
        today: Point | None = self.bench.today
        if today is not None and today not in self.trials and today not in busy:
            return today  # what there is comes first: all else is compared with it
        if self.is_whole:
            left = [point for point in self.order if point not in self.trials and point not in busy]
            return left[0] if left else None
        if len(self.waiting) > self.jobs:
            return None
        return propose(
            self.bench.space,
            self.goals,
            self.bench.limits,
            [*self.trials.values()],
            busy,
            self.seed,
        )

    def step(self, point: Point) -> None:
        """Start what a point has to run next: up to the stage that decides a limit, or all."""
        if point in self.waiting:
            if len(self.running) >= self.jobs:
                return
            self.waiting.remove(point)
        if not self.valid(point) or self.is_told(point) or self.fails_again(point):
            return
        missing = self.bench.missing(point, LOOKED_AT)
        if time.monotonic() + sum(map(self.bench.cost, missing)) > self.end:
            self.over = True
            return
        deciding = [s for s in self.bench.decisive if s in missing and s not in self.never_kept]
        target = deciding[0] if deciding else None
        kind = f"{PART}{target}-" if target else "trial-"
        name = self.bench.name(point, LOOKED_AT, kind=kind)
        job = runner.start(self.bench, point, (LOOKED_AT,), target, name)
        if job is None:
            self.waiting.append(point)
            return
        self.running[point] = job
        number = len(self.trials) + len(self.running)
        print(report.begun(self.bench, number, self.count, job), flush=True)

    def take_up(self, job: Job) -> None:
        """Take what a run gave that has ended."""
        del self.running[job.point]
        self.bench.record.refresh()
        if job.target and job.process.returncode == 0:
            self.keep_part(job)
            self.waiting.insert(0, job.point)
        elif job.collided and self.collisions[job.point] < PATIENCE:
            self.collisions[job.point] += 1
            self.waiting.append(job.point)
        elif not self.is_told(job.point):
            self.fail(job)
        job.close()

    def keep_part(self, job: Job) -> None:
        """Learn what a run of some stages made. Its experiment would show the commit's metrics as its own."""
        self.bench.take_parts(job.name)
        if job.target in self.bench.missing(job.point, LOOKED_AT):
            self.never_kept.add(str(job.target))

    def fail(self, job: Job) -> None:
        """Note a run that failed, and in which stage: with its settings that one is not tried again."""
        still = [s for s in job.stages if s in self.bench.missing(job.point, LOOKED_AT)]
        why = f"{job.why()} (all of it: {job.log})"
        if still:
            values = self.bench.trial_settings(job.point)
            self.failures[self.bench.recipe(still[0], values)] = why
        self.told(Trial(job.point, job.name, reason=why))

    def fails_again(self, point: Point) -> bool:
        """Say whether a point needs a stage that failed with the same settings; then it is a failed trial."""
        values = self.bench.trial_settings(point)
        recipes = (
            self.bench.recipe(stage, values) for stage in self.bench.missing(point, LOOKED_AT)
        )
        why = next((self.failures[recipe] for recipe in recipes if recipe in self.failures), None)
        if why is not None:
            self.told(Trial(point, "not run", reason=f"as before: {why}"))
        return why is not None

    def valid(self, point: Point) -> bool:
        """Say whether the settings of a point are valid together; if not, it is a failed trial."""
        try:
            self.bench.trial_settings(point)
        except UserError as error:
            self.told(Trial(point, "not run", reason=str(error)))
            return False
        return True

    def is_told(self, point: Point) -> bool:
        """Say whether an experiment, or the first stages alone, say what comes of a point; keep it."""
        trial = self.bench.finished().get(point) or self.bench.stopped(point)
        if trial:
            self.told(trial)
        return trial is not None

    def told(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials[trial.point] = trial
        print(report.told(self.bench, self.goals, trial, len(self.trials), self.count), flush=True)

    def best(self) -> Trial | None:
        """Return the trial that is best of those that keep to all limits, None where none does."""
        return report.best(self.goals[0], self.bench.limits, self.trials)

    def test(self, winner: Trial) -> tuple[str, Revision] | None:
        """Ask the winner the test prompts, unless somebody did. None where that fails."""
        name = self.bench.name(winner.point, ON_TEST, kind="best-")
        while (found := self.bench.on_test(winner.point)) is None:
            job = runner.start(self.bench, winner.point, (ON_TEST,), None, name)
            if job:
                print(report.begun_test(self.bench, job), flush=True)
                self.running[winner.point] = job
            while job and not job.ended:
                time.sleep(PAUSE)
            if job:
                self.running.pop(winner.point).close()
                self.bench.record.refresh()
                self.collisions[winner.point] += job.collided
                if job.process.returncode and not (
                    job.collided and self.collisions[winner.point] < PATIENCE
                ):
                    print(f"the test failed: {job.why()} (all of it: {job.log})", flush=True)
                    return self.bench.on_test(winner.point)
            else:
                time.sleep(1)
        return found
