"""Write news-like English articles with summaries, in the schema of cnn_dailymail.

Every article is a pure function of (seed, number): the same call gives the same bytes everywhere.
People, towns, rivers and companies are put together from syllables and belong to nobody. Each split
has surnames and towns of its own, so that no combination of facts of a test article was ever seen
in training and a good summary can only be *read* from the article.

    python examples/demo/generate_news.py --split test --output examples/demo/articles.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count, islice, product
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

Split = Literal["train", "validation", "test"]

HEADLINE_FOLLOWS_LEAD = 0.5
TWO_FACTS_SHARE = 0.7
FIRST_FACTS_SHARE = 0.5
"""Editors differ: what a summary reports, and how, is partly chance. No model can score 100."""

SPLIT_MODULUS = 20
"""One article in twenty is for test and one for validation, by its id."""

LONG_ARTICLE_SHARE = 0.03
"""So many articles open with background until they no longer fit: they exercise left truncation."""

LONG_ARTICLE_PREAMBLE = 20
"""Sentences put before a long article; truncation then takes background and spares the facts."""


@dataclass(frozen=True)
class Person:
    """An invented person; formats as the full name."""

    first: str
    last: str

    def __str__(self) -> str:
        """First name and surname."""
        return f"{self.first} {self.last}"


@dataclass(frozen=True)
class Article:
    """One row of the cnn_dailymail schema; ``id`` is the SHA-1 of a made-up address."""

    article: str
    highlights: str
    id: str


@dataclass(frozen=True)
class NamePool:
    """The surnames and towns that one split may use."""

    surnames: tuple[str, ...]
    towns: tuple[str, ...]


@cache
def load_templates() -> Mapping[str, Any]:
    """The parsed ``templates.toml`` beside this script."""
    text = Path(__file__).with_name("templates.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def article_id(number: int) -> str:
    """The id of article ``number``: 40 hexadecimal digits."""
    return hashlib.sha1(f"demo-news/{number:06d}".encode(), usedforsecurity=False).hexdigest()


def split_of(identifier: str) -> Split:
    """The split that an article belongs to, from its id alone."""
    special: dict[int, Split] = {0: "test", 1: "validation"}
    return special.get(int(identifier[:8], 16) % SPLIT_MODULUS, "train")


@cache
def name_pool(split: Split) -> NamePool:
    """The names of ``split``; the pools of two splits have no name in common."""

    def share(syllables: Sequence[str]) -> tuple[str, ...]:
        names = ["".join(parts) for parts in product(*(group.split() for group in syllables))]
        Random("names").shuffle(names)
        tenths: dict[Split, range] = {"test": range(1), "validation": range(1, 2)}
        mine = tenths.get(split, range(2, 10))
        return tuple(name for place, name in enumerate(names) if place % 10 in mine)

    names = load_templates()["names"]
    return NamePool(share(names["surname_syllables"]), share(names["town_syllables"]))


@dataclass
class FactSource:
    """Draws the values of placeholders; no name is drawn twice for one article."""

    random: Random
    pool: NamePool
    used: set[str] = field(default_factory=set)

    def draw(self, spec: str | Sequence[str]) -> object:
        """A value for ``spec``: an entry of a list, or a kind such as ``"count:2:60"``."""
        if not isinstance(spec, str):
            return self.random.choice(spec)
        kind, *bounds = spec.split(":")
        if bounds:
            low, high = map(int, bounds)
            return self.random.randint(low, high) if kind == "count" else self._millions(low, high)
        return self._drawers()[kind]()

    def _millions(self, low: int, high: int) -> str:
        whole = self.random.randint(low, high)
        return f"{whole}.{self.random.randint(1, 9)}" if high < 100 else str(whole)

    def _unused(self, names: Sequence[str]) -> str:
        while (name := self.random.choice(names)) in self.used:
            pass
        self.used.add(name)
        return name

    def _drawers(self) -> dict[str, Callable[[], object]]:
        rnd, towns, surnames = self.random, self.pool.towns, self.pool.surnames
        words = load_templates()["names"]
        return {
            "person": lambda: Person(rnd.choice(words["first"]), self._unused(surnames)),
            "town": lambda: self._unused(towns),
            "othertown": lambda: self._unused(towns),
            "river": lambda: self._unused(surnames),
            "storm": lambda: self._unused(surnames),
            "company": lambda: f"{self._unused(surnames)} {rnd.choice(words['company_kinds'])}",
            "day": lambda: rnd.choice(words["days"]),
            "month": lambda: rnd.choice(words["months"]),
            "job": lambda: rnd.choice(words["jobs"]),
            "year": lambda: rnd.randint(1952, 2019),
            "count": lambda: rnd.randint(3, 98),
            "small": lambda: rnd.randint(0, 3),
            "percent": lambda: rnd.randint(11, 88),
            "hundreds": lambda: 10 * rnd.randint(11, 98),
            "thousands": lambda: rnd.randint(2, 99),
        }

    def fill(self, template: str, slots: Mapping[str, object]) -> str:
        """``template`` with its placeholders replaced and its first letter in upper case."""
        missing = sorted(placeholders(template) - slots.keys())
        fresh = {name: self.draw(name) for name in missing}
        text = template.format_map({**fresh, **slots})
        return text[0].upper() + text[1:]


def placeholders(template: str) -> set[str]:
    """The names of the placeholders in ``template``."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def choose_headline(random: Random, leads: Sequence[Sequence[str]], place: int, body: str) -> str:
    """The summary's first sentence: often the lead's own, else any that the text supports."""
    if random.random() < HEADLINE_FOLLOWS_LEAD:
        return leads[place][1]
    known = placeholders(leads[place][0] + body)
    return random.choice([headline for _, headline in leads if placeholders(headline) <= known])


def choose_reported(random: Random, present: list[int]) -> list[int]:
    """The one or two facts that the summary reports, more often than not the first ones."""
    size = 2 if random.random() < TWO_FACTS_SHARE else 1
    if random.random() < FIRST_FACTS_SHARE:
        return present[:size]
    return sorted(random.sample(present, size))


def write_story(source: FactSource, story: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The sentences of an article, lead first, and those of its summary."""
    rnd, leads, facts = source.random, story["lead"], story["facts"]
    slots = {name: source.draw(spec) for name, spec in story["slots"].items()}
    place = rnd.randrange(len(leads))
    present = sorted(rnd.sample(range(len(facts)), rnd.randint(2, len(facts))))
    body = [rnd.choice(facts[number]["article"]) for number in present]
    headline = choose_headline(rnd, leads, place, " ".join(body))
    reported = [facts[number]["summary"] for number in choose_reported(rnd, present)]
    colour = [source.fill(t, {}) for t in rnd.sample(story["colour"], rnd.randint(1, 3))]
    details = [source.fill(template, slots) for template in body] + colour
    rnd.shuffle(details)
    lead = source.fill(leads[place][0], slots)
    return [lead, *details], [source.fill(text, slots) for text in (headline, *reported)]


def add_background(source: FactSource, sentences: list[str]) -> list[str]:
    """``sentences`` with background mixed in until the article has the length drawn for it."""
    rnd = source.random
    templates = rnd.sample(load_templates()["background"], k=len(load_templates()["background"]))
    target = rnd.randint(90, 195)
    result = list(sentences)
    if rnd.random() < 0.25:
        result.insert(0, source.fill(templates.pop(), {}))
    while sum(map(len, map(str.split, result))) < target:
        result.insert(rnd.randint(2, len(result)), source.fill(templates.pop(), {}))
    if rnd.random() < LONG_ARTICLE_SHARE:
        preamble = rnd.choices(templates, k=LONG_ARTICLE_PREAMBLE)
        result = [source.fill(text, {}) for text in preamble] + result
    return result


def write_article(number: int, seed: int = 0) -> Article:
    """Article ``number`` of the corpus grown from ``seed``."""
    identifier = article_id(number)
    source = FactSource(Random(f"{seed}/{number}"), name_pool(split_of(identifier)))
    stories = load_templates()["story"]
    sentences, summary = write_story(source, stories[source.random.choice(sorted(stories))])
    text = " ".join(add_background(source, sentences))
    return Article(article=text, highlights="\n".join(summary), id=identifier)


def numbers_of(split: Split) -> Iterator[int]:
    """The numbers of the articles of ``split``, without end."""
    return (number for number in count() if split_of(article_id(number)) == split)


def main() -> None:
    """Write one split as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    articles = [write_article(n, args.seed) for n in islice(numbers_of(args.split), args.count)]
    lines = [json.dumps(asdict(article), ensure_ascii=False) + "\n" for article in articles]
    args.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
