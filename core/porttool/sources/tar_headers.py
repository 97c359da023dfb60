"""The headers of a tar archive (POSIX.1-2017 pax, and GNU's long names), one after the other.

Python's own reader takes any header's word: sparse maps of any length, extended headers that nest
until the stack ends, patterns that take hours on a megabyte of digits. Here a header is 512 bytes,
an extended one a few thousand more, and what does not belong into a model's archive is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_MEMBERS = 1 << 14
MAX_EXTENDED = 1 << 15
"""Bytes of an extended header; names and dates are all that belongs there."""

FILES = (b"0", b"\0", b"7")
FOLDER = b"5"
PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK = b"x", b"g", b"L", b"K"


@dataclass(frozen=True)
class Header:
    """One member: where its data begins, in bytes. A folder has none."""

    name: str
    kind: bytes
    offset: int
    size: int

    @property
    def is_file(self) -> bool:
        """True for a regular file."""
        return self.kind in FILES and not self.name.endswith("/")


def read_headers(file: BinaryIO, limit: int) -> Iterator[Header]:
    """Yield the regular files and folders of an archive of at most `limit` bytes.

    Raises ValueError for what is no archive, cut off, too large, or has other kinds of members.
    """
    at = n_members = 0
    pax: dict[str, str] = {}
    while (header := parse_header(read_block(file, at), at)) is not None:
        if header.kind in (PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK):
            pax.update(read_extended(file, header))
        else:
            header = complete(header, pax, limit)
            pax = {}
            yield header
        n_members += 1
        if n_members > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} members")
        at = header.offset + -(-header.size // BLOCK) * BLOCK


def read_block(file: BinaryIO, at: int) -> bytes:
    """Return the block at a position; the file must not end before it does."""
    file.seek(at)
    block = file.read(BLOCK)
    if len(block) != BLOCK:
        raise ValueError("not a tar archive" if at == 0 else "truncated; fetch it again")
    return block


def parse_header(block: bytes, at: int) -> Header | None:
    """Read a header's fields; None for the empty block that ends an archive."""
    if not any(block):
        return None
    try:
        blank = block[:148] + b" " * 8 + block[156:]
        if number(block[148:156]) != sum(blank):
            raise ValueError("a checksum is wrong")
        size = number(block[124:136])
    except ValueError as error:
        what = "not a tar archive, or" if at == 0 else ""
        raise ValueError(f"{what} damaged at byte {at}; fetch it again".strip()) from error
    name = text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := text(block[345:500])):
        name = f"{prefix}/{name}"
    return Header(name, block[156:157], at + BLOCK, size)


def number(field: bytes) -> int:
    """Read a number: octal digits, or base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError("no number")
    return int(digits, 8)


def text(field: bytes) -> str:
    """Return a field up to its first zero."""
    return field.split(b"\0")[0].decode(errors="surrogateescape")


def read_extended(file: BinaryIO, header: Header) -> dict[str, str]:
    """Return what an extended header says of the next member, under pax's keys."""
    if header.size > MAX_EXTENDED:
        raise ValueError(f"a header of {header.size} bytes")
    file.seek(header.offset)
    data = file.read(header.size)
    if header.kind == LONG_NAME:
        return {"path": text(data)}
    if header.kind == LONG_LINK:
        return {}
    found = dict(pax_records(data))
    if header.kind == PAX_GLOBAL and found.keys() & {"path", "size"}:
        raise ValueError("one header names or sizes all members")
    return {} if header.kind == PAX_GLOBAL else found


def pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the records `<length> <key>=<value>` of a pax header."""
    at = 0
    while at < len(data) and data[at]:
        digits = data[at : at + 8].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1 : at + length]
        if not record.endswith(b"\n") or b"=" not in record:
            raise ValueError("an extended header is damaged")
        key, _, value = record[:-1].partition(b"=")
        yield key.decode(errors="replace"), value.decode(errors="surrogateescape")
        at += length


def complete(header: Header, pax: dict[str, str], limit: int) -> Header:
    """Return a member as its extended header has it; ValueError if it may not be there."""
    name = pax.get("path", header.name)
    digits = pax.get("size", str(header.size))
    if header.kind not in (*FILES, FOLDER) or any(key.startswith("GNU.sparse") for key in pax):
        raise ValueError(f"{name!r:.200} is a link, a device or a sparse file")
    size = int(digits) if digits.isdecimal() and len(digits) < 20 else limit + 1
    if header.offset + size > limit or (size and header.kind == FOLDER):
        raise ValueError(
            f"{name!r:.200} claims {size} bytes, more than there can be; "
            "the archive is truncated or hostile"
        )
    return Header(name, header.kind, header.offset, size)
