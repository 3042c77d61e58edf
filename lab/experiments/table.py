"""Show experiments with what decides: the parameters that differ, quality, size, speed.

lab exp                                              # this commit's experiments
lab exp --all-commits --sort-by recall_exact_match --sort-order desc
lab exp --csv                                        # whatever `dvc exp show` takes

dvc's own table has a column for every parameter, of which a terminal of 80 columns shows only dots. Here the
metrics are columns, and the parameters that differ from the commit's stand below each experiment.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest

import typer

from lab.git import need_commit

SETTINGS = "(model|data|quantize|finetune|optimize|evaluate)[.]"
METRICS = [
    "(recall|transfer|test)_exact_match",
    "answer_perplexity",
    "onnx_adapter_mb",
    "decode_tokens_per_s_p50",
]
# what `dvc exp show` itself puts in front, some of it only to build the first column
FRONT = ["Experiment", "State", "rev", "typ", "parent"]
NAMING = "(Experiment|rev|typ)$"  # --only-changed would drop those that are alike in all rows
OWN_FORMATS = ("--csv", "--md", "--json", "--help")  # which dvc prints itself
Row = dict[str, str]


def table(context: typer.Context) -> None:
    """Show experiments with what decides. Takes the words of `dvc exp show`."""
    need_commit()
    command = [sys.executable, "-m", "dvc", "exp", "show", "--only-changed", "--no-pager"]
    command += ["--drop", all_but(METRICS), *context.args]
    if asks_for_a_format(context.args):
        raise typer.Exit(subprocess.run(command).returncode)
    command += ["--csv", "--precision", "5", "--keep", NAMING]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        rows = list(csv.DictReader(io.StringIO(done.stdout, newline="")))
        print("\n".join(lines(rows, shutil.get_terminal_size().columns)))
    raise typer.Exit(done.returncode)


def asks_for_a_format(words: list[str]) -> bool:
    """Say whether one of OWN_FORMATS is among the words; argparse takes `--js` for --json."""
    options = [word for word in words if word.startswith("--") and word != "--"]
    return any(name.startswith(option) for option in options for name in OWN_FORMATS)


def all_but(metrics: list[str]) -> str:
    """Return the pattern of the columns to drop: all but parameters and these metrics."""
    quality = f"(metrics/.*:)?({'|'.join(metrics)})$"
    return f"(?!({'|'.join(FRONT)})$|{SETTINGS}|{quality})"


def lines(rows: list[Row], width: int) -> Iterator[str]:
    """Yield a table of names, states and metrics, with the settings below each experiment."""
    columns = [name for row in rows[:1] for name in row if name not in FRONT and "." not in name]
    cells = [
        [name_of(row), row.get("State") or "", *(number(row[c]) for c in columns)] for row in rows
    ]
    head = [["experiment"], [""], *(column.split("_") for column in columns)]
    widths = [
        max(map(len, [*words, *(row[place] for row in cells)])) for place, words in enumerate(head)
    ]
    for words in zip_longest(*head, fillvalue=""):
        yield laid_out(words, widths)
    commits = [row for row in rows if row["typ"] == "baseline"]
    commit = commits[-1] if commits else {}
    for row, texts in zip(rows, cells, strict=True):
        if (
            row["typ"] == "baseline"
        ):  # the workspace comes first, and differs from the commit below it
            commit = commits[1] if row is rows[0] and len(commits) > 1 else row
        yield laid_out(texts, widths)
        changed = " ".join(differences(commit, row))
        yield from textwrap.wrap(
            changed,
            width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
        )


def name_of(row: Row) -> str:
    """Return the name of an experiment, or of the commit that experiments below it started from."""
    return ("" if row["typ"] == "baseline" else "- ") + (row.get("Experiment") or row["rev"])


def number(text: str) -> str:
    """Return a figure without needless digits."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def laid_out(texts: tuple[str, ...] | list[str], widths: list[int]) -> str:
    """Return a line: names and states to the left, figures to the right."""
    pairs = enumerate(zip(texts, widths, strict=True))
    return "  ".join(t.ljust(w) if place < 2 else t.rjust(w) for place, (t, w) in pairs).rstrip()


def differences(commit: Row, row: Row) -> Iterator[str]:
    """Yield KEY=VALUE of every setting that differs from the commit's; a model is known by its name."""
    another_model = row.get("model.name") != commit.get("model.name")
    for key, value in row.items():
        detail = another_model and key.startswith("model.") and key != "model.name"
        if "." in key and value and value != commit.get(key) and not detail:
            yield f"{key}={value}"
