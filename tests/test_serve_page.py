"""The page of `lab serve`: it asks its own server alone, shows text as text, and works by keyboard."""

import json
import re
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from lab.serve.page import HEADERS, PAGE, POLICY
from support.browser import ENTER, ESCAPE, SHIFT, TAB, Page

KEY = "s3cret"
MARKUP = "<img src=x onerror=\"document.title='run'\"><b>bold</b> & so on\n日本"
MODELS = [
    {"id": "base", "parent": None},
    {"id": "one", "parent": "base"},
    {"id": "<i>two</i>", "parent": "base"},
]


class Parsed(HTMLParser):
    """The page's tags and attributes."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


PARSED = Parsed().tags


def test_every_url_that_the_page_names_is_its_own_servers():
    named = [
        value
        for _, attributes in PARSED
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert named == ["data:,"]
    assert "//" not in re.sub(r"[ \t]+// .*", "", PAGE.replace("**/", ""))
    assert sorted(re.findall(r'call\("([^"]+)"', PAGE)) == ["v1/chat/completions", "v1/models"]
    assert PAGE.count("fetch(") == 1
    assert not re.search(r"url\(|@import|XMLHttpRequest|WebSocket|EventSource|sendBeacon", PAGE)


def test_the_policy_lets_nothing_in_but_the_page_itself():
    assert POLICY["default-src"] == "'none'"
    assert POLICY["connect-src"] == "'self'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    # what a hash does not allow would not run: handlers and styles in tags, further scripts
    assert (
        [tag for tag, _ in PARSED].count("script") == [tag for tag, _ in PARSED].count("style") == 1
    )
    assert not [
        name for _, found in PARSED for name in found if name.startswith("on") or name == "style"
    ]


def test_nothing_is_put_in_as_html_or_kept_in_the_browser():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", PAGE)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie|history\.", PAGE)


def test_every_field_has_a_label_and_answers_are_announced():
    labels = {found["for"] for tag, found in PARSED if tag == "label" and "for" in found}
    fields = {
        found["id"]
        for tag, found in PARSED
        if tag in ("textarea", "input") and found.get("type") != "checkbox"
    }
    assert fields == labels
    assert 'setAttribute("aria-live", "polite")' in PAGE


class Scripted(BaseHTTPRequestHandler):
    """A server with the page, and answers that depend on the question."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/":
            return self.give(
                200, PAGE.encode(), {"Content-Type": "text/html; charset=utf-8"} | HEADERS
            )
        if self.path != "/v1/models":
            self.server.strange.append(self.path)
            return self.fail(404, "not there")
        if not self.allowed():
            return self.fail(401, "the API key is missing or wrong")
        return self.give(200, json.dumps({"data": MODELS}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        question = body["messages"][-1]["content"]
        if not self.allowed():
            return self.fail(401, "the API key is missing or wrong")
        if question == "refused":
            return self.fail(400, "the prompt has 9999 tokens: <b>too long</b>")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.say(
            {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        )
        if question == "for ever":
            return self.for_ever()
        if question == "cut":
            return self.word("half an ans")
        if question == "failed":
            self.word("half")
            return self.say({"error": {"message": "out of memory"}})
        text = MARKUP if question == "markup" else f"{body['model']} was asked {question}"
        for piece in (text[:5], text[5:] if question != "nothing" else ""):
            self.word(piece)
            time.sleep(0.02)
        self.say({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.say({"choices": [], "usage": {"completion_tokens": 11}})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def for_ever(self):
        try:
            while True:
                self.word("on ")
                time.sleep(0.02)
        except OSError:
            self.server.left.append(time.monotonic())

    def allowed(self) -> bool:
        return (
            self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        )

    def word(self, text: str):
        self.say({"choices": [{"delta": {"content": text}, "finish_reason": None}], "usage": None})

    def say(self, record: dict):
        self.wfile.write(f"data: {json.dumps(record, ensure_ascii=False)}\n\n".encode())

    def fail(self, status: int, message: str):
        self.give(status, json.dumps({"error": {"message": message}}).encode())

    def give(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.key, server.asked, server.left, server.strange = None, [], [], []
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def opened(browser, scripted, **options) -> Page:
    page = Page(browser, scripted.url, **options)
    page.waits(lambda: len(page.all("#models input")) == len(MODELS))
    return page


def ask(page: Page, text: str):
    """Ask by keyboard, and wait for the end."""
    before = len(page.all("section"))
    page.run("document.getElementById('question').focus()")
    page.press(text, ENTER)
    page.waits(lambda: len(page.all("section")) == before + 1)
    page.waits(page.all("#send")[0].is_enabled)


@pytest.mark.slow
def test_the_same_question_goes_to_the_models_that_are_ticked_and_each_goes_on_with_its_own(
    browser, scripted
):
    page = opened(browser, scripted)
    ask(page, "first")
    assert page.texts("h2") == ["first"]
    assert page.texts("article h3") == ["base", "one"]
    assert page.texts(".text") == ["base was asked first", "one was asked first"]
    for speed in page.texts(".speed"):
        assert re.fullmatch(
            r"[\d.]+ tokens/s · first token after \d+ ms · 11 tokens · cut at its longest", speed
        )
    page.all("#models input")[0].click()
    page.all("#models input")[2].click()
    ask(page, "second")
    assert page.texts("article h3")[2:] == ["one", "<i>two</i>"]
    asked = {body["model"]: body["messages"] for body in scripted.asked}
    assert [turn["content"] for turn in asked["one"]] == ["first", "one was asked first", "second"]
    assert [turn["role"] for turn in asked["one"]] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in asked["<i>two</i>"]] == ["second"]
    page.all("#new")[0].click()
    assert page.texts("h2") == []
    ask(page, "third")
    assert [turn["content"] for turn in scripted.asked[-1]["messages"]] == ["third"]
    assert page.complaints() == []
    assert scripted.strange == []


@pytest.mark.slow
def test_text_is_shown_as_text_and_so_are_questions_and_names(browser, scripted):
    page = opened(browser, scripted)
    ask(page, "markup")
    assert page.texts(".text") == [MARKUP] * 2
    ask(page, "<b>me</b>")
    assert page.texts("h2")[1] == "<b>me</b>"
    assert page.all("main b, main img, header i") == []
    assert browser.title == "lab serve"


@pytest.mark.slow
def test_escape_and_stop_end_the_answers_and_the_server_hears_of_it(browser, scripted):
    page = opened(browser, scripted)
    for way in ("escape", "button"):
        page.press("for ever", ENTER)
        page.waits(lambda: all(len(text) > 5 for text in page.texts("section:last-child .text")))
        assert not page.all("#send")[0].is_enabled()
        if way == "escape":
            page.press(ESCAPE)
        else:
            page.all("#stop")[0].click()
        page.waits(page.all("#send")[0].is_enabled)
        page.waits(lambda way=way: len(scripted.left) == (2 if way == "escape" else 4))
        assert all(text.endswith("stopped") for text in page.texts("section:last-child .speed"))
        assert browser.switch_to.active_element.get_attribute("id") == "question"
    half = page.texts("section:last-child .text")[0]
    ask(page, "go on")
    told = scripted.asked[-2]["messages"][-2]["content"].strip()
    assert told in [text.strip() for text in page.texts("section:nth-child(2) .text")]
    assert half.startswith("on on")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("refused", "the prompt has 9999 tokens: <b>too long</b>"),
        ("failed", "out of memory"),
        ("cut", "The answer broke off: the server closed the connection."),
    ],
)
def test_errors_are_shown_as_the_server_words_them(question, words, browser, scripted):
    page = opened(browser, scripted)
    ask(page, question)
    assert page.texts("article .wrong") == [words] * 2
    ask(page, "again")
    assert page.texts(".text")[2:] == ["base was asked again", "one was asked again"]
    turns = [turn["role"] for turn in scripted.asked[-1]["messages"]]
    assert turns == (["user"] if question == "refused" else ["user", "assistant", "user"])


@pytest.mark.slow
def test_a_server_that_is_gone_is_told(browser, scripted):
    page = opened(browser, scripted)
    scripted.shutdown()
    scripted.socket.close()
    ask(page, "anybody there?")
    assert page.texts("article .wrong") == ["The server does not answer: is it still running?"] * 2


@pytest.mark.slow
def test_a_key_is_asked_for_where_the_server_wants_one_and_is_forgotten(browser, scripted):
    scripted.key = KEY
    page = Page(browser, scripted.url)
    page.waits(page.all("#key")[0].is_displayed)
    assert page.texts("#trouble") == [""]
    page.waits(lambda: browser.switch_to.active_element.get_attribute("id") == "key")
    page.press("wrong", ENTER)
    page.waits(lambda: page.texts("#trouble") == ["the API key is missing or wrong"])
    page.press(KEY, ENTER)
    page.waits(lambda: len(page.all("#models input")) == len(MODELS))
    assert not page.all("#key")[0].is_displayed()
    assert page.texts("#trouble") == [""]
    page.waits(lambda: browser.switch_to.active_element.get_attribute("id") == "question")
    ask(page, "first")
    assert page.texts(".text") == ["base was asked first", "one was asked first"]
    kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert page.run(kept) == [0, 0, "", scripted.url]
    browser.refresh()
    page.waits(page.all("#key")[0].is_displayed)


@pytest.mark.slow
def test_the_keyboard_alone_reaches_everything_and_shows_where_it_is(browser, scripted):
    page = opened(browser, scripted)
    assert browser.switch_to.active_element.get_attribute("id") == "question"
    page.press(SHIFT + ENTER)
    assert page.all("section") == []
    page.run("document.querySelector('#models input').focus()")
    seen = []
    for _ in range(7):
        focused = browser.switch_to.active_element
        seen.append(focused.get_attribute("id") or focused.get_attribute("value"))
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press(TAB)
    assert seen == ["base", "one", "<i>two</i>", "question", "send", "new", "alone"]
    page.run("document.querySelector('#models input').focus()")
    page.press(" ")
    assert [box.is_selected() for box in page.all("#models input")] == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_it_fits_a_phone_and_can_be_read_in_both_schemes(width, dark, browser, scripted):
    page = opened(browser, scripted, width=width, dark=dark)
    ask(page, "a_word_that_is_much_longer_than_a_phone_is_wide_" * 3)
    ask(page, "refused")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    first, second = (card.rect for card in page.all("section:first-child article"))
    assert (first["y"] == second["y"]) == (width == 1000)  # side by side where there is room
    for selector in ("h2", ".text", ".speed", ".wrong", "#new", "#send", "#keys"):
        assert page.run(CONTRAST % selector) >= 4.5, selector


# WCAG's ratio between an element's text and what is behind it
CONTRAST = """
const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
  .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const element = document.querySelector("%s");
let behind = element;
while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
const a = light(getComputedStyle(element).color), b = light(getComputedStyle(behind).backgroundColor);
return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
"""


@pytest.mark.slow
def test_one_after_the_other_the_second_waits_for_the_first(browser, scripted):
    page = opened(browser, scripted)
    page.all("#alone")[0].click()
    page.all("#question")[0].send_keys("for ever", ENTER)
    page.waits(lambda: len(page.texts(".text")[0]) > 5)
    assert len(scripted.asked) == 1
    page.press(ESCAPE)
    page.waits(page.all("#send")[0].is_enabled)
    ask(page, "both")
    assert page.texts("section:last-child .text") == ["base was asked both", "one was asked both"]
