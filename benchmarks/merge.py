"""An adapter in the 4-bit weights: ours beside plain rounding, and what calibration text does to it.

    python -m benchmarks.merge          # after dvc repro; a quarter of an hour on two cores

Writes benchmarks/results/merge.json: how each merged model answers the test prompts beside the adapter on its
base, the seconds that rounding took, and the speed of one of them: they decode alike. `plain` rounds the
merged weights to a grid of their own, group by group, without compensation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from transformers import AutoConfig

from benchmarks.machine import RESULTS, keep
from lab.models import merging
from lab.models.merge import ADAPTER, ONNX, PREPARED, QUANTIZED
from stages.adapters.convert import convert
from stages.adapters.peft_adapter import read_adapter
from stages.answers.generation import OnnxModel
from stages.core.files import read_json
from stages.core.running import be_quiet
from stages.core.settings import Quantize, load_current
from stages.evaluate import answer_all, sample, tokenize
from stages.quantize import pass_config
from stages.text.chats import load_tokenizer
from stages.text.conversation import read_conversations

# sequences of calibration, and the part of them that the merged model writes itself
WAYS: dict[str, tuple[int, float] | None] = {
    "plain": None,
    "task_64": (64, 0.0),
    "task_32_own_32": (64, 0.5),
    "task_32": (32, 0.0),  # what `lab merge` does
}


def main() -> None:
    """Merge in every way and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    ways = parser.parse_args().only
    be_quiet()
    settings = load_current()
    options, tokenizer = settings.evaluate, load_tokenizer(QUANTIZED)
    train, test = (read_conversations(PREPARED / f"{name}.jsonl") for name in ("train", "test"))
    prompts = [tokenize(tokenizer, row) for row in sample(test, options)]
    figures = earlier(ways) | {"prompts": len(prompts)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(ADAPTER, ONNX, folder / "adapter")
        model = OnnxModel(ONNX, {merging.ADAPTER: folder / "adapter"})
        unmerged = answer_all(model, merging.ADAPTER, prompts, options)
        merging.add_adapter(QUANTIZED, read_adapter(ADAPTER), folder / "float")
        for way in ways:
            started = time.monotonic()
            quantized_in(way, folder, train, settings.quantize)
            seconds = round(time.monotonic() - started, 1)
            merging.export_merged(folder / way, settings, folder / f"{way}-onnx")
            alone = answer_all(OnnxModel(folder / f"{way}-onnx"), None, prompts, options)
            found = merging.summary(merging.judge(tokenizer, prompts, alone, unmerged))
            figures[way] = {"seconds": seconds, **found}
            print(way, seconds, {name: each["merged"] for name, each in found.items()}, flush=True)
        made = folder / f"{ways[-1]}-onnx"  # all ways decode alike
        figures |= merging.costs(made, ONNX, folder / "adapter", prompts, options)
    keep("merge", figures)


def earlier(ways: list[str]) -> dict[str, Any]:
    """Return the figures of the ways that are not tried now, of an earlier run."""
    file = RESULTS / "merge.json"
    found = read_json(file) if file.exists() else {}
    return {name: figures for name, figures in found.items() if name in set(WAYS) - set(ways)}


def quantized_in(way: str, folder: Path, rows: list, options: Quantize) -> None:
    """Write the packed checkpoint of the merged one, by a way of WAYS."""
    merged, chosen = folder / "float", WAYS[way]
    if chosen is None:
        described = pass_config(options, AutoConfig.from_pretrained(merged))
        handler = HfModelHandler(str(merged), load_kwargs={"torch_dtype": "float32"})
        create_pass_from_dict(Rtn, described, disable_search=True).run(handler, str(folder / way))
    else:
        sequences, own = chosen
        tried = options.model_copy(update={"calibration_sequences": sequences})
        merging.quantize_merged(merged, rows, tried, folder / way, own)


if __name__ == "__main__":
    main()
