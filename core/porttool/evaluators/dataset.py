"""Articles with human summaries: cnn_dailymail from the hub, or local files with its columns."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from porttool.errors import SourceError, UsageError, importing, require_extra
from porttool.evaluator import write_whole
from porttool.evaluators.results import ArticleRecord
from porttool.weights import listing

GZIP = b"\x1f\x8b"
"""How a gzipped file begins, as HumanEval's is published."""

PIN = re.compile(r"(?P<id>.+?)(?:\s+(?P<sha256>[0-9a-f]{64}))?")
"""A line of a list of articles; an id may hold spaces."""


@dataclass(frozen=True)
class Article:
    """A text and the summary that a human wrote of it."""

    id: str
    text: str
    highlights: str

    @property
    def record(self) -> ArticleRecord:
        """The id, and a hash of the text and the highlights."""
        content = json.dumps([self.text, self.highlights], ensure_ascii=False).encode()
        return ArticleRecord(id=self.id, sha256=hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class DatasetRequest:
    """Which articles are wanted, from where and in which order.

    `name` is a hub id or a local path: a .jsonl or .parquet file, a folder of parquet files, or
    one written by `datasets.save_to_disk`. `seed` shuffles as `datasets` does; `ids` is a file of
    lines `id` or `id sha256`, and replaces shuffling.
    """

    name: str = "abisee/cnn_dailymail"
    config: str = "3.0.0"
    revision: str | None = None
    split: str = "test"
    columns: tuple[str, str, str] = ("id", "article", "highlights")
    max_articles: int = 200
    seed: int | None = None
    ids: Path | None = None


class Rows(Protocol):
    """A table: its length, and a row by number."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row."""


def load_articles(request: DatasetRequest) -> list[Article]:
    """Return the wanted articles; UsageError if there are none, not those pinned, or one twice."""
    path = Path(request.name)
    if path.exists():
        require_local(request)
        rows = open_local(path, request.split)
    elif path.suffix in (".jsonl", ".json", ".parquet") or not may_be_hub_id(request.name):
        raise UsageError(f"{path}: there is no such file or folder of articles")
    else:
        rows = open_hub(request)
    if not len(rows):
        raise UsageError(f"{request.name}: there are no articles in it")
    if request.ids is not None:
        return distinct(str(request.ids), pinned_articles(rows, request))
    order: Iterable[int] = range(len(rows))
    if request.seed is not None:
        order = np.random.default_rng(request.seed).permutation(len(rows)).tolist()
    chosen = list(order)[: request.max_articles]
    return distinct(request.name, [make_article(rows[i], request) for i in chosen])


def distinct(where: str, articles: list[Article]) -> list[Article]:
    """Return articles of which none is there twice, id and text; else UsageError."""
    times = Counter((a.record.id, a.record.sha256) for a in articles)
    if twice := [name for (name, _), n in times.items() if n > 1]:
        raise UsageError(
            f"{where}: {len(twice)} entries are there more than once, and would count as often: "
            f"{listing(twice)}; leave the repetitions out"
        )
    return articles


def require_local(request: DatasetRequest) -> None:
    """Refuse what only a data set of the hub has, where a local one is read."""
    usual = DatasetRequest()
    given = [("dataset_config", request.config != usual.config), ("revision", request.revision)]
    path = Path(request.name)
    one = path.is_file() or (is_saved(path) and not is_saved(path / request.split))
    given += [("split", one and request.split != usual.split)]
    if idle := ", ".join(name for name, asked in given if asked):
        raise UsageError(f"{request.name} is local: {idle} would change nothing; leave that out")


def is_saved(path: Path) -> bool:
    """Whether datasets.save_to_disk wrote a folder, of one split."""
    return (path / "dataset_info.json").is_file()


def may_be_hub_id(name: str) -> bool:
    """Whether a name can be a hub's: `name`, or `owner/name`."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def make_article(row: dict[str, Any], request: DatasetRequest) -> Article:
    """Make an article of a row; a value that is no text, or an empty one, is a UsageError."""
    require_columns(request.name, row, request.columns)
    id_column, text_column, highlights_column = request.columns
    values = (id_of(row, id_column), row[text_column], row[highlights_column])
    if not all(isinstance(v, str) and v.strip() for v in values):
        raise UsageError(
            f"{request.name}: the article {values[0]!r} has an empty {text_column!r} or "
            f"{highlights_column!r}; leave it out"
        )
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{request.name}: the article {values[0]!r} holds half a character: {error}; correct it"
        ) from error
    return Article(*values)


def id_of(row: dict[str, Any], column: str) -> str:
    """Return a row's id on one line, as a list of ids has it."""
    return " ".join(str(row.get(column)).split())


def require_columns(name: str, row: dict[str, Any], wanted: Sequence[str]) -> None:
    """Refuse a table without the columns that were asked for."""
    missing = [c for c in wanted if c not in row]
    if missing:
        raise UsageError(
            f"{name}: a row has no column {listing(missing)}; its columns are "
            f"{listing(list(row))}; name them with the options id_column, "
            "article_column and highlights_column"
        )


def pinned_articles(rows: Rows, request: DatasetRequest) -> list[Article]:
    """Return the articles of a list of ids, in its order, and hold them to its hashes."""
    pins = read_pins(request.ids or Path())[: request.max_articles]
    require_columns(request.name, rows[0], request.columns)
    where: dict[str, list[int]] = {}
    for i in range(len(rows)):
        where.setdefault(id_of(rows[i], request.columns[0]), []).append(i)
    missing = [pin for pin, _ in pins if pin not in where]
    if missing:
        raise UsageError(
            f"{request.name}: {len(missing)} of {len(pins)} articles in {request.ids} are not "
            f"there: {listing(missing)}"
        )
    return [pinned_article(rows, where[pin], sha256, request) for pin, sha256 in pins]


def pinned_article(
    rows: Rows, places: Sequence[int], sha256: str, request: DatasetRequest
) -> Article:
    """Return the first row of one id, or the one that has the hash if that is pinned too."""
    found = [make_article(rows[i], request) for i in places]
    article = next((a for a in found if sha256 in ("", a.record.sha256)), None)
    if article is None:
        raise UsageError(
            f"{request.name}: the article {found[0].id} is not the one pinned in {request.ids}: "
            f"its hash is {found[0].record.sha256}, not {sha256}; the data set has changed"
        )
    return article


def read_pins(path: Path) -> list[tuple[str, str]]:
    """Read lines `id` or `id sha256`; UsageError for a missing or empty file."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file of article ids")
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error}") from error
    pins = [PIN.fullmatch(line.strip()) for line in lines]
    found = [(pin["id"], pin["sha256"] or "") for pin in pins if pin]
    if not found:
        raise UsageError(f"{path}: there are no article ids in it")
    return found


def write_pins(path: Path, articles: Sequence[Article]) -> None:
    """Write a list that pins exactly these articles."""
    records = [a.record for a in articles]
    write_whole(path, "".join(f"{r.id} {r.sha256}\n" for r in records))


def open_local(path: Path, split: str) -> Rows:
    """Open a file or a folder by what it holds."""
    if path.is_file():
        return read_parquet([path]) if path.suffix == ".parquet" else read_json_lines(path)
    for folder in (path / split, path):
        if is_saved(folder):
            return open_saved(folder)
    files = sorted(path.rglob("*.parquet"))
    word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W\d_])")  # "test" is none in "latest"
    of_split = [f for f in files if word.search(f.relative_to(path).as_posix())]
    if not files:
        raise UsageError(
            f"{path}: there are no articles here; name a .jsonl or .parquet file, a folder of "
            "parquet files or one that datasets.save_to_disk wrote"
        )
    if not of_split and split != DatasetRequest.split:
        raise UsageError(
            f"{path}: no parquet file or folder in it is named after the split {split!r}"
        )
    return read_parquet(of_split or files)


def read_json_lines(path: Path) -> Rows:
    """Read one JSON object a line; UsageError naming the line that is none, or a packed file."""
    rows = []
    content = path.read_bytes()
    if content.startswith(GZIP):
        raise UsageError(f"{path}: is gzipped; unpack it first: gunzip --keep {path}")
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: damaged JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: should be a JSON object")
        rows.append(row)
    return rows


def read_parquet(files: Sequence[Path]) -> Rows:
    """Read parquet files, one after the other."""
    with importing("eval", "pyarrow"):
        from pyarrow import parquet  # type: ignore[import-untyped]
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own, and text that is not UTF-8
            raise UsageError(f"{file}: cannot be read as parquet: {error}") from error
    return rows


def open_saved(path: Path) -> Rows:
    """Open what datasets.save_to_disk wrote."""
    with importing("eval", "datasets"):
        from datasets import load_from_disk
    try:
        rows: Rows = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: damaged, datasets cannot load it: {error}") from error
    return rows


def open_hub(request: DatasetRequest) -> Rows:
    """Open a data set of the hub, or of its cache when HF_HUB_OFFLINE is set.

    Raises SourceError where it cannot be fetched.
    """
    require_extra("eval", "datasets")
    with importing("eval", "datasets"):
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    try:
        rows: Rows = load_dataset(
            request.name, request.config, split=request.split, revision=request.revision
        )
    except (DatasetsError, OSError, ValueError) as error:
        raise SourceError(
            f"{request.name}: neither a local path nor a data set that can be fetched now "
            f"({type(error).__name__}: {str(error)[:200]}); name a local .jsonl or .parquet file"
        ) from error
    return rows
