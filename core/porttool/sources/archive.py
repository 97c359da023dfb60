"""A tar archive read member by member: nothing is ever unpacked, so no name in it can do harm.

A plain tar is read in place. A gzipped one has to be decompressed from its start to find its
members, and again up to a member to read it.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import IO, BinaryIO, cast

from porttool.errors import SourceError
from porttool.progress import Progress
from porttool.sources.places import refuse_pointer
from porttool.sources.tar_headers import read_headers
from porttool.standing import require_space

MAX_GROWTH = 200
"""Weights hardly compress: what unpacks to more than this many times itself is a trap."""
SMALL = 1 << 30
"""Up to so many bytes unpacked nothing is a trap."""
ABANDONED = 60
"""Seconds after which a file that nobody has locked is no longer anybody's."""
ELSEWHERE = "choose another --output, or TMPDIR for `porttool inspect`"
"""What to do where a compressed archive has no room to be unpacked."""


@dataclass(frozen=True)
class Member:
    """Where a file's data lies in the unpacked archive, in bytes."""

    offset: int
    size: int


class Archive:
    """The regular files of a .tar or .tar.gz, indexed and checked before anything is read.

    Names come without a leading `./`. Links, devices, sparse files, absolute names, `..`, names
    that appear twice and sizes that cannot be are a SourceError naming the member.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compressed = is_gzip(path)
        self._members: dict[str, Member] = {}
        with self._unpacked() as raw, readable(path):
            for header in read_headers(raw, max_bytes(path, compressed=self.compressed)):
                name = plain_name(path, header.name)
                if not header.is_file:
                    continue
                if name in self._members:
                    raise SourceError(f"{path}: {name!r:.200} is in the archive twice")
                self._members[name] = Member(header.offset, header.size)

    def names(self) -> list[str]:
        """Return the names of all files, in the archive's order."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return name in self._members

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self._member(name).size

    def offset(self, name: str) -> int | None:
        """Return where a file's data begins in the archive; None if that is compressed."""
        return None if self.compressed else self._member(name).offset

    def open(self, name: str) -> BinaryIO:
        """Open one file for reading; close it after use. It can seek, backwards at a cost."""
        member = self._member(name)
        return io.BufferedReader(Section(self._unpacked(), member), 1 << 20)

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file whole; one of more than `limit` bytes is a SourceError."""
        size = self.size(name)
        if size > limit:
            raise SourceError(
                f"{self.path}: {name} has {size} bytes, more than the {limit} expected"
            )
        try:
            with self.open(name) as file:
                data = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{self.path}: {name} is damaged: {error}") from error
        if len(data) != size:
            raise SourceError(f"{self.path}: {name} is truncated; fetch the archive again")
        return data

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise SourceError(f"{self.path}: there is no {name} in this archive")
        return self._members[name]

    def _unpacked(self) -> BinaryIO:
        if self.compressed:
            return cast("BinaryIO", gzip.open(self.path, "rb"))
        return self.path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever shows that an archive is none, or not whole, into a SourceError naming it."""
    try:
        yield
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: truncated or damaged: {error}") from error


def max_bytes(path: Path, *, compressed: bool) -> int:
    """Return how many bytes an archive can have when it is unpacked."""
    size = path.stat().st_size
    return max(SMALL, size * MAX_GROWTH) if compressed else size


class Section(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, inner: BinaryIO, member: Member) -> None:
        self._inner = inner
        self._member = member
        self._at = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can seek."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Read up to the section's end."""
        wanted = min(len(buffer), self._member.size - self._at)
        if wanted <= 0:
            return 0
        self._inner.seek(self._member.offset + self._at)
        data = self._inner.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a position counted from the section's start, the current one or its end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the position in the section."""
        return self._at

    def close(self) -> None:
        """Close the file too."""
        self._inner.close()
        super().close()


def is_gzip(path: Path) -> bool:
    """Tell a gzipped file by its first bytes; a missing one is a SourceError."""
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: is not a file")
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


def plain_name(path: Path, name: str) -> str:
    """Return a member's name without `./`; one that leads outside is a SourceError."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise SourceError(f"{path}: the member {name!r:.200} leads outside the archive")
    return "/".join(parts)


def peek(path: Path, name: str, limit: int) -> bytes | None:
    """Return one small file, reading no further than to its end; None if it is not there.

    This is how to look into a gzipped archive without a pass over all of it.
    """
    compressed = is_gzip(path)
    with gzip.open(path) if compressed else path.open("rb") as file, readable(path):
        raw = cast("BinaryIO", file)
        for header in read_headers(raw, max_bytes(path, compressed=compressed)):
            if plain_name(path, header.name) == name and header.is_file and header.size <= limit:
                raw.seek(header.offset)
                data = raw.read(header.size)
                if len(data) != header.size:
                    raise ValueError("truncated; fetch it again")
                return data
    return None


@contextmanager
def unpacked(path: Path, scratch: Path, progress: Progress) -> Iterator[Path]:
    """Decompress a gzipped archive once, into a file in `scratch` that is gone afterwards."""
    progress.note(
        f"{path.name} is compressed: one pass unpacks it to a temporary file in {scratch}"
    )
    packed_size = path.stat().st_size
    require_space(scratch / path.name, packed_size, advice=ELSEWHERE)
    limit = max_bytes(path, compressed=True)
    progress.start(f"unpack {path.name}", packed_size)
    prefix = f".{path.name}."
    remove_abandoned(scratch, prefix)
    with NamedTemporaryFile(dir=scratch, prefix=prefix, suffix=".tar") as target:
        fcntl.flock(target, fcntl.LOCK_EX)
        try:
            with path.open("rb") as packed, gzip.open(packed) as plain:
                copy_blocks(plain, packed, target, limit, progress)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(f"{path}: truncated or damaged: {error}") from error
        except OSError as error:
            raise SourceError(f"{path}: cannot be unpacked in {scratch}: {error}") from error
        progress.finish()
        yield Path(target.name)


def remove_abandoned(scratch: Path, prefix: str) -> None:
    """Delete unpacked archives that killed runs left: they are older, and nobody's lock is on them.

    One that another run makes at this moment may not have its lock yet.
    """
    for file in scratch.iterdir():
        if file.name.startswith(prefix) and file.name.endswith(".tar") and file.is_file():
            with suppress(OSError), file.open("rb") as left:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()


def copy_blocks(
    plain: gzip.GzipFile, packed: IO[bytes], target: IO[bytes], limit: int, progress: Progress
) -> None:
    """Copy what a gzip stream unpacks to, up to a limit; progress counts the packed bytes."""
    done = seen = 0
    while block := plain.read(1 << 22):
        done += len(block)
        if done > limit:
            raise SourceError(f"{packed.name}: unpacks to more than {limit} bytes; it is a trap")
        target.write(block)
        progress.advance(packed.tell() - seen)
        seen = packed.tell()
    target.flush()
