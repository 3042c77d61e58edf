"""Put an adapter into the 4-bit weights: one model to ship, at the base's full speed.

lab merge --out models/merged                        # the pipeline's own adapter; minutes
lab merge my-peft-adapter --out models/mine          # one that was trained elsewhere, on this base
lab chat --model models/merged "where is Chicago"

Reads what `dvc repro` made, and needs no network. The weights that the adapter was trained on, with its
change added, are rounded again with error compensation on the training conversations (lab/models/merging.py
says why). DIR is then a folder for ONNX Runtime GenAI, and DIR/merge.json says how the merged model answers
the test prompts beside the adapter on its base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.core.errors import UserError
from stages.core.files import in_megabytes, size_of, write_json, written_beside

QUANTIZED = Path("models/quantized")
ONNX = Path("models/onnx")
ADAPTER = Path("models/adapter")
PREPARED = Path("data/prepared")
FIGURES = "merge.json"
SCRATCH = "scratch"  # in the unfinished folder, so that whatever ends the command leaves one thing at most
LINE = "{:<21} {:>9} {:>9} {:>9}  {}"
REST = """\
in brackets: what other test prompts could change (95 %)
base: without the adapter; all figures: {}"""


def merge(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, or an empty one.")],
    peft: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="The adapter.")] = ADAPTER,
    evaluate: Annotated[
        bool, typer.Option(help="Compare its answers with those of the adapter on its base.")
    ] = True,
) -> None:
    """Put a PEFT adapter into the 4-bit weights. Or say in one line why that cannot be."""
    from stages.core.settings import load_current

    settings = load_current()
    target = out.resolve()
    check_empty(out, target)
    check_present(peft, evaluate)
    from stages.adapters.peft_adapter import read_adapter

    say(f"reads {peft}")
    modules = read_adapter(peft)
    # imported here: PyTorch takes seconds, and a mistake in the words is told at once
    from lab.models import merging
    from lab.models.adapt import warn_of_another_base
    from stages.adapters.convert import convert
    from stages.answers.proof import cannot_run
    from stages.text.conversation import read_conversations

    merging.check_fits(modules, QUANTIZED)
    check_room(target, merging.disk_needed(QUANTIZED))
    provider = settings.optimize.execution_provider
    if evaluate and (reason := cannot_run(provider)):
        raise UserError(
            f"optimize.execution_provider is {provider}, which cannot answer here ({reason}): "
            "give --no-evaluate, or merge on a machine that has it"
        )
    report: dict[str, Any] = {}
    with written_beside(target) as folder:
        scratch = folder / SCRATCH
        scratch.mkdir(parents=True)
        if evaluate:  # before the work: the graph may have no inputs for this adapter
            convert(peft, ONNX, scratch / "adapter")
        warn_of_another_base(peft, QUANTIZED, settings.model.name)
        say(f"adds {merging.made_of(modules)} to {QUANTIZED}")
        merging.add_adapter(QUANTIZED, modules, scratch / "float")
        rows = read_conversations(PREPARED / "train.jsonl")
        merging.quantize_merged(scratch / "float", rows, settings.quantize, scratch / "packed")
        say("builds the ONNX graph and compares it with PyTorch")
        say(f"the graph is {merging.export_merged(scratch / 'packed', settings, folder)}")
        if evaluate:
            test = read_conversations(PREPARED / "test.jsonl")
            answers, costs = merging.compare(folder, ONNX, scratch / "adapter", test, settings)
            same = sum(answer.parity.identical for answer in answers if answer.parity)
            report = {"prompts": len(answers), "same_answers": same}
            report |= {"metrics": merging.summary(answers), **costs}
        shutil.rmtree(scratch)
        write_json(folder / FIGURES, {"adapter": str(peft), "base": settings.model.name, **report})
        check_empty(out, target)  # minutes have passed: nobody's files are replaced
    if evaluate:
        print("\n".join(table(report, out / FIGURES)))
    print(f"{out} ({in_megabytes(size_of(target))}): lab chat --model {out}")


def say(what: str) -> None:
    """Tell what is being done."""
    print(f"merge: {what}", flush=True)


def check_empty(out: Path, target: Path) -> None:
    """Raise `UserError` where the folder to write holds something, or is a file."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise UserError(f"--out {out} exists: name a new folder, or an empty one")


def check_present(peft: Path, evaluate: bool) -> None:
    """Raise `UserError` for what the pipeline has not made yet, with the command that does."""
    needed = {QUANTIZED / "config.json": "quantize", PREPARED / "train.jsonl": "prepare"}
    if evaluate:
        needed |= {ONNX / "model.onnx": "optimize"}
    if peft == ADAPTER:  # any other is the user's own
        needed |= {ADAPTER / "adapter_config.json": "finetune"}
    for file, stage in needed.items():
        if not file.is_file():
            raise UserError(
                f"{file.parent} is not here: run `dvc repro {stage}`, or `dvc pull`, first"
            )


def check_room(target: Path, needed: int) -> None:
    """Raise `UserError` where the disk that will hold the folder has too little room for the work."""
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place} has {in_megabytes(free)} free, and the merge fills {in_megabytes(needed)} on the "
            "way: free some, or let --out name a folder on another disk"
        )


def table(report: dict[str, Any], file: Path) -> list[str]:
    """Return what the merge changed, in lines of at most 80 columns."""
    lines = [LINE.format("", "adapter", "merged", "change", "")]
    for name, found in report["metrics"].items():
        low, high = found["change_interval"]
        cells = [f"{found[kind]:.4g}" for kind in ("unmerged", "merged", "change")]
        lines.append(LINE.format(name, *cells, f"({low:.3g} to {high:.3g})"))
    units = {"decode_tokens_per_s_p50": ("decode_tokens/s", 1), "bytes": ("MB", 1e6)}
    for name, (label, unit) in units.items():
        before, after, base = (report[kind][name] / unit for kind in ("adapter", "merged", "base"))
        cells = [f"{value:.1f}" for value in (before, after, after - before)]
        lines.append(LINE.format(label, *cells, f"(base: {base:.1f})"))
    lines.append(
        f"{report['same_answers']} of {report['prompts']} answers are the same, word for word"
    )
    return [line.rstrip() for line in [*lines, *REST.format(file).splitlines()]]
