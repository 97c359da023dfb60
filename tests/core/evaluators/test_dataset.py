"""Articles from every place, in a known order, pinned by hash; what is wrong is named."""

from __future__ import annotations

import gzip
import json
from unittest.mock import Mock

import pytest

from porttool.errors import SourceError, UsageError
from porttool.evaluators.dataset import Article, DatasetRequest, load_articles, write_pins


def request(path, **changes):
    return DatasetRequest(name=str(path), **changes)


def ids(found):
    return [a.id for a in found]


def test_json_lines_in_order(articles, rows):
    found = load_articles(request(articles, max_articles=3))
    assert found == [Article(r["id"], r["article"], r["highlights"]) for r in rows[:3]]


def test_parquet_file_and_folder_and_saved_folder_agree(articles, rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "parts").mkdir()
    table.select(range(8)).to_parquet(tmp_path / "parts" / "test-00000-of-00002.parquet")
    table.select(range(8, 14)).to_parquet(tmp_path / "parts" / "test-00001-of-00002.parquet")
    table.select([0]).to_parquet(tmp_path / "parts" / "train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "splits")
    wanted = load_articles(request(articles))
    one = tmp_path / "parts" / "test-00000-of-00002.parquet"
    assert load_articles(request(one)) == wanted[:8]
    with pytest.raises(UsageError, match="saved is local: split would change nothing"):
        load_articles(DatasetRequest(name=str(tmp_path / "saved"), split="validation"))
    for folder in ("parts", "saved", "splits"):
        assert load_articles(request(tmp_path / folder)) == wanted


def test_an_article_counts_once(articles, rows, tmp_path):
    """Three articles pinned four times are three, however many are needed for a verdict."""
    pins = tmp_path / "pins.txt"
    pins.write_text("article-03\narticle-05\n" * 2)
    with pytest.raises(UsageError, match=r"pins\.txt: 2 entries .*: article-03, article-05; leave"):
        load_articles(request(articles, ids=pins))
    file = tmp_path / "twice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], rows[1]]))
    with pytest.raises(UsageError, match=r"twice\.jsonl: 1 entries .*: article-01; leave"):
        load_articles(request(file))
    assert len(load_articles(request(file, max_articles=3))) == 3
    file.write_text("".join(json.dumps(row | {"id": "a"}) + "\n" for row in rows))
    assert len(load_articles(request(file))) == len(rows)


def test_a_gzipped_file_is_called_that(tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UsageError, match=r"gz: is gzipped; unpack it first: gunzip --keep .*gz$"):
        load_articles(request(file))


def test_shuffle_is_that_of_datasets(articles, rows):
    datasets = pytest.importorskip("datasets")
    wanted = datasets.Dataset.from_list(rows).shuffle(seed=7)["id"][:5]
    assert ids(load_articles(request(articles, seed=7, max_articles=5))) == list(wanted)


def test_other_column_names(rows, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"key": 5, "text": "A b.", "summary": "A."}) + "\n\n")
    found = load_articles(request(file, columns=("key", "text", "summary")))
    assert found == [Article("5", "A b.", "A.")]


def test_pins_bring_back_the_same_articles_in_their_order(articles, tmp_path):
    chosen = load_articles(request(articles, seed=3, max_articles=4))
    pins = tmp_path / "pins.txt"
    write_pins(pins, chosen)
    assert load_articles(request(articles, ids=pins)) == chosen
    pins.write_text("article-03\narticle-01\n")
    assert ids(load_articles(request(articles, ids=pins))) == ["article-03", "article-01"]


def test_pins_of_any_ids(rows, tmp_path):
    """Ids with white space in them, and several articles of one id or of none."""
    ids = ["a b", "a\nc", " d ", None, None, "a b"]
    file, pins = tmp_path / "odd.jsonl", tmp_path / "pins.txt"
    odd = [{**row, "id": name} for row, name in zip(rows, ids, strict=False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in odd))
    chosen = load_articles(request(file))
    write_pins(pins, chosen)
    assert load_articles(request(file, ids=pins)) == chosen
    pins.write_text("a c\r\n")
    assert [a.text for a in load_articles(request(file, ids=pins))] == [rows[1]["article"]]
    pins.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match=r"pins\.txt: not UTF-8 text"):
        load_articles(request(file, ids=pins))


def test_a_pinned_article_that_changed_is_refused(articles, rows, tmp_path):
    pins, file = tmp_path / "pins.txt", tmp_path / "changed.jsonl"
    write_pins(pins, load_articles(request(articles, max_articles=3)))
    altered = [{**r, "article": r["article"] + "!"} if i == 1 else r for i, r in enumerate(rows)]
    file.write_text("".join(json.dumps(r) + "\n" for r in altered))
    with pytest.raises(UsageError, match=r"article-01 is not the one pinned .* has changed"):
        load_articles(request(file, ids=pins))


def test_a_pinned_article_that_is_missing_is_named(articles, tmp_path):
    pins = tmp_path / "pins.txt"
    pins.write_text("article-03\nstranger\n")
    with pytest.raises(UsageError, match=r"1 of 2 articles in .* are not there: stranger"):
        load_articles(request(articles, ids=pins))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no articles in it"),
        ('{"id": "a", "article": "x"}\n', "no column highlights; its columns are id, article;"),
        ('{"id": "a", "article": "x", "highlights": "y"}\n{"id": ', "line 2: damaged JSON"),
        ("[1, 2]\n", "line 1: should be a JSON object"),
        ('{"id": "a", "article": " ", "highlights": "y"}', "the article 'a' has an empty"),
        ('{"id": "a", "article": "x", "highlights": 5}', "the article 'a' has an empty"),
        (
            '{"id": "a", "article": "x", "highlights": "y"}\n{"id": "b", "article": "x"}\n',
            "a row has no column highlights; its columns are id, article;",
        ),
        ('{"id": "a", "article": "x \\ud800", "highlights": "y"}', "'a' holds half a character"),
        ("[" * 100_000, "line 1: damaged JSON"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    file = tmp_path / "articles.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_articles(request(file))


def test_a_folder_without_articles(tmp_path):
    with pytest.raises(UsageError, match="there are no articles here"):
        load_articles(request(tmp_path))


def test_a_damaged_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UsageError, match=r"test\.parquet: cannot be read as parquet"):
        load_articles(request(tmp_path))


def test_a_parquet_file_whose_text_is_not_utf_8(tmp_path):
    pa = pytest.importorskip("pyarrow")
    wild = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"good"]).buffers())
    table = pa.table({"id": ["a", "b"], "article": wild, "highlights": ["x", "y"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "test.parquet")
    with pytest.raises(UsageError, match=r"test\.parquet: cannot be read as parquet: 'utf-8'"):
        load_articles(request(tmp_path))


@pytest.mark.parametrize("damage", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"])
def test_a_damaged_saved_folder(rows, tmp_path, damage):
    """datasets raises what it happens to run into, and does not say where."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / damage).write_bytes(b"{ no such thing")
    with pytest.raises(UsageError, match="saved: damaged, datasets cannot load it: "):
        load_articles(request(tmp_path / "saved"))


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_pins_that_are_not_there(articles, tmp_path, content):
    pins = tmp_path / "pins.txt"
    if content is not None:
        pins.write_text(content)
    with pytest.raises(UsageError, match="article ids"):
        load_articles(request(articles, ids=pins))


def test_the_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"neither a local path nor .*name a local \.jsonl"):
        load_articles(DatasetRequest(name="nobody/no_such_data"))


@pytest.mark.parametrize("name", ["no.jsonl", "no.parquet", "./folder/no", "/no/such/folder"])
def test_a_missing_path_is_not_sought_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("porttool.evaluators.dataset.open_hub", Mock(side_effect=AssertionError))
    with pytest.raises(UsageError, match="there is no such file or folder of articles"):
        load_articles(DatasetRequest(name=name))


@pytest.mark.parametrize(
    "name", ["test-00000-of-1", "test0", "test_0", "part/test", "test/0", "a-test"]
)
def test_a_split_is_a_word_of_a_file_s_name(tmp_path, rows, name):
    """In a folder called latest, and beside contest, `test` is neither."""
    datasets = pytest.importorskip("datasets")

    folder = tmp_path / "latest"
    for file, kept in ((name, rows[:2]), ("train", rows[2:]), ("contest/train", rows[2:])):
        (folder / f"{file}.parquet").parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(kept).to_parquet(folder / f"{file}.parquet")
    assert len(load_articles(DatasetRequest(name=str(folder)))) == 2


def test_a_split_that_no_file_is_named_after(tmp_path, rows):
    datasets = pytest.importorskip("datasets")

    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert len(load_articles(DatasetRequest(name=str(tmp_path), split="train"))) == len(rows)
    with pytest.raises(UsageError, match="is named after the split 'validation'"):
        load_articles(DatasetRequest(name=str(tmp_path), split="validation"))
