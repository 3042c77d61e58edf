"""README and docs name only what is there: commands, settings, files, links, metrics and their figures."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from lab.cli import COMMANDS
from lab.review.meanings import worse_by
from stages.params import compose, flat

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = "azurite|benchmarks|conf|data|docs|hydra_plugins|lab|metrics|requirements|stages|tests"
MADE_BY_A_RUN = ("data/prepared", "metrics/raw", "metrics/speed")
SETTINGS = "model|data|quantize|finetune|optimize|evaluate"


def code_of(text: str) -> list[str]:
    """Return the lines of fenced blocks, without their comments, and the pieces of inline code."""
    parts = re.split(r"^```.*$", text, flags=re.MULTILINE)
    lines = [re.sub(r"\s+# .*", "", line) for block in parts[1::2] for line in block.splitlines()]
    return lines + [" ".join(code.split()) for prose in parts[::2] for code in inline(prose)]


def inline(prose: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose)


def commands_of(page: str) -> list[str]:
    """Return the shell commands of a page, one each: of `a && b` both."""
    pieces = [piece for code in code_of(TEXTS[page]) for piece in re.split(r"&&|;", code)]
    return [piece.strip().removeprefix("$ ").removeprefix(".venv/bin/") for piece in pieces]


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_of_ours_that_a_page_names_exists(page):
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands_of(page):
        first, *words = command.split() or [""]
        if first == "lab" and words and re.fullmatch(r"[a-z]+", words[0]):
            assert words[0] in COMMANDS, command
        if first == "make":
            assert {word for word in words if re.fullmatch(r"[a-z-]+", word)} <= {*targets}, command
        if (
            first == "python"
            and words[:1] == ["-m"]
            and re.fullmatch(r"(stages|lab|benchmarks)[a-z._]*", words[1])
        ):
            assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").is_file(), command


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_that_a_page_names_exists(page):
    known = flat(yaml.safe_load((ROOT / "params.yaml").read_text()))
    named = re.findall(
        rf"(?<![\w/.-])((?:{SETTINGS})\.[a-z_.]+[a-z0-9_]*)", "\n".join(code_of(TEXTS[page]))
    )
    of_a_source = {"model.source.path", "model.source.sha256", "model.source.uri"}
    for key in {key.rstrip(".") for key in named} - of_a_source:
        assert any(f"{full}.".startswith(f"{key}.") for full in known), key


def overrides() -> list[tuple[str, ...]]:
    """Return what the pages give to -S, by command; of a sweep the first value."""
    found = set()
    for page in TEXTS:
        for command in commands_of(page):
            words = re.findall(r"-S ('[^']*'|[^\s'…$]+)(?=\s|$)", command)
            if words and "…" not in command and "$" not in command:
                found.add(tuple(re.sub(r"^([^\[]*?),.*", r"\1", w.strip("'")) for w in words))
    return sorted(found)


@pytest.mark.slow
def test_every_override_that_a_page_names_composes():
    assert len(overrides()) > 20
    for words in overrides():
        compose(words, ROOT / "conf")  # raises, with the key that is wrong


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_to_a_file(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", TEXTS[page])
    folder = (ROOT / page).parent
    assert [target for target in targets if not (folder / target).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_a_page_names_exists(page):
    paths = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*\w)", " ".join(inline(TEXTS[page])))
    named = {path for path in paths if not path.startswith(MADE_BY_A_RUN)}
    assert [path for path in sorted(named) if not [*ROOT.glob(path)]] == []


def test_readme_lists_every_lab_command_with_its_sentence():
    rows = re.findall(r"^\| `lab (\w+)` \| (.+) \|$", TEXTS["README.md"], re.MULTILINE)
    assert rows == [(name, about) for name, (_, about) in COMMANDS.items()]


GLOSSARY = TEXTS["docs/metrics.md"]


def glossary(file: str) -> dict[str, str]:
    """Return the keys that docs/metrics.md explains of a file, with the better direction."""
    section = GLOSSARY.partition(f"## {file}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", section, re.MULTILINE))


def keys_of(file: str) -> set[str]:
    """Return the keys of one file in metrics/, those of the model with its adapter."""
    values = json.loads((ROOT / "metrics" / file).read_text())
    if file == "costs.json":
        return {key for cost in values.values() for key in cost}
    return {key for key in values if not key.endswith("_base")}


@pytest.mark.parametrize("file", ["quality.json", "size.json", "speed.json", "costs.json"])
def test_the_glossary_explains_every_metric(file):
    assert keys_of(file) <= glossary(file).keys()


@pytest.mark.parametrize("file", ["quality.json", "size.json", "speed.json"])
def test_the_glossary_and_lab_review_agree_on_what_is_better(file):
    for name, better in glossary(file).items():
        assert better == ("less" if worse_by(name, 1.0) > 0 else "more"), name


def test_readme_shows_the_quality_and_sizes_that_metrics_holds():
    """An interval that is a point (all right, or all wrong) is no interval: README says it otherwise."""
    results = TEXTS["README.md"].partition("## Results\n")[2].partition("\n## ")[0]
    quality = json.loads((ROOT / "metrics/quality.json").read_text())
    sizes = json.loads((ROOT / "metrics/size.json").read_text())
    quantized = [name for name in quality if name.startswith(("perplexity_", "task_perplexity_"))]
    expected = [f"{quality[name]:g}" for name in quantized]
    expected.append(", ".join(f"{size:g}" for size in sizes.values()))
    for row in (ROOT / "metrics/quality.md").read_text().splitlines()[2:]:
        _, _, value, interval, _, base, interval_base, _ = (cell.strip() for cell in row.split("|"))
        for figure, around in ((value, interval), (base, interval_base)):
            low, _, high = around.partition(" to ")
            expected += [f"{figure} ({around})"] if low != high else []
    assert [figure for figure in expected if figure not in results] == []


def test_the_changelog_begins_with_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## \[(\d[^\]]*)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)[0] == version
