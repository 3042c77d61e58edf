"""Four bits, judged: how far predictions move, for ours, for peers and for every entry of conf/quantize.

    python -m benchmarks.rounding contest --draws 5 --peer .venv-peers/bin/python    # after `dvc repro`
    python -m benchmarks.rounding contest --only ours --named steps --override quantize.tuning_steps=24
    python -m benchmarks.rounding entries            # the table of docs/quantize.md

The judge is the mean KL(float | rounded) of the next token, in nats, on text that no contestant saw: news
(300 articles that the package gensim ships), data/heldout.txt and the task's validation rows. A draw is one
set of calibration text, other task rows and other text by the model, and is the same for all contestants,
which also get the same bits, groups and zero points, and leave embedding and head in float. Perplexity,
seconds and peak memory stand beside it. Olive's Gptq runs in this Python, the others in --peer's:

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install llmcompressor auto-round
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoConfig

from benchmarks.machine import RESULTS, ROOT, describe
from stages.core.files import read_json, size_of, write_json
from stages.core.running import peak_memory
from stages.core.settings import Quantize, validate
from stages.params import compose
from stages.quantization.calibration import calibration_set
from stages.quantize import BASE, HELDOUT, PREPARED, base_handler, make_pass
from stages.text.chats import load_tokenizer, sequences
from stages.text.conversation import read_conversations
from stages.weights.checkpoint import load_dequantized, load_float

NEWS = ("gensim", "4.4.0", "gensim/test/test_data/lee_background.cor")
NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
LENGTH, SEQUENCES = 512, 48  # of a text, at most: 24,576 tokens
PEERS = ("auto_round", "llm_compressor_gptq", "llm_compressor_awq")
CONTEST = ("rtn", "ours", "olive_gptq", *PEERS)
ENTRIES = sorted(path.stem for path in (ROOT / "conf/quantize").glob("*.yaml"))
Texts = dict[str, torch.Tensor]


def main() -> None:
    """Run what is asked for and keep it in results/rounding.json beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["contest", "entries"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants, or entries")
    parser.add_argument(
        "--peer", type=Path, help="the Python that has AutoRound and llm-compressor"
    )
    parser.add_argument("--override", nargs="*", default=[], help="settings of ours")
    parser.add_argument("--named", default="ours", help="how the results call ours, so overridden")
    parser.add_argument("--news", type=Path, help="lee_background.cor, where pip cannot bring it")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of each text")
    asked = parser.parse_args()
    judge = Judge(texts(asked.news, asked.sequences))
    figures = contest(judge, asked) if asked.what == "contest" else entries(judge, asked)
    keep(asked.what, figures)
    print(json.dumps(figures, indent=2))


def keep(what: str, figures: dict[str, Any]) -> None:
    """Write a part of results/rounding.json, with the machine that it is from; the other parts stay."""
    file = RESULTS / "rounding.json"
    there = read_json(file) if file.exists() else {}
    before = there.get(what, {})
    write_json(file, there | {what: before | {"machine": describe()} | figures})


def texts(news: Path | None, count: int) -> Texts:
    """Return the texts of the judge, [sequences, LENGTH] each."""
    tokenizer = load_tokenizer(BASE)
    raw = news.read_bytes() if news else news_of_gensim()
    if hashlib.sha256(raw).hexdigest() != NEWS_SHA256:
        raise SystemExit("benchmarks.rounding: the news are not those of gensim 4.4.0")
    articles = [line.strip() for line in raw.decode().splitlines() if line.strip()]
    prose = {"news": "\n\n".join(articles), "docs": HELDOUT.read_text(encoding="utf-8")}
    found = {}
    for name, text in prose.items():
        ids = tokenizer(text).input_ids
        rows = min(count, len(ids) // LENGTH)
        found[name] = torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)
    rows = read_conversations(PREPARED / "validation.jsonl")
    return found | {"task": torch.tensor(sequences(tokenizer, rows, count, LENGTH))}


def news_of_gensim() -> bytes:
    """Return 300 newspaper articles (Lee, Pincombe and Welsh 2005), as gensim's wheel has them."""
    package, version, member = NEWS
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, "--only-binary=:all:", f"{package}=={version}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(member)


class Judge:
    """The float model and the texts on which others are compared with it."""

    def __init__(self, texts: Texts):
        self.texts, self.model = texts, load_float(BASE)

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        """Return KL and perplexity, with its interval over sequences, on each text."""
        return {name: self.on(model, rows) for name, rows in self.texts.items()}

    def on(self, model: torch.nn.Module, rows: torch.Tensor) -> dict[str, float]:
        """Return the figures of one text."""
        divergences, losses = [], []
        for row in rows.to(self.model.device):
            expected = log_softmax(self.model(row[None]).logits[0, :-1].float(), dim=-1)
            found = log_softmax(model(row[None]).logits[0, :-1].float(), dim=-1)
            divergences.append(kl_div(found, expected, log_target=True, reduction="batchmean"))
            losses.append(cross_entropy(found, row[1:]))
        kl, loss = torch.stack(divergences).double(), torch.stack(losses).double()
        half = 1.96 * loss.std().item() / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
        mean = loss.mean().item()
        figures = {"kl": kl.mean().item(), "perplexity": math.exp(mean)}
        figures |= {
            "perplexity_low": math.exp(mean - half),
            "perplexity_high": math.exp(mean + half),
        }
        return {name: round(value, 5) for name, value in figures.items()}


def contest(judge: Judge, asked: argparse.Namespace) -> dict[str, Any]:
    """Return {contestant: {draw: figures}}, and the float model's perplexities."""
    tokens = {name: rows.numel() for name, rows in judge.texts.items()}
    figures: dict[str, Any] = {"float": judge(judge.model), "tokens": tokens}
    names = asked.only or [name for name in CONTEST if asked.peer or name not in PEERS]
    for draw in range(1, asked.draws + 1):
        with tempfile.TemporaryDirectory() as scratch:
            folder, options = Path(scratch), options_of(asked.override, draw)
            save_file({"tokens": drawn(options)}, folder / "tokens.safetensors")
            for name in names:
                kept = asked.named if name == "ours" else name
                found = contestant(name, folder, options, judge, asked.peer)
                figures.setdefault(kept, {})[str(draw)] = found
                print(kept, draw, json.dumps(found), flush=True)
    return figures


def options_of(overrides: list[str], seed: int) -> Quantize:
    """Return quantize's settings, with embedding and head in float as peers leave them."""
    float_ends = ["quantize.lm_head_bits=16", "quantize.embedding_bits=16", f"quantize.seed={seed}"]
    return settings_of(*overrides, *float_ends)


def settings_of(*overrides: str) -> Quantize:
    """Return quantize's settings as conf/ and overrides have them."""
    return validate(yaml.safe_load(compose(overrides, ROOT / "conf"))).quantize


def drawn(options: Quantize) -> torch.Tensor:
    """Return a draw's calibration tokens: task rows in another order, and the model's own text."""
    rows = read_conversations(PREPARED / "calibration.jsonl")
    random.Random(options.seed).shuffle(rows)
    return calibration_set(BASE, rows, options)


def contestant(
    name: str, folder: Path, options: Quantize, judge: Judge, peer: Path | None
) -> dict[str, Any]:
    """Let one round the base on a draw's tokens; return its cost and what the judge finds."""
    if name in PEERS:
        script = ROOT / "benchmarks/peer_rounding.py"
        command = [str(peer), str(script), name, str(BASE), str(folder), str(options.group_size)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"failed": done.stderr[-500:]}
        model = load_float(BASE)
        weights = load_file(folder / f"{name}.safetensors")
        if unknown := model.load_state_dict(weights, strict=False).unexpected_keys:
            return {"failed": f"{unknown[0]} is no weight of the base"}
        cost = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    else:
        started = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        pass_of(name, folder, options).run(base_handler(options), str(folder / name))
        cost = {"seconds": round(time.monotonic() - started, 1), **peak_memory()}
        model = load_dequantized(folder / name)
    return cost | judge(model)


def pass_of(name: str, folder: Path, options: Quantize) -> Any:
    """Return the Olive pass of a contestant, on the draw's tokens."""
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.pytorch import quant_utils
    from olive.passes.pytorch.gptq import Gptq
    from olive.passes.pytorch.rtn import Rtn

    from stages.quantization.awq import Awq

    grid = {"bits": options.bits, "group_size": options.group_size, "sym": options.symmetric}
    tokens = folder / "tokens.safetensors"
    if name == "ours":
        how = {"scale_grid": options.scale_grid, "tuning_steps": options.tuning_steps}
        return create_pass_from_dict(
            Awq, grid | how | {"calibration": str(tokens)}, disable_search=True
        )
    if name == "rtn":
        return create_pass_from_dict(Rtn, grid, disable_search=True)
    rows = [row[None] for row in load_file(tokens)["tokens"]]
    given = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    # it would load a data set from the hub
    quant_utils.get_calibration_dataset = lambda *_, **__: given
    return create_pass_from_dict(Gptq, grid, disable_search=True)


def entries(judge: Judge, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every entry of conf/quantize as the stage makes it, with embedding and head."""
    figures: dict[str, Any] = {"float": judge(judge.model) | {"mb": round(size_of(BASE) / 1e6, 1)}}
    config = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    for entry in asked.only or ENTRIES:
        options = settings_of(f"quantize={entry}", *asked.override)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "packed"
            started = time.monotonic()
            make_pass(options, config, Path(scratch)).run(base_handler(options), str(folder))
            cost = {"seconds": round(time.monotonic() - started, 1)}
            cost["mb"] = round(size_of(folder) / 1e6, 1)
            figures[entry] = cost | judge(load_dequantized(folder))
        print(entry, json.dumps(figures[entry]), flush=True)
    return figures


if __name__ == "__main__":
    main()
