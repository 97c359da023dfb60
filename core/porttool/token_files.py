"""Token ids as files: CSV with one prompt a row, NPY, and completions back to both."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.errors import UsageError
from porttool.sources import npy_file
from porttool.standing import whole_file

if TYPE_CHECKING:
    from porttool.generate import Completion


LENGTHS = ".lengths.npy"
"""Suffix of the file with the true lengths of an array's rows."""


def read_tokens(path: Path) -> list[list[int]]:
    """Read prompts from .csv (one a line, ids separated by commas) or .npy (2-D integers).

    Rows of an NPY array are as long as the array is wide; for prompts of several lengths use CSV.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    rows = read_npy(path) if path.suffix == ".npy" else read_csv(path)
    if not rows:
        raise UsageError(f"{path}: there is no prompt in it")
    return rows


def read_csv(path: Path) -> list[list[int]]:
    """Read one prompt a line; a value that is no integer is named with its line.

    Empty values end a row that is shorter than others, as spreadsheets write it.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            rows = [[int(value) for value in filled(row)] for row in reader]
        except (ValueError, csv.Error) as error:
            raise UsageError(
                f"{path}, line {reader.line_num}: should be token ids, separated by commas "
                f"({error!s:.200})"
            ) from error
    return [row for row in rows if row]


def filled(row: list[str]) -> list[str]:
    """Return a row without the empty values at its end."""
    while row and not row[-1].strip():
        row = row[:-1]
    return row


def read_npy(path: Path) -> list[list[int]]:
    """Read a one- or two-dimensional integer array."""
    import numpy as np

    array = npy_file.read_npy(path)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise UsageError(f"{path}: should be a 2-D array of integers, is {array.dtype}, "
                         f"{array.ndim}-D")  # fmt: skip
    rows: list[list[int]] = np.atleast_2d(array).tolist()
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[int]]) -> None:
    """Write one row of ids a sequence."""
    with whole_file(path) as place, place.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_npy(path: Path, rows: Sequence[Sequence[int]], pad: int) -> None:
    """Write int32 [n, longest], padded; `<name>.lengths.npy` beside it holds the true lengths."""
    import numpy as np

    lengths = [len(row) for row in rows]
    array = np.full((len(rows), max(lengths)), pad, dtype=np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    save_array(path, array)
    save_array(path.with_suffix(LENGTHS), np.array(lengths, dtype=np.int32))


def save_array(path: Path, array: Any) -> None:
    """Write an array under exactly this name, to which `np.save` would add an ending."""
    import numpy as np

    with whole_file(path) as place, place.open("wb") as file:
        np.save(file, array)


def write_logits(path: Path, completions: Sequence[Completion]) -> None:
    """Write float32 [n, most new tokens, vocab_size]; NaN where a row has fewer tokens."""
    import numpy as np

    found = [c.logits for c in completions]
    shapes = [tuple(logits.shape) for logits in found if logits is not None]
    if not shapes:
        raise UsageError(f"{path}: no completion has a token, so there are no logits to write")
    out = np.full((len(found), max(s[0] for s in shapes), shapes[0][1]), np.nan, dtype=np.float32)
    for i, logits in enumerate(found):
        if logits is not None:
            out[i, : len(logits)] = logits.numpy()
    save_array(path, out)


def as_record(prompt: Sequence[int], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return a prompt and its completions as one JSON object."""
    return {
        "prompt_tokens": list(prompt),
        "completions": [
            {
                "tokens": list(c.tokens),
                "finish": c.finish,
                **({} if c.text is None else {"text": c.text}),
                **({} if c.logprobs is None else {"logprobs": [*map(finite, c.logprobs)]}),
                **({} if c.score is None else {"score": finite(c.score)}),
            }
            for c in completions
        ],
    }


def finite(value: float) -> float | None:
    """Return a number, or None for one that JSON has no word for."""
    return value if math.isfinite(value) else None


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    with whole_file(path) as place:
        text = "".join(json.dumps(record) + "\n" for record in records)
        place.write_text(text, encoding="utf-8")
