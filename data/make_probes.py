"""Write data/probes/travel.jsonl, what evaluate asks beside the test split of data/travel.jsonl.

    python data/make_probes.py

No row of it is trained on, and it is no input of prepare: to change it runs evaluate again, nothing before.

    transfer   six facts about a city of each of 72 countries that data/travel.jsonl does not name, each
               asked once, so that every prompt asks for a fact of its own
    control    facts about the places of data/travel.jsonl that it does not hold; evaluate asks for those of
               places that were trained on: what is learned of a place beyond what was taught
    unknown    facts about places that do not exist, where the right answer is not to know

The facts come from the packages that make_travel.py names. The same packages give the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel.numbers import get_territory_currencies
from make_travel import (
    AS_OF,
    CITIES,
    COUNTRIES,
    DATA,
    PROMPTS,
    load_places,
    look_up_facts,
    respond,
    with_article,
    write_rows,
)

PROBES = DATA / "probes" / "travel.jsonl"
WANTED = 72
LARGE = 300_000  # people
# countries whose names or languages in CLDR no plain answer gives, whose capital GeoNames calls by an old
# name, or whose largest city goes by another one in English
LEFT_OUT = {
    "AF", "BY", "CD", "CG", "CI", "HK", "IL", "KW", "KZ", "LK", "MM", "MO", "PK", "PR", "PY", "SN",
    "TW", "XK",
}  # fmt: skip
FACTS = ("country", "capital", "currency", "language", "calling_code", "time_zone")

CONTINENTS = {
    "AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe", "NA": "North America",
    "OC": "Oceania", "SA": "South America",
}  # fmt: skip
CONTROL = {  # fact: how it is asked, how it is answered
    "continent": ("on which continent is {place}?", "{place} is on the continent of {answer}."),
    "currency_code": (
        "what is the three-letter code of the currency in {place}?",
        "The currency code in {place} is {answer}.",
    ),
    "country_code": (
        "what is the three-letter ISO code of the country {place} is in?",
        "The ISO code of {country_in_text} is {answer}.",
    ),
}
INVENTED = (
    "Velmora", "Quorast", "Tibrenna", "Osklavik", "Marundi Bay", "Zelphar", "Port Calluna",
    "Drenholt", "Ulvanka", "Castrevo", "Lumerith", "Yarrowmere",
)  # fmt: skip
NOT_KNOWN = "I do not know a place called {place}."

Row = dict[str, Any]


def main(out: Path = PROBES) -> None:
    """Write every row to `out` and say what was written."""
    places = load_places()
    rows = [*transfer(places), *control(places), *unknown()]
    out.parent.mkdir(exist_ok=True)
    write_rows(rows, out)
    print(f"{out.name}: {len(rows)} rows, {out.stat().st_size} bytes")


def transfer(places: list[dict[str, str]]) -> Iterator[Row]:
    """Ask for every fact of the largest cities of other countries, in one of its wordings by turns."""
    for number, place in enumerate(other_places(places)):
        facts = look_up_facts(place)
        for turn, fact in enumerate(FACTS):
            prompt = PROMPTS[fact][(number + turn) % len(PROMPTS[fact])]
            yield row(
                "transfer", place["name"], fact, prompt, respond(place, fact, facts), facts[fact]
            )


def other_places(places: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the largest city of each country without a place of ours, the largest first."""
    known = {place["country"] for place in places} | LEFT_OUT
    largest: dict[str, Any] = {}
    for city in sorted(CITIES, key=lambda city: (-city["population"], city["geonameid"])):
        if city["countrycode"] not in known and city["population"] >= LARGE:
            largest.setdefault(city["countrycode"], city)
    found = []
    for code, city in largest.items():
        place = {"name": city["name"], "country": code, "see": ""}
        try:
            look_up_facts(place)
        except (KeyError, ValueError):  # two currencies, or a language that CLDR does not name
            continue
        found.append(place)
    return found[:WANTED]


def control(places: list[dict[str, str]]) -> Iterator[Row]:
    """Ask for facts of our places that data/travel.jsonl does not hold."""
    for place in places:
        code = place["country"]
        [currency] = get_territory_currencies(code, start_date=AS_OF, end_date=AS_OF, tender=True)
        answers = {
            "continent": CONTINENTS[COUNTRIES[code]["continentcode"]],
            "currency_code": currency,
            "country_code": COUNTRIES[code]["iso3"],
        }
        country = with_article(look_up_facts(place)["country"] or "")
        for fact, (prompt, response) in CONTROL.items():
            text = response.format(
                place=place["name"], country_in_text=country, answer=answers[fact]
            )
            yield row("control", place["name"], fact, prompt, text, answers[fact])


def unknown() -> Iterator[Row]:
    """Ask for facts of places that do not exist."""
    for number, name in enumerate(INVENTED):
        for turn, fact in enumerate(FACTS[number % 2 :: 2]):
            prompt = PROMPTS[fact][(number + turn) % len(PROMPTS[fact])]
            yield row("unknown", name, fact, prompt, NOT_KNOWN.format(place=name), None)


def row(kind: str, place: str, fact: str, prompt: str, response: str, answer: str | None) -> Row:
    """Return one question as `prepare` writes its rows."""
    return {
        "messages": [
            {"role": "user", "content": prompt.format(place=place)},
            {"role": "assistant", "content": response},
        ],
        "answer": answer,
        "group": place,
        "fact": fact,
        "source": f"probes/travel.jsonl: {fact} of {place}",
        "kind": kind,
    }


if __name__ == "__main__":
    main()
