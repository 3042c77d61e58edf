"""README and docs name only what is there: commands, settings, files, links, metrics and their figures."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from benchmarks import figures
from lab.cli import COMMANDS
from lab.review.meanings import worse_by
from stages.params import compose, flat

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = "azurite|benchmarks|conf|data|docs|hydra_plugins|lab|metrics|requirements|stages|tests"
MADE_BY_A_RUN = ("data/prepared", "metrics/noise.json", "metrics/raw", "metrics/speed")
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
    of_an_option = {"model.source.path", "model.source.sha256", "model.source.uri"}
    of_an_option |= {"optimize.float32"}
    for key in {key.rstrip(".") for key in named} - of_an_option:
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


FILLED = {page.relative_to(ROOT).as_posix(): page for page in figures.PAGES}
UNITS = "tokens/s|GiB|MiB|GB|MB|ms|%"


@pytest.mark.parametrize("page", FILLED)
def test_every_figure_of_a_page_is_what_its_source_holds(page):
    """Where it is not: `make docs`."""
    assert figures.fill(TEXTS[page]) == TEXTS[page]


@pytest.mark.parametrize("page", FILLED)
def test_a_measured_figure_has_a_source(page):
    """What has a unit of measurements is filled in, but for rules, sizes of others, and examples of code."""
    known = (
        "80GB",
        "7.6 GB",
        "13 GB",
        "20 GB",
        "2 GB",
        "200 MB",
        "10 MB",
        "16 GB",
        "95 %",
        "100 %",
    )
    prose = re.sub(
        r"^```.*?^```", "", figures.without_figures(TEXTS[page]), flags=re.MULTILINE | re.DOTALL
    )
    found = re.findall(rf"(?<![\w.])\d[\d.,]*\s?(?:{UNITS})(?!\w)", prose)
    assert [figure for figure in found if figure not in known] == []


@pytest.mark.parametrize("page", FILLED)
def test_no_line_begins_with_a_figures_comment(page):
    """Markdown would take the line for HTML."""
    assert re.findall(r"^<!--\{.*", TEXTS[page], re.MULTILINE) == []


def test_a_figure_in_a_sentence_and_in_a_table_is_filled_in():
    text = (
        "It has <!--{full_scale.json matmul_tflops .0f}-->1<!--/--> of them.\n<!-- figures\n"
        "| {decode_gpu.json limit.device} |\n-->\n\n| old |\n\n<!-- /figures -->\n"
    )
    filled = figures.fill(text)
    rate = json.loads((ROOT / "benchmarks/results/full_scale.json").read_text())["matmul_tflops"]
    assert f"-->{rate}<!--/--> of them" in filled
    assert "\n| cuda |\n" in filled
    assert "old" not in filled
    assert figures.fill(filled) == filled


def test_a_figure_without_a_source_is_refused():
    with pytest.raises(KeyError, match=r"full_scale.json has no fetch.hours"):
        figures.fill("<!--{full_scale.json fetch.hours}-->1<!--/-->")


def test_the_results_at_full_scale_hold_only_what_their_script_writes():
    results = json.loads((ROOT / "benchmarks/results/full_scale.json").read_text())
    stages = {"fetch", "prepare", "quantize", "finetune", "optimize", "adapt", "evaluate", "report"}
    rates = {"matmul_tflops", "float32_matmul_tflops"}
    written = {"machine", "chain_seconds", "finetune_packed", *rates, *stages}
    assert results.keys() <= written
    cost = {"wall_seconds", "seconds", "peak_memory_gib", "peak_gpu_memory_gib", "limit_seconds"}
    assert results["quantize"].keys() <= {*cost, "machine"}


def test_the_changelog_begins_with_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## \[(\d[^\]]*)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)[0] == version
