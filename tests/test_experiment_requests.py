"""What `dvc exp run` is asked for is refused at once where it would fail, or lose something, later."""

import json

import pytest

from support.project import clone

pytestmark = pytest.mark.slow
RUN = ("exp", "run", "--queue")


@pytest.fixture(scope="module")
def clone_with_rows(tmp_path_factory):
    """A clone with a file of rows that git does not know. Only queue in it what is refused."""
    project = clone(tmp_path_factory.mktemp("requests") / "clone")
    rows = [{"prompt": f"q{i}?", "response": f"a{i}"} for i in range(9)]
    (project.root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return project


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*RUN, "-S", "data.path=mine.jsonl"), "git add mine.jsonl"),
        (("exp", "run", "--temp", "-S", "data.path=mine.jsonl"), "git add mine.jsonl"),
        ((*RUN, "-S", "data.path=data/travel.jsonl,mine.jsonl"), "git add mine.jsonl"),
        ((*RUN, "-S", "model.source.corpus=mine.jsonl"), "--copy-paths mine.jsonl"),
        ((*RUN, "-S", "+experiment=quick"), "write -S experiment=quick"),
        ((*RUN, "-S", "+finetune.rank=8"), "write -S finetune.rank=8"),
        ((*RUN, "-S", "finetune/rank=8"), "write -S finetune.rank=8"),
        ((*RUN, "-S", "finetune/rank=8,16"), "write -S finetune.rank=8,16"),
        ((*RUN, "-S", "params.yaml:finetune/rank=8"), "write -S finetune.rank=8"),
        ((*RUN, "-S", "model/tiny=true"), "write -S model=tiny"),
    ],
)
def test_a_mistake_is_one_line_with_the_right_word_and_nothing_is_queued(
    words, said, clone_with_rows
):
    output = clone_with_rows.dvc(*words, exits=255)
    (line,) = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    assert line.endswith(said)
    assert "Having any troubles" not in output
    assert "Traceback" not in output
    assert "No experiment tasks" in clone_with_rows.dvc("queue", "status")


def test_a_file_that_git_knows_or_that_is_copied_is_queued(clone_with_rows, tmp_path):
    project = clone_with_rows.copy(tmp_path / "clone")
    copied = ("--copy-paths", "mine.jsonl")
    assert "Queued" in project.dvc(*RUN, *copied, "-S", "data.path=mine.jsonl")
    project.git("add", "mine.jsonl")
    assert "Queued" in project.dvc(*RUN, "-S", "data.path=mine.jsonl")


def test_a_second_experiment_of_a_queued_name_is_refused(clone_with_rows, tmp_path):
    project = clone_with_rows.copy(tmp_path / "clone")
    assert "Queued experiment 'a'" in project.dvc(*RUN, "--name", "a", "-S", "finetune.rank=8")
    refused = project.dvc(*RUN, "--name", "a", "-S", "finetune.rank=4", exits=255)
    assert "experiment a is queued already" in refused
    assert project.dvc("queue", "status").count("Queued") == 1
    assert "Queued" in project.dvc(*RUN, "--name", "b", "-S", "finetune.rank=4")
