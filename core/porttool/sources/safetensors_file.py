"""One .safetensors file, its header checked against the file before anything is read.

The format: 8 bytes little-endian header length, a JSON header of name → dtype, shape and data
offsets, then the data. Read by pread into memory of its own, so that resident memory stays
bounded; a memory map would count every page that was touched.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.config import ITEMSIZE
from porttool.errors import SourceError
from porttool.folder import FileRecord, Stamp
from porttool.memory import as_bytes, empty
from porttool.sources.json_file import parse_json
from porttool.sources.places import refuse_pointer
from porttool.weights import TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
DTYPES = {code: name for name, code in CODES.items()}
MAX_HEADER = 100_000_000
"""The format's own limit on the header, in bytes."""


class SafetensorsFile(TensorSource):
    """The tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}  # in the file, ascending
        self._infos: dict[str, TensorInfo] = {}
        self.stamp = stamp_of(path)
        header, head = read_header(path)
        self._digest = hashlib.sha256(head)
        self._index(header, len(head))

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's name, shape, type and size."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.load_rows(name, 0, None)

    def load_rows(self, name: str, first: int, last: int | None) -> Tensor:
        """Read rows first to last (exclusive) of a tensor's leading dimension."""
        import torch

        info = self._infos[name]
        rows = info.shape[0] if info.shape else 1
        row_bytes = info.nbytes // max(rows, 1)
        last = rows if last is None else last
        buffer = empty([(last - first) * row_bytes], torch.uint8)
        self._require_unchanged()
        read_exactly(self.path, buffer, self._offsets[name] + first * row_bytes)
        self._require_unchanged()
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        return buffer.view(getattr(torch, info.dtype)).view(shape)

    def read_through(
        self, room: Callable[[str, int], Tensor], filled: Callable[[str, int, Tensor], None]
    ) -> FileRecord:
        """Read all data once, in order; return the size and SHA-256 of the file that was read.

        The header is hashed as it was when it said where the data lies: a file that was put in
        another's place since is not taken for either.
        room(name, begin): a uint8 tensor on the CPU for a tensor's bytes from `begin` on, of one
        byte or more and no longer than the tensor goes on; filled(name, begin, piece) is told when
        they are in it.
        """
        digest = self._digest.copy()
        for name, offset in self._offsets.items():
            begin = 0
            while begin < self._infos[name].nbytes:
                piece = room(name, begin)
                read_exactly(self.path, piece, offset + begin)
                digest.update(as_bytes(piece))
                filled(name, begin, piece)
                begin += len(piece)
        return FileRecord(bytes=self._size, sha256=digest.hexdigest())

    def _require_unchanged(self) -> None:
        if stamp_of(self.path) != self.stamp:
            raise SourceError(f"{self.path}: changed while it was read; run the command again")

    def _index(self, header: dict[str, Any], start: int) -> None:
        size = self._size = self.path.stat().st_size
        expected = 0
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: _begin(item[1])):
            info, begin = check_entry(self.path, name, entry)
            if begin != expected:
                raise SourceError(f"{self.path}: the data of {name} overlaps or leaves a gap")
            expected = begin + info.nbytes
            self._infos[name] = info
            self._offsets[name] = start + begin
        if start + expected != size:
            raise SourceError(
                f"{self.path}: the header describes {start + expected} bytes, the file has {size}; "
                "it is truncated or damaged, fetch it again"
            )
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise SourceError(f"{self.path}: the header's __metadata__ is not a table of strings")


def stamp_of(path: Path) -> Stamp:
    """Stamp a file that must be there."""
    try:
        return Stamp.of(path.stat())
    except FileNotFoundError as error:
        raise SourceError(f"{path}: the file is missing") from error


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and is_size(offsets[0]) else -1


def is_size(value: object) -> bool:
    """Tell a possible dimension or place in a file."""
    return type(value) is int and 0 <= value < 1 << 62


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the JSON header and all bytes before the data; a lying length is a SourceError."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
                refuse_pointer(path)
                raise SourceError(f"{path}: not a safetensors file, or its header length lies")
            text = file.read(length)
            header = parse_json(text)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: the file is missing") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the safetensors header is not an object")
    return header, prefix + text


def check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    """Validate one header entry; return what it says and where its data begins."""
    code = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(code, str) and code not in DTYPES:
        raise SourceError(
            f"{path}: {name} is of type {code!r:.40}, which porttool does not read; fetch or save "
            "the model unquantised, as F32, F16 or BF16"
        )
    try:
        dtype = DTYPES[entry["dtype"]]
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: the header entry of {name} is malformed") from error
    if not (isinstance(shape, list) and all(map(is_size, [*shape, begin, end]))):
        raise SourceError(f"{path}: the header entry of {name} has impossible numbers")
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise SourceError(
            f"{path}: {name} of shape {shape} needs {nbytes} bytes, the header gives {end - begin}"
        )
    return TensorInfo(tuple(shape), dtype, nbytes, path.name), begin


def read_exactly(path: Path, buffer: Tensor, offset: int) -> None:
    """Fill a uint8 tensor from a file; a short file is a SourceError."""
    view = as_bytes(buffer)
    done = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < len(view):
            n = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
            if n == 0:
                raise SourceError(f"{path}: ended early; it is truncated or changed while read")
            done += n
    finally:
        os.close(descriptor)
