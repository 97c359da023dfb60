"""JSON files of strangers: of a sane size, an object, each key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from porttool.errors import SourceError
from porttool.sources.safetensors_file import unique_pairs

MAX_JSON = 64_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; SourceError if it is missing, huge or damaged."""
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing")
    if path.stat().st_size > MAX_JSON:
        raise SourceError(f"{path}: {path.stat().st_size} bytes is no config")
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: damaged JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path}: should hold a JSON object")
    return values
