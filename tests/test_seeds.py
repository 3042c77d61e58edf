"""Training noise: what seeds could explain is not called sure, and the page says what hides a change."""

import json
from dataclasses import replace

import pytest

from lab.review import changes, page
from lab.review.intervals import intervals
from lab.review.revisions import Revision
from lab.review.seeds import STUDENT, Doubt, by_seeds, doubts, spread, student
from stages.scoring.metrics import summarize
from stages.scoring.predictions import Prediction
from support import predictions as made_up

SEEDS = {
    "recall_exact_match": [0.84, 0.98, 0.86, 0.94, 0.90],
    "chrf": [80.0, 84.0, 78.0, 83.0, 81.0],
}


def predictions(right: int, of: int = 50, base: int = 10) -> list[Prediction]:
    """Test prompts of which the first are answered rightly, by the adapter and by the base."""
    return made_up.predictions(
        *([int(number < count) for number in range(of)] for count in (right, base))
    )


class Stub(Revision):
    """A revision whose files are made up."""

    def __init__(self, answered: list[Prediction], noise: dict[str, list[float]] | None) -> None:
        super().__init__("stub")
        measured = {"metrics": {n: spread(v) for n, v in (noise or {}).items()}}
        measured |= {"seeds": [1, 2, 3, 4, 5], "commit": "abc1234", "machine": "a machine"}
        files = {"metrics/quality.json": summarize(answered), "metrics/noise.json": measured}
        texts = {path: json.dumps(value) for path, value in files.items()}
        texts["metrics/predictions.jsonl"] = "\n".join(each.as_json() for each in answered)
        if noise is None:
            del texts["metrics/noise.json"]
        object.__setattr__(self, "texts", texts)

    def read(self, path: str) -> str | None:
        return self.texts.get(path)


def review(before: Stub, after: Stub) -> tuple[dict[str, str], page.Review]:
    """Return the verdict of every metric that changed, and the page."""
    sure = doubts(before, after, intervals(before.predictions, after.predictions))
    metrics = changes.metrics(before, after, sure)
    lists = ("parameters", "files", "verdicts", "stale", "stages", "answers")
    nothing = {name: [] for name in lists}
    found = page.Review(
        base=before, head=after, described=("", ""), metrics=metrics, shown=0, prompts=50,
        comparable=True, seeds=after.noise_measured or before.noise_measured, **nothing,
    )  # fmt: skip
    return {metric.name: metric.verdict for metric in found.moved}, found


def test_two_seeds_of_one_commit_are_never_called_different():
    """Seven prompts more are right: prompts alone would call that sure, the measured seeds do not."""
    verdicts, found = review(Stub(predictions(42), None), Stub(predictions(49), SEEDS))
    assert verdicts == {"recall_exact_match": "could be noise (seeds)"}
    assert found.headline.startswith("**No difference that is sure**")


def test_a_change_beyond_prompts_and_seeds_is_sure():
    verdicts, found = review(Stub(predictions(10), SEEDS), Stub(predictions(45), SEEDS))
    assert verdicts == {"recall_exact_match": "surely better"}
    assert found.headline == "**Better**: better in `recall_exact_match` beyond noise."
    assert "Training noise: 5 seeds of commit abc1234 on a machine" in page.markdown(found)


def test_without_measured_seeds_nothing_trained_is_sure_and_the_page_says_how_to_measure():
    verdicts, found = review(Stub(predictions(10), None), Stub(predictions(45), None))
    assert verdicts == {"recall_exact_match": "better beyond the prompts"}
    assert "surely" not in found.headline
    assert "training seeds were not measured" in found.headline
    assert "`lab noise` trains on several" in page.markdown(found)


def test_prompts_hide_a_change_of_one_answer():
    steady = {name: [values[0]] * 5 for name, values in SEEDS.items()}
    verdicts, _ = review(Stub(predictions(44), steady), Stub(predictions(45), steady))
    assert verdicts == {"recall_exact_match": "could be noise (prompts)"}


def test_the_headline_does_not_deny_what_is_sure_without_the_adapter():
    """No seed trains the model without its adapter: its change may be sure though none was measured."""
    verdicts, found = review(Stub(predictions(45), None), Stub(predictions(45, base=40), None))
    assert verdicts == {"recall_exact_match_base": "surely better"}
    assert found.headline == (
        "**No difference that is sure** with the adapter: noise could explain these changes; "
        "without its adapter the model is better in `recall_exact_match_base`."
    )


@pytest.mark.parametrize(
    ("doubt", "hidden"),
    [
        (Doubt(0.1, (-0.1, 0.3), 0.0), "prompts"),
        (Doubt(0.1, (0.05, 0.15), 0.2), "seeds"),
        (Doubt(0.1, (-0.1, 0.3), 0.2), "prompts and seeds"),
        (Doubt(0.1, (0.01, 0.19), 0.09), "prompts and seeds together"),
        (Doubt(0.1, (0.05, 0.15), 0.05), ""),
        (Doubt(0.1, None, 0.2), "seeds"),
        (Doubt(0.1, None, None), ""),
    ],
)
def test_what_hides_a_change_is_named(doubt, hidden):
    assert doubt.hidden_by == hidden
    assert not (hidden and doubt.sure)


def test_variances_of_prompts_and_seeds_add():
    low, high = Doubt(0.5, (0.1, 0.9), 0.3).interval
    assert (low, high) == pytest.approx((0.0, 1.0))


def test_few_seeds_are_known_badly():
    """Student's t of one degree of freedom, as every table has it, times both sides' deviation."""
    assert STUDENT[0] == 12.706
    assert student(4) == 2.776
    assert student(10**6) == pytest.approx(1.95996, abs=1e-5)
    assert by_seeds("chrf", [80.0, 82.0], None) == pytest.approx(12.706 * 2, rel=1e-6)
    assert by_seeds("chrf", None, None) is None
    assert by_seeds("chrf_base", None, None) == 0


def test_two_measurements_have_more_degrees_of_freedom_than_one():
    one, other = [80.0, 82.0, 81.0], [79.0, 81.0, 80.0]
    assert by_seeds("chrf", one, other) < by_seeds("chrf", one, None)


def test_the_spread_of_a_metric_is_its_mean_deviation_and_ends():
    assert spread([1.0, 2.0, 3.0]) == {
        "mean": 2.0, "standard_deviation": 1.0, "min": 1.0, "max": 3.0, "values": [1.0, 2.0, 3.0],
    }  # fmt: skip


def test_answers_that_did_not_change_are_the_same():
    same = predictions(44)
    assert review(Stub(same, None), Stub([replace(p) for p in same], None))[0] == {}
