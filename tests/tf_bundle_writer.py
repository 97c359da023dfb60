"""Writes TensorFlow checkpoint bundles, so that reading them is tested without TensorFlow."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from porttool.sources.crc32c import crc32c, masked
from porttool.sources.tf_bundle import DTYPES, MAGIC

NUMBERS = {name: number for number, name in DTYPES.items()}


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes) -> bytes:
    """A protocol buffer's field; zero is left out, as TensorFlow does."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    out, restarts, previous = bytearray(), [], b""
    for index, (key, value) in enumerate(entries):
        shared = 0
        if index % 16:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(entries: list[tuple[bytes, bytes]], block_size: int) -> bytes:
    data = bytearray()

    def add(content: list[tuple[bytes, bytes]]) -> bytes:
        raw = block(content) + b"\0"
        handle = varint(len(data)) + varint(len(raw) - 1)
        data.extend(raw + struct.pack("<I", masked(crc32c(raw))))
        return handle

    index = [
        (entries[i : i + block_size][-1][0], add(entries[i : i + block_size]))
        for i in range(0, len(entries), block_size)
    ]
    handles = add([]) + add(index)
    return bytes(data) + handles.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray], block_size: int = 7) -> None:
    """Write `<prefix>.index` and one data file."""
    data = bytearray()
    entries = [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        raw = array.tobytes()
        shape = b"".join(field(2, field(1, size)) for size in array.shape)
        entry = field(1, NUMBERS[str(array.dtype)]) + field(2, shape)
        entry += field(4, len(data)) + field(5, len(raw))
        entry += varint(6 << 3 | 5) + struct.pack("<I", masked(crc32c(raw)))
        entries.append((name.encode(), entry))
        data += raw
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries, block_size))
