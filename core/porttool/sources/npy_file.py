"""One .npy file of plain numbers, its header checked against the file before anything is read.

The format (NEP 1): a magic number, a version, the header's length, and the header, which is the
text of a Python dictionary: element type, order, shape. Objects, records and texts are refused.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.errors import SourceError
from porttool.sources.safetensors_file import is_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
"""Bytes of a header; numpy's own limit."""
PLAIN = re.compile(r"^[<>|=]?([fiu][1248])$")


def read_npy(path: Path) -> NDArray[Any]:
    """Read an array of numbers in memory of its own, in the machine's byte order.

    Raises SourceError for a missing file, for one that is longer or shorter than its header says,
    and for what is not plain numbers.
    """
    import numpy as np

    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    with path.open("rb") as file:
        try:
            header = read_header(file.read(MAX_HEADER + 12))
            dtype, start = np.dtype(header["descr"]), header["start"]
            wanted = start + math.prod(header["shape"]) * dtype.itemsize
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise SourceError(f"{path}: not an array of numbers: {error}") from error
        if path.stat().st_size != wanted:
            raise SourceError(
                f"{path}: not an array of numbers: {list(header['shape'])} in {dtype} need "
                f"{wanted} bytes, the file has {path.stat().st_size}"
            )
        file.seek(start)
        flat = np.frombuffer(file.read(), dtype).astype(dtype.newbyteorder("="))
    order: Any = "F" if header["fortran_order"] else "C"
    return flat.reshape(header["shape"], order=order)


def read_header(data: bytes) -> dict[str, Any]:
    """Return a header's fields and where the data starts; ValueError for an impossible one."""
    if not data.startswith(MAGIC) or data[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("no .npy file, or of a version that is not known")
    width = 2 if data[6] == 1 else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    if length > MAX_HEADER or len(data) < start:
        raise ValueError(f"a header of {length} bytes")
    text = data[8 + width : start].decode("latin-1")
    header = ast.literal_eval(text.strip(" \n"))
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("the header lacks a field, or has others")
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str) or not PLAIN.match(descr):
        raise ValueError(f"elements of type {descr!r:.80}; objects are never read")
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(map(is_size, shape)):
        raise ValueError(f"a shape {shape!r:.80}")
    if not isinstance(header["fortran_order"], bool):
        raise ValueError("an order that is none")
    return {**header, "start": start}
