"""The page of `lab bake --page`: the folder answers in a browser as it does here, by a static server."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import onnx_ir as ir
import pytest

from lab import npm
from lab.models import bake, wasm_graph, web
from lab.models.light_tokenizer import LightTokenizer
from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.core.settings import Optimize
from stages.text.chat_encoder import said_by
from stages.text.chats import generation_prompt_ids
from support.browser import ENTER, ESCAPE, TAB, Page
from support.tiny_models import FAMILIES, checkpoint, exported, same, tokens, trained

HTML = (web.SOURCE / web.PAGE).read_text(encoding="utf-8")
SCRIPTS = {name: (web.SOURCE / name).read_text(encoding="utf-8") for name in web.OURS}
WEBGPU = Optimize(execution_provider="webgpu", accuracy_level=1, float32=True)
QUESTION = "where is Zürich? $& 日本"  # more tokens than the page reads at once
SHORT = 20  # tokens of an answer
ASK = """
const [question, done] = arguments;
(async () => {
  const model = await (await import("./page/model.js")).load(() => {});
  let last = null;
  for await (const step of model.answer(question)) last = step;
  return {device: model.device, ...last};
})().then(done, (error) => done({error: String(error)}));
"""


class Parsed(HTMLParser):
    """The page's tags and attributes."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(HTML)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


PARSED = Parsed().tags


def test_the_page_loads_its_own_folder_alone():
    named = [
        found[name] for _, found in PARSED for name in ("src", "href", "action") if name in found
    ]
    assert named == ["data:,", "page/page.css", "page/page.js"]
    for text in SCRIPTS.values():
        assert not re.search(r"\w+://", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
        assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie|sendBeacon", text)
    imported = re.findall(r'from "\./([^"]+)"', "".join(SCRIPTS.values()))
    assert set(imported) <= {*web.OURS, *web.PACKAGES.values()}


def test_the_policy_lets_nothing_in_but_the_folder():
    policy = next(tag["content"] for _, tag in PARSED if "http-equiv" in tag)
    assert policy.startswith("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; ")
    assert "connect-src 'self';" in policy
    assert "unsafe-inline" not in policy
    assert "'unsafe-eval'" not in policy
    assert not [name for _, tag in PARSED for name in tag if name.startswith("on")]
    assert not [tag for tag, found in PARSED if "style" in found or tag == "style"]


def test_every_package_that_npm_installs_is_pinned_by_its_digest():
    wanted = json.loads((web.SOURCE / "package.json").read_text())["dependencies"]
    pinned = json.loads((web.SOURCE / "package-lock.json").read_text())["packages"]
    assert {pinned[f"node_modules/{name}"]["version"] for name in wanted} == {*wanted.values()}
    assert all(name == "" or "sha512-" in each["integrity"] for name, each in pinned.items())
    assert {"ci", "--ignore-scripts"} <= {*npm.COMMAND.split()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("tied", {}), ("tied", {"head_bits": 4}), ("llama", {"symmetric": True})],
    ids=str,
)
def test_the_graph_for_wasm_looks_embeddings_up_alike(family, options, tmp_path):
    folder = exported(checkpoint(tmp_path, FAMILIES[family], **options), tmp_path / "onnx")
    model = OnnxModel(folder)
    expected = model.logits(tokens(12))
    wasm_graph.write(folder / "model.onnx", folder / wasm_graph.FILE)
    (folder / wasm_graph.FILE).replace(folder / "model.onnx")
    graph = ir.load(folder / "model.onnx").graph
    assert wasm_graph.LOOKUP not in {node.op_type for node in graph}
    same(OnnxModel(folder).logits(tokens(12)), expected)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model for WebGPU, and an adapter. Only read it."""
    root = tmp_path_factory.mktemp("page")
    packed = checkpoint(root / "tiny", FAMILIES["tied"] | {"max_position_embeddings": 1024})
    folder, file = exported(packed, root / "onnx", options=WEBGPU), root / "a.onnx_adapter"
    trained(packed, root / "peft", 3)
    convert(root / "peft", folder, file)
    return folder, file


def left_by(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if out.name in path.name]


def test_without_npm_one_line_says_so_and_nothing_is_written(made, tmp_path, monkeypatch):
    folder, file = made
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^--page needs Node\.js, and node and npm cannot be found"
    ):
        bake.bake(tmp_path / "travel", file, folder, page=True)
    assert left_by(tmp_path / "travel") == []


@pytest.mark.skipif(not shutil.which("npm"), reason="no npm: install Node.js")
def test_without_a_network_one_line_says_so_and_nothing_is_left(
    made, tmp_path, dead_port, monkeypatch
):
    folder, file = made
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    words = "npm could not install onnxruntime-web and .*: its registry cannot be reached"
    with pytest.raises(UserError, match=words) as refusal:
        bake.bake(tmp_path / "travel", file, folder, page=True)
    assert "\n" not in str(refusal.value)
    assert left_by(tmp_path / "travel") == []


def test_a_graph_that_no_browser_computes_is_refused(tmp_path):
    packed = checkpoint(tmp_path, FAMILIES["llama"])
    cuda = exported(
        packed,
        tmp_path / "onnx",
        options=Optimize(execution_provider="cuda", accuracy_level=None),
    )
    trained(packed, tmp_path / "peft", 3)
    with pytest.raises(UserError, match=r"^--page: the model was exported for cuda, .*webgpu_int4"):
        bake.bake(tmp_path / "travel", tmp_path / "peft", cuda, page=True)
    assert left_by(tmp_path / "travel") == []


# in a browser: make test-page


@pytest.fixture(scope="module")
def baked(made, tmp_path_factory) -> Path:
    """A folder with a page. Only read it."""
    folder, file = made
    out = tmp_path_factory.mktemp("baked") / "travel"
    try:
        bake.bake(out, file, folder, page=True)
    except UserError as error:
        if re.search("needs Node|registry cannot be reached", str(error)):
            pytest.skip(str(error))
        raise
    return out


@pytest.fixture(scope="module")
def short(baked, tmp_path_factory) -> Path:
    """The folder with shorter answers: in software a token of WebGPU takes its time."""
    folder = shutil.copytree(baked, tmp_path_factory.mktemp("short") / "travel")
    script = (folder / "page/model.js").read_text(encoding="utf-8")
    shorter = script.replace("LONGEST = 256", f"LONGEST = {SHORT}")
    assert shorter != script
    (folder / "page/model.js").write_text(shorter, encoding="utf-8")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Isolating(Quiet):
    """A server that gives browsers leave to share memory among threads."""

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@pytest.fixture
def served() -> Iterator:
    """Serve folders as `python -m http.server` does; return each one's address."""
    servers = []

    def serve(folder: Path, handler: type[Quiet] = Quiet) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def opened(page: Page) -> Page:
    """Wait until a page is ready, or says why not."""
    page.waits(lambda: page.texts("#trouble")[0] or "Computed" in page.texts("#device")[0])
    return page


def settled(page: Page) -> None:
    """Wait until an answer is there."""
    page.waits(lambda: page.all(".speed") and not page.all("[aria-busy=true]"))


def expected(folder: Path, question: str) -> tuple[list[int], str]:
    """Return the greedy answer of ONNX Runtime GenAI on the same folder: its tokens, its text."""
    tokenizer = LightTokenizer(folder)
    prompt = generation_prompt_ids(tokenizer, [said_by("user", question)])
    assert len(prompt) > 30
    answer = OnnxModel(folder, device="cpu").generate(prompt, SHORT)
    return answer, tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.page
@pytest.mark.parametrize("device", ["wasm", "webgpu"])
def test_the_page_answers_with_the_greedy_tokens_of_the_same_folder(
    device, baked, short, served, webgpu_browser
):
    answer, text = expected(baked, QUESTION)
    assert len(answer) > 8
    page = opened(Page(webgpu_browser, f"{served(short)}?device={device}"))
    assert page.texts("#trouble") == [""]
    found = page.run_async(ASK, QUESTION)
    assert (found.get("error"), found["tokens"], found["text"]) == (None, answer, text)
    assert found["device"].lower().startswith(device)
    page.press(QUESTION, ENTER)
    settled(page)
    shown = page.run("return document.querySelector('.text').textContent")
    assert shown == text
    assert re.search(rf"tokens/s · .* · {len(answer)} tokens", page.texts(".speed")[0])
    assert page.complaints() == []


@pytest.mark.page
def test_the_page_says_what_computes_and_why(baked, served, browser, webgpu_browser):
    url = served(baked)
    for window, why in (
        (browser, "this browser finds no GPU for WebGPU"),
        (webgpu_browser, "the processor stands in for a GPU here"),
    ):
        page = opened(Page(window, url))
        assert page.texts("#device") == [f"Computed with wasm ({why})."]
        assert page.texts("h1") == ["Ask travel"]


@pytest.mark.page
def test_where_the_server_isolates_the_page_wasm_has_threads(baked, short, served, browser):
    cores = "Emulation.setHardwareConcurrencyOverride"
    browser.execute_cdp_cmd(cores, {"hardwareConcurrency": 4})
    try:
        page = opened(Page(browser, served(short, Isolating)))
        assert page.texts("#device")[0].startswith("Computed with wasm in 2 threads (")
        assert page.run_async(ASK, QUESTION)["tokens"] == expected(baked, QUESTION)[0]
    finally:
        browser.execute_cdp_cmd(cores, {"hardwareConcurrency": os.cpu_count()})


@pytest.mark.page
def test_the_page_works_by_keyboard_in_narrow_windows_and_in_the_dark(baked, served, browser):
    page = opened(Page(browser, served(baked), width=360, dark=True))
    assert page.run("return document.activeElement.id") == "question"
    page.press("hello", TAB)
    assert page.run("return document.activeElement.id") == "send"
    page.press(ENTER)
    settled(page)
    assert page.texts("h2") == ["hello"]
    assert page.run("return document.documentElement.scrollWidth") <= 360
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


@pytest.mark.page
def test_escape_stops_an_answer_and_the_next_one_is_whole(baked, served, tmp_path, browser):
    folder = shutil.copytree(baked, tmp_path / "endless")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = -1
    (folder / "genai_config.json").write_text(json.dumps(config))
    page = opened(Page(browser, served(folder)))
    page.press("hello", ENTER)
    page.waits(lambda: page.texts(".text")[0])
    page.press(ESCAPE)
    settled(page)
    assert page.texts(".speed")[0].endswith(" · stopped")
    assert int(re.search(r"(\d+) tokens", page.texts(".speed")[0])[1]) < 256
    page.press("hello", ENTER)
    page.waits(lambda: len(page.all(".speed")) == 2)
    assert page.texts(".speed")[1].endswith("256 tokens · cut at its longest")
    assert page.texts(".text")[1].startswith(page.texts(".text")[0])


@pytest.mark.page
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx.data is missing"),
        (
            lambda folder: (folder / "model.onnx.data").write_bytes(b"cut"),
            "model.onnx.data is not what was written here: copy the whole folder again.",
        ),
        (
            lambda folder: (folder / "page/model.json").write_text(
                (folder / "page/model.json").read_text().replace('"data": {', '"data": {"x": 4000000000,')
            ),
            "4.0 GB are too much for wasm, and this browser finds no GPU",
        ),
        (lambda folder: (folder / "page/page.js").unlink(), "This page needs JavaScript and a server"),
    ],
    ids=["missing", "cut", "too large", "no script"],
)  # fmt: skip
def test_what_is_wrong_is_one_line_on_the_page(change, words, baked, served, tmp_path, browser):
    folder = shutil.copytree(baked, tmp_path / "broken")
    change(folder)
    page = opened(Page(browser, served(folder)))
    assert words in page.texts("#trouble")[0]
    assert page.run("return document.getElementById('send').disabled")


@pytest.mark.page
def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(baked, browser):
    page = Page(browser, (baked / web.PAGE).as_uri())
    assert "python -m http.server --bind 127.0.0.1" in page.texts("#trouble")[0]


@pytest.mark.page
def test_a_tokenizer_that_differs_is_told_and_one_that_cannot_be_read_is_refused(baked, tmp_path):
    text = bake.prompt_of(LightTokenizer(baked)).replace(bake.CONTENT, bake.QUESTION)
    assert web.encoded(baked, text) == bake.tokens_of(LightTokenizer(baked))
    folder = shutil.copytree(baked, tmp_path / "other")
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}')
    with pytest.raises(UserError, match=r"cannot read this model's: \w*Error: .{1,99}$"):
        web.encoded(folder, text)
