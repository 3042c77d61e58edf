"""What a search says: its plan, each trial, the winner and who cannot be told from it, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from lab.review.intervals import intervals
from lab.review.revisions import Revision
from lab.review.seeds import Doubt, by_seeds
from lab.search.bench import Bench
from lab.search.goals import Goal, broken, miss, timed
from lab.search.runner import Job
from lab.search.space import ON_TEST, Point
from lab.search.study import Trial

WIDTH = 80
SIZES = ("onnx_mb", "onnx_adapter_mb")  # what an application ships
SPEED = "decode_tokens_per_s_p50"
RESTART = 5  # seconds that DVC takes around the stages of a run
Trials = Mapping[Point, Trial]


def plan(bench: Bench, goals: Sequence[Goal], count: int, *, whole: bool) -> Iterator[str]:
    """Yield what is searched, for what, and within which limits."""
    size = bench.space.size
    many = counted(int(size), "point") if size < 1e9 else "points without number"
    yield f"{many}: {'each is tried' if whole else f'{count} of them are tried, as TPE proposes'}"
    for goal in goals:
        yield f"best is the {'highest' if goal.maximize else 'lowest'} {goal.metric}, on validation prompts"
    for name in timed(goals):
        yield f"{name} depends on what else this machine does: let it be quiet, one trial at a time"
    for limit in bench.limits:
        stage = bench.record.decides.get(limit.metric)
        early = f", known after {stage}" if stage in bench.decisive else ""
        yield f"limit: {limit} ({limit.origin}{early})"


def expected(bench: Bench, ahead: Sequence[Point], jobs: int, had: int) -> Iterator[str]:
    """Yield how much there is to run, by metrics/costs.json, if no trial is stopped at a limit."""
    if had:
        yield f"there already: {counted(had, 'trial')}"
    stages = bench.seconds(ahead)
    seconds = sum(each for _, each in stages.values()) + RESTART * len(ahead)
    runs = ", ".join(f"{count} {stage}" for stage, (count, each) in stages.items() if each)
    aside = f", {jobs} at a time" if jobs > 1 else ""
    text = f"to run: {counted(len(ahead), 'trial')}, {in_words(seconds)} of computing{aside}"
    yield from textwrap.wrap(f"{text} ({runs})" if runs else text, WIDTH, subsequent_indent="  ")


def counted(number: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def in_words(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    minutes = seconds / 60
    return f"about {minutes / 60:.1f} hours" if minutes > 90 else f"about {minutes:.0f} minutes"


def begun(bench: Bench, number: int, count: int, job: Job) -> str:
    """Return that a run has begun."""
    what = f"up to {job.target}" if job.target else ", ".join(job.stages)
    return wrapped(f"[{number}/{count}] {bench.space.words(job.point)}", f"{job.name}: {what} …")


def begun_test(bench: Bench, job: Job) -> str:
    """Return that the winner's run on the test prompts has begun."""
    return wrapped(
        f"[test] {bench.space.words(job.point)}", f"{job.name}: {', '.join(job.stages)} …"
    )


def wrapped(*parts: str) -> str:
    """Return parts of a line, the later ones indented, none wider than a terminal."""
    first = textwrap.wrap(parts[0], WIDTH, subsequent_indent="      ", break_on_hyphens=False)
    rest = (
        textwrap.wrap(
            part,
            WIDTH,
            initial_indent="      ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
        for part in parts[1:]
    )
    return "\n".join([*first, *(line for lines in rest for line in lines)])


def told(bench: Bench, goals: Sequence[Goal], trial: Trial, number: int, count: int) -> str:
    """Return what came of a trial."""
    return wrapped(
        f"[{number}/{count}] {bench.space.words(trial.point)}",
        f"{trial.name}: {outcome(bench, goals, trial)}",
    )


def outcome(bench: Bench, goals: Sequence[Goal], trial: Trial) -> str:
    """Return a trial's figures, or why it has none."""
    if trial.failed:
        return f"failed: {trial.reason}"
    breaks = "; ".join(
        f"{limit.metric} is {trial.metrics[limit.metric]:g}, asked for at "
        f"{'most' if limit.at_most else 'least'} {limit.bound:g}"
        for limit in broken(bench.limits, trial.metrics)
    )
    if trial.revision is None:
        last = [bench.record.decides[each.metric] for each in broken(bench.limits, trial.metrics)]
        return f"stopped after {max(last, key=bench.record.stages.index)}: {breaks}"
    figures = ", ".join(f"{g.metric} {trial.metrics[g.metric]:g}" for g in goals)
    return f"{figures}; {breaks}" if breaks else figures


def best(goal: Goal, limits: Sequence, trials: Trials) -> Trial | None:
    """Return the best of the trials that keep to all limits; of equals the one that ships least."""
    feasible = [trial for trial in trials.values() if trial.feasible(limits)]
    if not feasible:
        return None
    sign = -1 if goal.maximize else 1
    return min(feasible, key=lambda t: (sign * t.metrics[goal.metric], *lightness(t), str(t.point)))


def lightness(trial: Trial) -> tuple[float, float]:
    """Return what makes one of two equal trials the better: fewer MB to ship, then more tokens a second."""
    size = sum(trial.metrics.get(name, 0.0) for name in SIZES)
    return round(size, 1), -trial.metrics.get(SPEED, 0.0)


def trials(bench: Bench, goals: Sequence[Goal], told: Trials) -> Iterator[str]:
    """Yield how many trials came to what; the best, or those that no other beats in all."""
    kinds = {
        "finished": [t for t in told.values() if t.revision],
        "stopped at a limit": [t for t in told.values() if not t.revision and not t.failed],
        "failed": [t for t in told.values() if t.failed],
    }
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items() if found)
    yield ""
    yield f"{counted(len(told), 'trial')}: {counts}"
    if len(goals) > 1:
        yield from pareto_table(bench, goals, pareto(goals, bench.limits, told))


def pareto(goals: Sequence[Goal], limits: Sequence, told: Trials) -> list[Trial]:
    """Return the feasible trials that no other beats in all goals, best first by the first one."""
    feasible = [trial for trial in told.values() if trial.feasible(limits)]

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(g, one.metrics[g.metric], other.metrics[g.metric]) for g in goals]
        return any(g.better(a, b) for g, a, b in pairs) and not any(
            g.better(b, a) for g, a, b in pairs
        )

    front = [trial for trial in feasible if not any(beats(other, trial) for other in feasible)]
    sign = -1 if goals[0].maximize else 1
    return sorted(front, key=lambda t: (sign * t.metrics[goals[0].metric], str(t.point)))


def pareto_table(bench: Bench, goals: Sequence[Goal], front: Sequence[Trial]) -> Iterator[str]:
    """Yield the trials that no other beats in all, on validation prompts, and how to take one."""
    if not front:
        return
    yield f"not beaten in all {len(goals)} by another, on validation prompts:"
    names = [goal.metric for goal in goals]
    widths = [max(len(name), 8) for name in names]
    yield "  ".join(["trial         ", *(n.rjust(w) for n, w in zip(names, widths, strict=True))])
    for trial in front:
        cells = [f"{trial.metrics[name]:g}" for name in names]
        yield "  ".join(
            [f"{trial.name:14}", *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]
        )
        yield from textwrap.wrap(
            bench.space.words(trial.point), WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    yield "take the one that suits you; only its test figures are honest ones:"
    yield from command(bench, front[0])


def command(bench: Bench, trial: Trial) -> Iterator[str]:
    """Yield the commands that ask a trial the test prompts and make it the default."""
    settings = " ".join(f"-S {shell(text)}" for text in bench.space.overrides(trial.point))
    name = bench.name(trial.point, ON_TEST, kind="best-")
    yield f"  dvc exp run --temp --name {name} {settings}"
    yield f"  lab promote {name}"


def shell(text: str) -> str:
    """Return an override as it is typed."""
    return text if not set(text) & set(" []{}'\"$") else "'" + text.replace("'", "'\\''") + "'"


def tied(bench: Bench, goal: Goal, winner: Trial, told: Trials) -> list[tuple[Trial, str]]:
    """Return the feasible trials that cannot be told from the winner, and why, lightest first."""
    found = []
    for trial in told.values():
        if trial.point == winner.point or not trial.feasible(bench.limits):
            continue
        if reason := explanation(bench, goal, winner, trial):
            found.append((trial, reason))
    return sorted(found, key=lambda pair: (lightness(pair[0]), str(pair[0].point)))


def explanation(bench: Bench, goal: Goal, winner: Trial, other: Trial) -> str:
    """Return what could explain the difference of two trials; nothing where it is sure."""
    change = other.metrics[goal.metric] - winner.metrics[goal.metric]
    if not change:
        return "the same value"
    noise = bench.head.noise.get(goal.metric)
    asked = [trial.revision.predictions if trial.revision else [] for trial in (winner, other)]
    prompts = intervals(*asked).get(goal.metric)
    doubt = Doubt(change, prompts, by_seeds(goal.metric, noise, noise))
    return doubt.explanation.replace("test prompts", "prompts")  # these are validation's


def tested(
    bench: Bench, goal: Goal, winner: Trial, told: Trials, test: tuple[str, Revision] | None
) -> Iterator[str]:
    """Yield the winner on validation and on test, who cannot be told from it, and what to do."""
    yield f"best: {winner.name}"
    yield from textwrap.wrap(
        bench.space.words(winner.point), WIDTH, initial_indent="  ", subsequent_indent="    "
    )
    yield from both(bench, goal, winner, test)
    yield from doubtful(bench, goal, winner, tied(bench, goal, winner, told))
    if test is None:
        yield "its test failed: the same command tries again"
    elif test[1].name == bench.head.name:
        yield f"these are the settings of {test[0]}, today's: there is nothing to promote"
    else:
        yield f"make it the default: lab promote {test[0]}"


def both(
    bench: Bench, goal: Goal, winner: Trial, test: tuple[str, Revision] | None
) -> Iterator[str]:
    """Yield the figures of the winner on the prompts that it was chosen by, and on those that it was not."""
    figures = test[1].metrics if test else {}
    yield f"{'':32} {'validation':>12} {'test':>12}"
    for name in dict.fromkeys([goal.metric, *(limit.metric for limit in bench.limits)]):
        cells = [f"{of[name]:g}" if name in of else "-" for of in (winner.metrics, figures)]
        yield f"{name:32} {cells[0]:>12} {cells[1]:>12}"
    for limit in broken(bench.limits, figures):
        yield f"on test it breaks a limit: {limit} ({limit.origin})"


def doubtful(
    bench: Bench, goal: Goal, winner: Trial, others: Sequence[tuple[Trial, str]]
) -> Iterator[str]:
    """Yield the trials that cannot be told from the winner, and the lightest of them all as a proposal."""
    if not bench.head.noise:
        yield "what another training seed does is not reckoned with: `lab noise` measures it"
    if not others:
        return
    yield "cannot be told from it:"
    for trial, reason in others:
        size = f", {lightness(trial)[0]:g} MB to ship" if lightness(trial)[0] else ""
        yield wrapped(
            f"  {trial.name} {bench.space.words(trial.point)}",
            f"{trial.metrics[goal.metric]:g}{size}: {reason}",
        )
    lightest = others[0][0]
    if lightness(lightest) < lightness(winner):
        smaller = lightness(lightest)[0] < lightness(winner)[0]
        yield f"{lightest.name} is the {'smallest' if smaller else 'fastest'} of them: to take it instead,"
        yield from command(bench, lightest)


def nearest_miss(bench: Bench, told: Trials) -> str:
    """Return which trial came nearest to the limits, and by how much it misses them."""
    measured = [trial for trial in told.values() if not trial.failed]
    if not measured:
        reasons = [trial.reason for trial in told.values()]
        return (
            f"of {counted(len(told), 'trial')} each failed: {reasons[0]}"
            if told
            else "no trial ran"
        )
    # one that was stopped may break more limits than are known
    nearest = min(
        measured, key=lambda t: (miss(bench.limits, t.metrics), t.revision is None, str(t.point))
    )
    by = ", ".join(
        f"{each.metric} is {nearest.metrics[each.metric]:g}, {each.excess(nearest.metrics[each.metric]):.4g} "
        f"{'above' if each.at_most else 'below'} {each.bound:g}"
        for each in broken(bench.limits, nearest.metrics)
    )
    return (
        f"none of {counted(len(told), 'trial')} keeps to the limits; nearest is {nearest.name} "
        f"({bench.space.words(nearest.point)}): {by}"
    )
