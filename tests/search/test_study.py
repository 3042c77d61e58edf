"""lab search: what is proposed next finds a known optimum, sooner than chance, and the same after a kill."""

import random
from statistics import mean

import pytest

from lab.review.revisions import Revision
from lab.search.goals import Goal, Limit
from lab.search.space import Axis, Space
from lab.search.study import Trial, by_chance, propose

GOAL = [Goal("quality", True)]
# 200 points: 5 methods, 5 ranks, 8 rates
SPACE = Space(
    (
        Axis("method", tuple("abcde")),
        Axis("rank", ("4", "8", "16", "32", "64")),
        Axis("lr", tuple(f"{n / 1000:g}" for n in range(1, 9))),
    )
)
POINTS = [*SPACE.points(SPACE.axes)]


def quality(point) -> float:
    """Best at method c, rank 16, lr 0.006; a little noise, as trainings have it."""
    method, rank, lr = point
    off = [abs("abcde".index(method) - 2), abs(["4", "8", "16", "32", "64"].index(rank) - 2)]
    noise = random.Random(str(point)).gauss(0, 0.02)
    return -0.5 * off[0] - 0.3 * off[1] - 200 * abs(float(lr) - 0.006) + noise


TOP = sorted(map(quality, POINTS), reverse=True)[:10]  # the top 5 %


def trial(point) -> Trial:
    return Trial(point, "name", {"quality": quality(point)}, Revision("HEAD"))


def searched(ask, count: int = 40) -> list[Trial]:
    trials: list[Trial] = []
    for _ in range(count):
        trials.append(trial(ask(trials)))
    return trials


def first_in_top(trials: list[Trial]) -> int:
    """Return after how many trials one was among the best; 99 where none was."""
    return next((n for n, each in enumerate(trials, 1) if each.metrics["quality"] >= TOP[-1]), 99)


@pytest.mark.slow
def test_a_known_optimum_is_found_sooner_than_by_chance():
    def tpe(seed):
        return searched(lambda trials: propose(SPACE, GOAL, [], trials, [], seed))

    def chance(seed):
        return searched(
            lambda trials: by_chance(SPACE, {t.point for t in trials}, seed + len(trials))
        )

    seeds = [1000 * seed for seed in range(20)]
    proposed = [tpe(seed) for seed in seeds]
    drawn = [chance(seed) for seed in seeds]
    assert sum(first_in_top(trials) <= 40 for trials in proposed) >= 18
    # random search beside it: later, and with a worse best
    assert mean(map(first_in_top, proposed)) < mean(map(first_in_top, drawn))

    def best(trials):
        return max(each.metrics["quality"] for each in trials)

    assert mean(map(best, proposed)) > mean(map(best, drawn))
    for trials in proposed:
        assert len({each.point for each in trials}) == 40  # none twice


def test_what_is_asked_follows_from_what_is_known_alone():
    known = [trial(point) for point in POINTS[::17]]
    asked = propose(SPACE, GOAL, [], known, [], 42)
    assert asked == propose(SPACE, GOAL, [], known[::-1], [], 42)
    assert asked not in {each.point for each in known}
    assert propose(SPACE, GOAL, [], known, [asked], 42) != asked


def test_a_small_space_is_asked_to_its_last_point_and_then_none():
    small = Space((Axis("method", tuple("abc")), Axis("lr", (), 1, 2, whole=True)))
    trials: list[Trial] = []
    while (point := propose(small, GOAL, [], trials, [], 42)) is not None:
        trials.append(Trial(point, "name", {"quality": 1.0}, Revision("HEAD")))
    assert {each.point for each in trials} == {*small.points(small.axes)}


def test_trials_that_break_a_limit_lead_away_from_it():
    limit = [Limit("mb", 80, True, "--under")]
    space = Space((Axis("x", (), 0.0, 1.0),))

    def told(point):  # the larger the better, but over 0.5 it is too large
        (x,) = point
        return Trial(point, "", {"quality": x, "mb": 160 * x}, Revision("HEAD"))

    trials: list[Trial] = []
    for _ in range(30):
        trials.append(told(propose(space, GOAL, limit, trials, [], 42)))
    late = [each.point[0] for each in trials[15:]]
    assert sum(x <= 0.5 for x in late) > len(late) / 2
    assert max(x for x in late if x <= 0.5) > 0.45


def test_what_failed_or_was_stopped_is_not_asked_again():
    failed = Trial(("a", "4", "0.001"), "name", reason="no memory")
    stopped = Trial(("b", "4", "0.001"), "name", {"mb": 90.0})
    limit = [Limit("mb", 80, True, "--under")]
    for seed in range(5):
        asked = propose(SPACE, GOAL, limit, [failed, stopped], [], seed)
        assert asked not in (failed.point, stopped.point)
