"""The page of `lab bake --page`: a baked folder answers in a browser, and needs no server but a static one.

    check(config)                      # before the work: can browsers compute this graph, is npm here?
    add_page(folder, PROMPT, tokens)   # index.html, and page/ with what it needs

page/ has two modules of ours, ONNX Runtime Web and a tokenizer, both at the versions that package-lock.json
pins. They come by npm, and are copied: the page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab import npm
from lab.models import wasm_graph
from stages.answers.devices import exported_for
from stages.answers.limits import Limits
from stages.answers.runtime import GRAPH
from stages.core.errors import UserError
from stages.core.files import write_json

SOURCE = Path(__file__).parent / "page"
PAGE = "index.html"
PLACE = "page"  # in the folder: all that the page loads but the model
OURS = ("page.js", "model.js", "page.css")
PACKAGES = {  # what is copied, and its name in the folder
    "onnxruntime-web/dist/ort.webgpu.min.mjs": "ort.webgpu.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs": "ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
    "@huggingface/tokenizers/LICENSE": "tokenizers.LICENSE",
}
SCRATCH = "scratch.npm"  # in the unfinished folder, which goes with whatever ends the command
PROVIDERS = ("cpu", "webgpu")  # graphs of which a browser has all operators
NAMES = "onnxruntime-web and @huggingface/tokenizers"
ENCODE = """
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
const [folder, text] = process.argv.slice(-2);
const { Tokenizer } = await import(pathToFileURL(`${folder}/page/tokenizers.min.mjs`));
const json = (name) => JSON.parse(readFileSync(`${folder}/${name}`));
try {
  const tokenizer = new Tokenizer(json("tokenizer.json"), json("tokenizer_config.json"));
  console.log(JSON.stringify(tokenizer.encode(text, {add_special_tokens: false}).ids));
} catch (error) {
  console.error(String(error).split("\\n")[0]);
  process.exit(1);
}
"""


def check(config: dict[str, Any]) -> None:
    """Raise `UserError` for a graph that no browser computes, or where npm is missing."""
    if (provider := exported_for(config)) not in PROVIDERS:
        raise UserError(
            f"--page: the model was exported for {provider}, which browsers do not have: "
            "`dvc exp run -S optimize=webgpu_int4` makes one that they compute"
        )
    npm.need_node("--page", "lab bake")


def add_page(folder: Path, text: str, tokens: list[int]) -> None:
    """Write the page into a baked folder. `tokens` are what training makes of `text`."""
    print(f"Installing {NAMES} by npm", flush=True)
    packages = npm.install(SOURCE, folder / SCRATCH, NAMES)
    place = folder / PLACE
    place.mkdir()
    for name, copy in PACKAGES.items():
        shutil.copyfile(packages / name, place / copy)
    shutil.rmtree(folder / SCRATCH)
    for name in OURS:
        shutil.copyfile(SOURCE / name, place / name)
    shutil.copyfile(SOURCE / PAGE, folder / PAGE)
    wasm_graph.write(folder / GRAPH, place / wasm_graph.FILE)
    write_json(place / "model.json", described(folder))
    if encoded(folder, text) != tokens:
        print(
            "lab: warning: the page's tokenizer does not give the tokens that training had; its answers may "
            "differ from those of `lab chat`",
            file=sys.stderr,
        )


def described(folder: Path) -> dict[str, Any]:
    """Return what the page is told of the model: its files' bytes, how long a text may be, its numbers."""
    import onnx_ir as ir

    graph = ir.load(folder / GRAPH).graph
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    data = sorted(file.name for file in folder.glob("*.data"))

    def sizes(*names: str) -> dict[str, int]:
        return {name: (folder / name).stat().st_size for name in names}

    return {
        "graphs": {"webgpu": sizes(GRAPH), "wasm": sizes(f"{PLACE}/{wasm_graph.FILE}")},
        "data": sizes(*data),
        # beyond a longrope switch a text is to be read at once, and the page reads in pieces
        "room": Limits.read(folder).rope_switch or config["context_length"],
        "float16": any(value.dtype == ir.DataType.FLOAT16 for value in graph.inputs),
    }


def encoded(folder: Path, text: str) -> list[int]:
    """Return the tokens that the page makes of a text. Raises `UserError` where it cannot."""
    words = ["node", "--input-type=module", "-e", ENCODE, "--", str(folder), text]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["node said nothing"])[-1]
        raise UserError(
            f"--page: the page's tokenizer (@huggingface/tokenizers) cannot read this model's: {said}"
        )
    return json.loads(done.stdout)
