"""The shipped articles are what the shipped generator writes, and no name crosses the splits."""

import json
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations, islice
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo"


@pytest.fixture(scope="module")
def news():
    spec = spec_from_file_location("demo_generate_news", DEMO / "generate_news.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_generator_writes_the_shipped_articles(news):
    shipped = (DEMO / "articles.jsonl").read_text(encoding="utf-8").splitlines()
    numbers = islice(news.numbers_of("test"), len(shipped))
    assert len(shipped) == 250
    assert [asdict(news.write_article(n)) for n in numbers] == [json.loads(x) for x in shipped]


def test_another_seed_writes_other_articles(news):
    number = next(news.numbers_of("test"))
    assert news.write_article(number, 0).article != news.write_article(number, 1).article


def test_no_name_is_in_two_splits(news):
    pools = [news.name_pool(split) for split in ("train", "validation", "test")]
    for first, second in combinations(pools, 2):
        assert not set(first.surnames) & set(second.surnames)
        assert not set(first.towns) & set(second.towns)


def test_every_reported_fact_can_be_read_from_its_article(news):
    for story in news.load_templates()["story"].values():
        for lead, headline in story["lead"]:
            assert news.placeholders(headline) <= news.placeholders(lead)
        for fact in story["facts"]:
            for sentence in fact["article"]:
                assert news.placeholders(fact["summary"]) <= news.placeholders(sentence)
