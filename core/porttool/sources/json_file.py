"""JSON files of strangers: of a sane size, an object, each key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from porttool.errors import SourceError
from porttool.sources.places import is_present, refuse_pointer

MAX_JSON = 64_000_000
MAX_DIGITS = 100
"""Digits of an integer that means anything; longer ones are no floats, and may not be printed."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; SourceError if it is missing, huge or damaged."""
    if not is_present(path):
        raise SourceError(f"{path}: the file is missing")
    if path.stat().st_size > MAX_JSON:
        raise SourceError(f"{path}: {path.stat().st_size} bytes is no config")
    try:
        values = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise SourceError(f"{path}: damaged JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path}: should hold a JSON object")
    return values


def parse_json(data: str | bytes) -> Any:
    """Parse JSON with each key once and no number that cannot be one; ValueError otherwise."""
    return json.loads(data, object_pairs_hook=unique_pairs, parse_int=parse_integer)


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; ValueError for a name that is there twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def parse_integer(digits: str) -> int:
    """Return an integer; ValueError for one of more than MAX_DIGITS digits."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
