"""Write one folder that runs elsewhere without us: the base and an adapter as one ONNX Runtime GenAI model.

lab bake --out travel                                # the pipeline's own adapter
lab bake mine.onnx_adapter --out travel              # or a PEFT adapter's folder
lab bake models/merged --out travel                  # what `lab merge` made: its adapter is in the weights
lab bake --out travel --page                         # and a page for browsers
python travel/ask.py "where is Chicago?"             # needs onnxruntime-genai, and nothing of this project

The folder also runs in Foundry Local (inference_model.json) and whatever else reads genai_config.json.
"""

from __future__ import annotations

import shutil
import sys
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.models.chat import TRAINED, takes_none
from lab.models.merge import check_empty
from stages.core.errors import UserError
from stages.core.files import in_megabytes, size_of, write_json, written_beside

if TYPE_CHECKING:
    from lab.models.light_tokenizer import LightTokenizer
    from stages.text.conversation import Conversation

HERE = Path(__file__).parent
PROGRAM, README, TEMPLATE = "ask.py", "README.md", "baked.md.j2"
CONTENT = "{Content}"  # where a question goes, as Foundry Local writes it
ALIKE = 0.8  # the part of a question's tokens below which a model cannot know what is asked
QUESTION = "Where is Zürich, and what is 1 + 1?  日本"
SCRATCH = (
    "scratch.onnx_adapter"  # in the unfinished folder, which goes with whatever ends the command
)
SERVER = "python -m http.server --bind 127.0.0.1"  # of Python itself: any static server will do
PACKAGES = {  # what runs the folder, by the provider that it was exported for
    "cpu": "onnxruntime-genai",
    "cuda": "onnxruntime-genai-cuda",
    "webgpu": "onnxruntime-genai onnxruntime-ep-webgpu",
    "dml": "onnxruntime-genai-directml",
    "trt_rtx": "onnxruntime-genai onnxruntime-ep-nv-tensorrt-rtx",
}
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


def bake(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, or an empty one.")],
    adapter: Annotated[
        Path,
        typer.Argument(help="An .onnx_adapter file, a PEFT folder, or what `lab merge` wrote."),
    ] = Path(TRAINED),
    model: Annotated[Path, typer.Option(help="The ONNX model's folder.")] = Path("models/onnx"),
    page: Annotated[
        bool,
        typer.Option("--page", help="Add a page that answers in a browser (by npm: 27 MB)."),
    ] = False,
) -> None:
    """Write the model and an adapter as one folder that runs elsewhere. It needs nothing of this project."""
    target = out.resolve()
    check_empty(out, target)
    merged = takes_none(adapter)
    source = adapter if merged else model
    # imported here: a mistake in the words is told at once
    from lab.models import baking, web
    from lab.models.light_tokenizer import LightTokenizer
    from stages.answers.held_adapters import refuse_no_file
    from stages.answers.runtime import GRAPH, read_config

    config = read_config(source, GRAPH)
    if page:
        web.check(config)
    peft = (adapter / "adapter_config.json").is_file()
    if not (merged or peft):
        refuse_no_file("to bake", adapter)
    with written_beside(target) as folder:
        baking.copy_rest(source, folder)
        if merged:
            shutil.copyfile(source / GRAPH, folder / GRAPH)
            said = "as it is"
        else:
            file = converted(adapter, model, folder / SCRATCH) if peft else adapter
            baking.bake(model, baking.adapter_values(file, model), folder)
            said = baking.compare(model, file, folder, tokens_of(LightTokenizer(folder)))
            (folder / SCRATCH).unlink(missing_ok=True)
        describe(folder, target.name, [source, source.parent / "base"], page)
        if page:
            tokenizer = LightTokenizer(folder)
            asked = prompt_of(tokenizer).replace(CONTENT, QUESTION)
            web.add_page(folder, asked, tokens_of(tokenizer))
        check_empty(out, target)  # seconds have passed: nobody's files are replaced
    print(f"{out} ({in_megabytes(size_of(target))}, {said})")
    print(f'python {out / PROGRAM} "where is Chicago?"')
    if page:
        print(f"{SERVER} --directory {out}      # then http://127.0.0.1:8000/")


def converted(peft: Path, model: Path, file: Path) -> Path:
    """Convert a PEFT adapter as `lab adapt` does; return the file."""
    from lab.models.adapt import warn_of_another_base
    from stages.adapters.convert import convert
    from stages.adapters.lora_inputs import BASE, load_graph

    convert(peft, model, file)
    warn_of_another_base(peft, model, str(load_graph(model).metadata_props.get(BASE)))
    return file


def describe(folder: Path, name: str, sources: list[Path], page: bool) -> None:
    """Write what others read: Foundry Local's file, a program, the base's terms and a README."""
    from jinja2 import Environment, FileSystemLoader

    from lab.models.light_tokenizer import LightTokenizer
    from stages.answers.devices import exported_for
    from stages.answers.limits import Limits
    from stages.answers.runtime import GRAPH, read_config

    prompt = prompt_of(LightTokenizer(folder))
    templates = {"assistant": CONTENT, "prompt": prompt}
    write_json(folder / "inference_model.json", {"Name": name, "PromptTemplate": templates})
    check_tokens(folder, prompt)
    provider = exported_for(read_config(folder, GRAPH))
    program = "ask_webgpu.py" if provider == "webgpu" else PROGRAM
    shutil.copyfile(HERE / program, folder / PROGRAM)
    environment = Environment(  # noqa: S701  # Markdown, of our own words and a folder's name
        loader=FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(TEMPLATE).render(
        name=name,
        program=(folder / PROGRAM).read_text(encoding="utf-8"),
        terms=copy_terms(sources, folder),
        switch=Limits.read(folder).rope_switch,
        packages=PACKAGES[provider],
        server=SERVER if page else None,
    )
    (folder / README).write_text(text, encoding="utf-8")


def chat_of(question: str) -> Conversation:
    """Return a question with the answer that is to come."""
    from stages.text.chat_encoder import said_by
    from stages.text.conversation import Conversation

    return Conversation([said_by("user", question), said_by("assistant", "")])


def prompt_of(tokenizer: LightTokenizer) -> str:
    """Return the text around a single question, which stands in it as {Content}."""
    from stages.text.chats import encoder_of

    text = encoder_of(tokenizer).render(chat_of(CONTENT), prompt=True)
    if text.count(CONTENT) != 1:
        raise UserError("the model's chat template does not show a question as it is, once")
    return text


def tokens_of(tokenizer: LightTokenizer) -> list[int]:
    """Return the tokens of a question that has more than ASCII in it, as `lab chat` asks it."""
    from stages.text.chats import prompt_ids

    return prompt_ids(tokenizer, chat_of(QUESTION))


def check_tokens(folder: Path, prompt: str) -> None:
    """Warn where the runtime's own tokenizer reads a prompt otherwise than training did, and how much so."""
    import onnxruntime_genai as og

    from lab.models.light_tokenizer import LightTokenizer

    wanted, reason = tokens_of(LightTokenizer(folder)), ""
    try:
        found = og.Tokenizer(str(folder)).encode(prompt.replace(CONTENT, QUESTION)).tolist()
    except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
        found, reason = [], f": {' '.join(str(error).split())}"
    if found == wanted:
        return
    alike = SequenceMatcher(None, found, wanted, autojunk=False).ratio()
    effect = "may differ from those of `lab chat`" if alike > ALIKE else "are nonsense"
    print(
        f"lab: warning: ONNX Runtime GenAI's tokenizer does not give the tokens that training had{reason} "
        f"({alike:.0%} of a question's are alike): answers of ask.py and of other programs that "
        f"use it {effect}; `lab chat --model` reads it as training did",
        file=sys.stderr,
    )


def copy_terms(sources: list[Path], folder: Path) -> list[str]:
    """Copy the base's licence and notices, where there are any; return their names."""
    found = {
        file.name: file
        for source in sources
        for pattern in TERMS
        for file in source.glob(pattern)
        if file.is_file()
    }
    for name, file in found.items():
        shutil.copyfile(file, folder / name)
    return sorted(found)
