"""What a tokenizer's files say of ids, without the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from porttool.config import InfillTokens, SpecialTokens
from porttool.errors import MissingExtra, SourceError
from porttool.sources.json_file import read_json
from porttool.sources.places import refuse_pointer

END_OF_TEXT = "<|endoftext|>"
MAX_FILE = 1 << 28
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})
"""Files that are a tokenizer together; any others only say something of one."""
NO_TOKENIZER = (
    "the source has no tokenizer (tokenizer.json, vocab.json with merges.txt, or tokenizer.model): "
    "only token ids can be fed"
)


def read_tokenizer(
    paths: Iterable[Path], data: Mapping[str, bytes], vocab_size: int
) -> dict[str, bytes]:
    """Return the tokenizer's files, if they are one; more ids than the embedding are refused."""
    files = {**read_files(paths), **data}
    check_tokenizer(files, vocab_size)
    return files if is_tokenizer(files) else {}


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
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise SourceError(f"{name}: the tokenizer's file is damaged: {error}") from error


def is_tokenizer(names: Iterable[str]) -> bool:
    """Return true if files of these names hold a tokenizer, not only its settings."""
    found = set(names)
    return any(needed <= found for needed in TOKENIZERS)


def read_files(paths: Iterable[Path]) -> dict[str, bytes]:
    """Read files by their names."""
    return {path.name: read_file(path) for path in paths}


def read_file(path: Path) -> bytes:
    """Read a tokenizer's file; one that is missing or far too large is a SourceError."""
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing; it is the tokenizer's")
    refuse_pointer(path)
    if (size := path.stat().st_size) > MAX_FILE:
        raise SourceError(f"{path}: {size} bytes is no tokenizer's file")
    return path.read_bytes()


def renamed_files(folder: Path, names: Mapping[str, str]) -> dict[str, bytes]:
    """Read a tokenizer's files under other names (theirs → ours); none of them may be missing."""
    return {new: read_file(folder / old) for old, new in names.items()}


def special_tokens(files: Mapping[str, bytes]) -> tuple[SpecialTokens, int | None]:
    """Return the ids with a meaning and the number of all ids, None where no tokenizer is.

    Known are a sentencepiece model, which declares its own, and GPT-2's byte pairs.
    """
    if "tokenizer.model" in files:
        return sentencepiece_tokens(files["tokenizer.model"])
    if "vocab.json" not in files:
        return SpecialTokens(), None
    ids = list(ids_of("vocab.json", files["vocab.json"]))
    if not ids or min(ids) < 0:
        raise SourceError("vocab.json: the tokenizer's file is damaged: no ids, or negative ones")
    end = json.loads(files["vocab.json"]).get(END_OF_TEXT)
    eos = () if end is None else (int(end),)
    return SpecialTokens(bos=eos[0] if eos else None, eos=eos), 1 + max(ids)


def sentencepiece_tokens(data: bytes) -> tuple[SpecialTokens, int]:
    """Read the ids that a sentencepiece model itself declares."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingExtra("gpt-next", "sentencepiece") from error
    try:
        model = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise SourceError(f"the tokenizer's sentencepiece model is damaged: {error}") from error
    declared = (model.bos_id(), model.eos_id(), model.pad_id())
    bos, eos, pad = (None if i < 0 else i for i in declared)
    return SpecialTokens(bos=bos, eos=() if eos is None else (eos,), pad=pad), model.vocab_size()


def added_tokens(folder: Path) -> Mapping[str, int]:
    """Return the ids of the tokens that a folder's tokenizer adds to its vocabulary."""
    file = folder / "tokenizer.json"
    try:
        entries: list[Any] = (read_json(file).get("added_tokens") or []) if file.is_file() else []
        found = {str(entry["content"]): int(entry["id"]) for entry in entries}
        file = folder / "added_tokens.json"
        more = read_json(file) if file.is_file() else {}
        return found | {token: int(i) for token, i in more.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{file}: the tokenizer's file is damaged: {error}") from error


def known_spelling(folder: Path, spellings: Iterable[InfillTokens]) -> InfillTokens | None:
    """Return the infilling tokens that a folder's tokenizer knows; None if it knows none."""
    known = added_tokens(folder).keys()
    return next((s for s in spellings if {s.prefix, s.middle, s.suffix} <= known), None)
