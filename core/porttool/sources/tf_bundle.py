"""TensorFlow's checkpoint bundle (`<prefix>.index`, `<prefix>.data-00000-of-00001`), without it.

The index is a LevelDB table: blocks of prefix-compressed keys, each followed by a type byte and a
masked CRC-32C, and a footer that says where the index of blocks is. The values are protocol
buffers: a header under the empty key, and for each tensor its type, shape, place and CRC. Every
CRC is checked, a tensor's when it is read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.config import ITEMSIZE
from porttool.errors import SourceError
from porttool.sources.crc32c import crc32c, masked
from porttool.sources.safetensors_file import read_exactly
from porttool.weights import TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

    Fields = dict[int, list[int | bytes]]

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
MAX_INDEX = 1 << 28
LATEST = re.compile(rb'^model_checkpoint_path: "([^"\n]+)"', re.MULTILINE)
DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64",
    10: "bool", 14: "bfloat16", 19: "float16",
}  # fmt: skip
"""TensorFlow's type numbers → torch names. Others (strings) cannot be read."""


@dataclass(frozen=True)
class Entry:
    """What the index says of a tensor."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are, and their masked CRC."""

    file: Path
    offset: int
    crc: int


class TensorBundle(TensorSource):
    """The tensors of one checkpoint, given by its prefix (`…/model.ckpt`)."""

    def __init__(self, prefix: Path) -> None:
        self._infos: dict[str, TensorInfo] = {}
        self._places: dict[str, Place] = {}
        index = prefix.with_name(f"{prefix.name}.index")
        try:
            entries = dict(read_table(index))
            header = parse_message(entries.pop(b""))
            if number(header, 2) != 0:
                raise SourceError(f"{index}: the tensors are stored big-endian")
            for key, value in entries.items():
                self._add(prefix, key.decode(), parse_entry(value), number(header, 1))
        except (IndexError, KeyError, ValueError, struct.error) as error:
            raise SourceError(f"{index}: the index is damaged: {error}; fetch it again") from error

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's name, shape, type and size."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read one tensor and check it against its CRC."""
        import torch

        info, place = self._infos[name], self._places[name]
        if not hasattr(torch, info.dtype):
            raise SourceError(f"{place.file}: {name} is {info.dtype}, which holds no weights")
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        read_exactly(place.file, buffer, place.offset)
        if masked(crc32c(buffer.numpy())) != place.crc:
            raise SourceError(
                f"{place.file}: the checksum of {name} is wrong: damaged, fetch it again"
            )
        return buffer.view(getattr(torch, info.dtype)).view(info.shape)

    def _add(self, prefix: Path, name: str, entry: Entry, n_shards: int) -> None:
        dtype = DTYPES.get(entry.dtype, "of another type")
        if dtype in ITEMSIZE and math.prod(entry.shape) * ITEMSIZE[dtype] != entry.size:
            raise ValueError(f"{name} of shape {entry.shape} cannot have {entry.size} bytes")
        file = prefix.with_name(f"{prefix.name}.data-{entry.shard:05}-of-{n_shards:05}")
        if not file.is_file():
            raise SourceError(f"{file}: the file is missing; the index says that {name} is in it")
        if entry.offset + entry.size > file.stat().st_size:
            raise SourceError(f"{file}: ends before {name} does; it is truncated, fetch it again")
        self._infos[name] = TensorInfo(entry.shape, dtype, entry.size, file.name)
        self._places[name] = Place(file, entry.offset, entry.crc)


def find_bundle(source: Path) -> Path:
    """Return the prefix of the checkpoint in a folder, or of an `.index` file.

    In a folder the file `checkpoint` names it; without that there must be one index.
    """
    if source.suffix == ".index":
        return source.with_suffix("")
    note = source / "checkpoint"
    if note.is_file():
        with note.open("rb") as file:
            match = LATEST.search(file.read(100_000))
        name = Path(match[1].decode(errors="replace")).name if match else ""
        if not name or not (source / f"{name}.index").is_file():
            raise SourceError(f"{note}: names no checkpoint that is in this folder: {name!r}")
        return source / name
    found = sorted(source.glob("*.index"))
    if len(found) != 1:
        raise SourceError(
            f"{source}: {len(found)} TensorFlow checkpoints (.index files) here; "
            "give the path of one .index file"
        )
    return found[0].with_suffix("")


def read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a LevelDB table."""
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing")
    if not FOOTER <= path.stat().st_size <= MAX_INDEX:
        raise SourceError(f"{path}: {path.stat().st_size} bytes cannot be a checkpoint's index")
    data = path.read_bytes()
    if struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise SourceError(f"{path}: not the index of a TensorFlow checkpoint, or truncated")
    (*meta, offset, size), end = take_varints(data[-FOOTER:], 4)
    if any(data[end - FOOTER : -8]) or any(read_block(data, *meta)):
        raise ValueError("the footer is not TensorFlow's")
    for _, handle in read_block(data, offset, size):
        (offset, size), _ = take_varints(handle, 2)
        yield from read_block(data, offset, size)


def read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield one block's keys and values after checking its CRC; ValueError if it is damaged."""
    end = offset + size
    if masked(crc32c(data[offset : end + 1])) != struct.unpack_from("<I", data, end + 1)[0]:
        raise ValueError("a checksum is wrong")
    if data[end] != 0:
        raise ValueError("a block is compressed, as TensorFlow never does")
    block = data[offset:end]
    stop = size - 4 - 4 * int(struct.unpack("<I", block[-4:])[0])
    at, key = 0, b""
    while at < stop:
        (shared, rest, length), at = take_varints(block, 3, at)
        key = key[:shared] + block[at : at + rest]
        at += rest
        yield key, block[at : at + length]
        at += length


def take_varints(data: bytes, count: int, at: int = 0) -> tuple[list[int], int]:
    """Read base-128 numbers, lowest part first; return them and where they end."""
    values = []
    for _ in range(count):
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 63:
                raise ValueError("a number is too long")
        values.append(value)
    return values, at


def parse_message(data: bytes) -> Fields:
    """Split a protocol buffer into its fields: number → values, in order."""
    fields: Fields = {}
    at = 0
    while at < len(data):
        (tag,), at = take_varints(data, 1, at)
        value: int | bytes
        match tag & 7:
            case 0:
                (value,), at = take_varints(data, 1, at)
            case 2:
                (length,), at = take_varints(data, 1, at)
                if at + length > len(data):
                    raise ValueError("a field is cut off")
                value, at = data[at : at + length], at + length
            case 5:
                value, at = struct.unpack_from("<I", data, at)[0], at + 4
            case kind:
                raise ValueError(f"a field of wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def parse_entry(data: bytes) -> Entry:
    """Read a tensor's entry; ValueError if it is damaged or in pieces."""
    fields = parse_message(data)
    if 7 in fields:
        raise ValueError("a tensor is stored in slices, which porttool cannot read")
    shape = parse_message(message(fields, 2))
    dims = tuple(
        number(parse_message(dim), 1) for dim in shape.get(2, []) if isinstance(dim, bytes)
    )
    return Entry(number(fields, 1), dims, *(number(fields, key) for key in (3, 4, 5, 6)))


def number(fields: Fields, key: int) -> int:
    """Return a numeric field; 0 where it is left out, as the format has it."""
    value = fields.get(key, [0])[0]
    if not isinstance(value, int) or value >= 1 << 62:
        raise ValueError(f"field {key} is no possible number")
    return value


def message(fields: Fields, key: int) -> bytes:
    """Return a nested message; an empty one where it is left out."""
    value = fields.get(key, [b""])[0]
    if not isinstance(value, bytes):
        raise ValueError(f"field {key} is a number")
    return value
