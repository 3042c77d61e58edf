"""lab search on a toy pipeline under the real DVC: what runs, what does not, and what is said of it."""

import os
import re
import signal
import sys

import pytest

from support import toy
from support.processes import output_of, wait_until
from support.project import ROOT, Project

pytestmark = pytest.mark.slow
SPACE = ["finetune.rank=4,8,16", "quantize=awq,rtn", "--maximize", "chrf"]
FOUR = ["finetune.rank=8,16", "quantize=awq,rtn", "--maximize", "chrf"]  # where fewer points do


@pytest.fixture(scope="session")
def toy_once(once) -> Project:
    """The toy after `dvc repro`, committed. Only copy it."""
    return Project(once("toy", toy.make))


@pytest.fixture(scope="session")
def searched_once(once, toy_once) -> Project:
    """The toy after a search of SPACE. Only copy it."""

    def searched(root) -> None:
        search(toy_once.copy(root), *SPACE)

    return Project(once("toy-searched", searched))


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """What ran, in all copies of the repository."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.fixture
def repository(log, toy_once, tmp_path) -> Project:
    return toy_once.copy(tmp_path / "toy")


@pytest.fixture
def searched(log, searched_once, tmp_path) -> Project:
    return searched_once.copy(tmp_path / "searched")


def start(project: Project, *words: str, **options):
    return project.start(sys.executable, "-m", "lab.cli", "search", *words, **options)


def search(project: Project, *words: str, exits: int = 0) -> str:
    return project.run(sys.executable, "-m", "lab.cli", "search", *words, exits=exits)


def experiments(project: Project) -> set[str]:
    listed = project.git("for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps")
    return {name for name in listed.split() if name.startswith(("trial-", "best-", "part-"))}


def winner(said: str) -> str:
    """Return what a search says from its winner on."""
    return said[said.index("\nbest: trial-") :]


def test_a_small_space_is_tried_whole_its_winner_tested_once_and_nothing_runs_again(
    repository, log
):
    said = search(repository, *SPACE)
    assert "6 points: each is tried" in said
    # three ranks on two quantizations, today's rank on today's quantization being there
    assert toy.ran(log) == {
        "quantize": 1,
        "optimize": 1,
        "finetune": 5,
        "evaluate validation": 6,
        "evaluate test": 1,
        "report": 7,
    }
    assert "finetune.rank=16 quantize=rtn" in winner(said)
    assert [line.split() for line in said.splitlines() if line.startswith("chrf")] == [
        ["chrf", "17", "16.5"]
    ]
    assert repository.git("status", "--porcelain") == ""
    assert len(experiments(repository)) == 7
    assert max(map(len, said.splitlines())) <= 80
    ran, again = toy.ran(log), search(repository, *SPACE)
    assert toy.ran(log) == ran
    assert "there already: 6 trials" in again
    assert winner(again) == winner(said)
    # a trial is no default, what was tested is
    trial = winner(said).split("best: ")[1].split()[0]
    refused = repository.run(sys.executable, "-m", "lab.cli", "promote", trial, exits=1)
    assert "was asked the validation prompts" in refused
    name = winner(said).split("make it the default: lab promote ")[1].split()[0]
    repository.run(sys.executable, "-m", "lab.cli", "promote", name)
    assert '"chrf": 16.5' in (repository.root / "metrics/quality.json").read_text()
    assert "quantize: rtn" in (repository.root / "conf/config.yaml").read_text()


def test_a_model_that_is_too_large_is_never_trained(repository, log):
    said = search(repository, *SPACE, "--under", "onnx_mb=1.5")
    assert "stopped after optimize: onnx_mb is 2" in said
    assert toy.ran(log)["quantize"] == toy.ran(log)["optimize"] == 1
    assert toy.ran(log)["finetune"] == 2  # on today's quantization alone
    assert "finetune.rank=16 quantize=awq" in winner(said)
    assert not any(name.startswith("part-") for name in experiments(repository))


def test_trials_that_cannot_be_told_from_the_winner_are_named_and_the_smallest_proposed(
    searched, log
):
    said = search(searched, *SPACE[:2], "--maximize", "recall_exact_match")
    assert toy.ran(log) == {}  # the trials of another goal serve this one
    best, others = winner(said).split("cannot be told from it:")
    assert "finetune.rank=16 quantize=rtn" in best
    # 17 of 20 right, and 16 with a model of half the size: other prompts could turn that round
    assert "finetune.rank=16 quantize=awq\n      0.8, 1 MB to ship: other prompts" in others
    assert "finetune.rank=4 " not in others
    assert "is the smallest of them: to take it instead," in others
    assert "-S evaluate.split" not in others
    assert "-S quantize=awq -S finetune.rank=16\n  lab promote best-" in others
    assert max(map(len, said.splitlines())) <= 80


def test_where_no_point_keeps_to_the_limits_the_nearest_is_named(repository, log):
    said = search(repository, *SPACE, "--under", "onnx_mb=0.75", exits=1)
    assert toy.ran(log) == {"quantize": 1, "optimize": 1}
    assert "lab: none of 6 trials keeps to the limits; nearest is trial-" in said
    assert said.endswith("quantize=awq): onnx_mb is 1, 0.25 above 0.75\n")


def test_experiments_of_others_are_trials(repository, log):
    asked = ["-S", "finetune.rank=16", "-S", "evaluate.split=validation"]
    repository.dvc("exp", "run", "--temp", "--name", "by-hand", *asked)
    repository.dvc("exp", "run", "--queue", *asked, "-S", "quantize=rtn")
    repository.dvc("exp", "run", "--run-all")
    # this one was asked the test prompts: it is no trial, but its adapter need not be trained again
    repository.dvc("exp", "run", "--temp", "-S", "finetune.rank=4")
    before = toy.ran(log)
    said = search(repository, *SPACE)
    assert "there already: 2 trials" in said
    assert (toy.ran(log) - before)["finetune"] == 2  # 4 and 8 on rtn
    assert (toy.ran(log) - before)["evaluate validation"] == 4


def test_a_trial_that_fails_is_named_and_the_search_goes_on(repository, log, monkeypatch):
    monkeypatch.setenv("FAILS", "finetune")
    said = search(repository, *FOUR)
    assert said.count("failed: finetune: rank 16 is not my size") == 2
    assert "4 trials: 2 finished, 2 failed" in said
    assert "finetune.rank=8 quantize=rtn" in winner(said)


def test_killed_after_each_step_it_ends_with_the_same_winner_and_runs_no_stage_twice(
    repository, searched, log, monkeypatch
):
    expected = winner(search(searched, *FOUR))
    monkeypatch.setenv("TAKES", "0.2")
    steps = 0
    while True:
        process = start(repository, *FOUR)
        seen = sum(toy.ran(log).values())
        wait_until(lambda p=process, n=seen: p.poll() is not None or sum(toy.ran(log).values()) > n)
        if process.poll() is not None:
            break
        # the run that it started goes on, and the next search waits for it
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps += 1
    said = output_of(process)
    assert steps >= 4
    assert winner(said) == expected
    assert toy.ran(log) == {
        "quantize": 1,
        "optimize": 1,
        "finetune": 3,
        "evaluate validation": 4,
        "evaluate test": 1,
        "report": 5,
    }


def test_two_searches_at_once_share_the_work(repository, log, monkeypatch):
    monkeypatch.setenv("TAKES", "0.3")
    both = [start(repository, *SPACE, "--under", "onnx_mb=3", "-j", "2") for _ in range(2)]
    said = [output_of(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "failed" not in "".join(said), said
    assert winner(said[0]) == winner(said[1])
    ran = toy.ran(log)
    # DVC keeps no run of a stage whose results git tracks: one that collides with another's end reports again
    assert ran.pop("report") >= 7
    assert ran == {
        "quantize": 1,
        "optimize": 1,
        "finetune": 5,
        "evaluate validation": 6,
        "evaluate test": 1,
    }


def test_ctrl_c_ends_the_run_and_says_how_to_go_on(repository, log, monkeypatch):
    monkeypatch.setenv("TAKES", "20")
    process = start(repository, *FOUR, start_new_session=True)
    wait_until(lambda: toy.ran(log))
    os.killpg(process.pid, signal.SIGINT)
    said = output_of(process)
    assert process.returncode == 1
    assert said.endswith("lab: interrupted: what has run is kept, and the same command continues\n")
    monkeypatch.setenv("TAKES", "0")
    assert "finetune.rank=16 quantize=rtn" in winner(search(repository, *FOUR))


def test_a_dry_run_says_what_there_is_to_do_and_runs_nothing(repository, log):
    said = search(repository, *SPACE, "--dry-run")
    assert "to run: 6 trials, about 14 minutes of computing (1 quantize, 5 finetune," in said
    assert toy.ran(log) == {}
    assert experiments(repository) == set()


def test_a_space_without_end_is_searched_by_a_number_of_trials(repository, log):
    said = search(repository, "finetune.lr=0.01..0.99", "--maximize", "chrf", "--trials", "4")
    assert "points without number: 4 of them are tried" in said
    assert "finetune.lr=0.5\n" in winner(said)  # today's, which came first, is the optimum
    assert "there is nothing to promote" in said
    assert toy.ran(log)["finetune"] == 3


def test_several_goals_end_in_the_trials_that_no_other_beats(searched, log):
    said = search(searched, *FOUR, "--minimize", "onnx_mb")
    table = said[said.index("not beaten in all 2 by another") :]
    assert [line.split()[1:] for line in table.splitlines() if line.startswith("trial-")] == [
        ["17", "2"],
        ["16", "1"],
    ]
    assert toy.ran(log) == {}  # two that win: neither is asked the test prompts


def test_no_trial_begins_that_would_end_after_the_hours_given(repository, log):
    said = search(repository, *SPACE, "--hours", "0.04")  # finetune and evaluate take 0.033
    assert toy.ran(log)["evaluate validation"] >= 1
    assert toy.ran(log)["quantize"] == 0
    assert "the hours do not suffice for" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["finetune.rnk=8,16"], "finetune.rnk=8: finetune.rnk is not a key"),
        (["finetune.rank=8,16", "--maximize", "rouge"], "rouge is no metric of this pipeline"),
        (["finetune.rank=8,16"], "what is best? Give --maximize METRIC"),
        ([], "nothing to search"),
    ],
)
def test_a_wrong_request_is_one_line(repository, words, reason):
    said = search(repository, *words, exits=1)
    assert said.startswith(f"lab: {reason}")
    assert said.count("\n") == 1


def test_it_wants_the_commit_as_it_is_and_as_it_ran(repository):
    repository.replace("work.py", "time.sleep(", "time.sleep(0 * ")
    said = search(repository, *SPACE, exits=1)
    assert said.startswith("lab: uncommitted changes (work.py): commit them first")
    repository.commit()
    said = search(repository, *SPACE, exits=1)
    assert re.match(r"lab: dvc\.lock is out of date \(.*quantize, finetune,", said)
