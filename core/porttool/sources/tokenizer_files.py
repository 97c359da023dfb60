"""What a tokenizer's JSON files say of ids, without the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from porttool.errors import SourceError


def check_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> None:
    """Refuse a tokenizer with an id that the embedding has no row for, naming file and id."""
    for name, data in files.items():
        ids = list(ids_of(name, data))
        if ids and max(ids) >= vocab_size:
            raise SourceError(
                f"{name}: the tokenizer has the id {max(ids)}, but the embedding only {vocab_size} "
                "rows; it belongs to another model, or the vocabulary's size is wrong"
            )


def ids_of(name: str, data: bytes) -> Iterable[int]:
    """Return the ids that a file gives; none for files that give none."""
    if name not in ("vocab.json", "added_tokens.json", "tokenizer.json"):
        return []
    try:
        values: Any = json.loads(data)
        if name != "tokenizer.json":
            return [int(i) for i in values.values()]
        added = [int(token["id"]) for token in values.get("added_tokens") or []]
        vocabulary = values["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram model lists its pieces
            return [*added, len(vocabulary) - 1]
        return [*added, *map(int, vocabulary.values())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{name}: the tokenizer's file is damaged: {error}") from error
