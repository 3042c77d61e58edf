"""Write data/harness/words.jsonl: a definition, and four nouns of which one is meant.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python data/harness/make_words.py wordnet/usr/share/wordnet

Definitions and words are those of WordNet 3.0 (© Princeton University, WordNet 3.0 licence), as Debian's
package wordnet-base 1:3.0-37 has them. data.noun's sha256 is checked, so that the same bytes come out.
"""

import hashlib
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).resolve().parent / "words.jsonl"
NOUNS_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
QUESTIONS = 500
SEED = 0
COMMON = 5  # times that WordNet's own corpus has the word in this sense


class Noun(NamedTuple):
    """A common noun in its most frequent sense."""

    word: str
    definition: str
    subject: str  # WordNet's file of its subject: animal, artifact, food …
    alike: frozenset[str]  # its synonyms, itself included


def main(folder: Path, out: Path = OUT) -> None:
    """Write every question to `out` and say what was written."""
    data = (folder / "data.noun").read_bytes()
    if hashlib.sha256(data).hexdigest() != NOUNS_SHA256:
        sys.exit(f"{folder}/data.noun is not WordNet 3.0's: take Debian's wordnet-base 1:3.0-37")
    lines = [json.dumps(question) + "\n" for question in questions(list(nouns(folder)))]
    out.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{out.name}: {len(lines)} questions, {out.stat().st_size} bytes")


def nouns(folder: Path) -> Iterator[Noun]:
    """Read the nouns that are common and plainly defined."""
    often, first = common(folder / "cntlist.rev"), first_senses(folder / "index.noun")
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        place, subject, _, count, *rest = fields.split()
        synonyms = rest[: 2 * int(count, 16) : 2]
        word, definition = synonyms[0], gloss.split(";")[0].strip()
        plain = re.fullmatch("[a-z]{4,10}", word) and re.fullmatch("[a-z][a-z ,'-]+", definition)
        known = word in often and first[word] == place and 5 <= len(definition.split()) <= 14
        told = any(name[:5] in definition for name in synonyms)
        if plain and known and not told:
            yield Noun(word, definition, subject, frozenset(synonyms))


def first_senses(file: Path) -> dict[str, str]:
    """Return where data.noun has the most frequent sense of each noun."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            word, _, senses, *rest = line.split()
            found[word] = rest[-int(senses)]
    return found


def common(file: Path) -> set[str]:
    """Return the nouns whose first sense is common."""
    found = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        key, sense, count = line.split()
        word, _, rest = key.partition("%")
        if rest.startswith("1:") and sense == "1" and int(count) >= COMMON:
            found.add(word)
    return found


def questions(found: list[Noun]) -> Iterator[dict]:
    """Ask for words among three others of their subject, none of which is a synonym."""
    draw = random.Random(SEED)
    subjects = defaultdict(list)
    for noun in found:
        subjects[noun.subject].append(noun)
    for noun in draw.sample(found, QUESTIONS):
        others = [each for each in subjects[noun.subject] if each.word not in noun.alike]
        choices = [noun.word, *(each.word for each in draw.sample(others, 3))]
        draw.shuffle(choices)
        yield {
            "definition": noun.definition,
            "choices": choices,
            "answer": choices.index(noun.word),
        }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python data/harness/make_words.py FOLDER, the one with data.noun in it")
    main(Path(sys.argv[1]))
