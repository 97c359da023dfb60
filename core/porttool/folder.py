"""A folder that appears whole or not at all: written beside its place, then renamed.

While it is written it is `.<name>.partial`, locked by its writer, with a journal of the files that
are complete. A killed writer leaves that behind; the same work finds it and goes on. The manifest
is written last, with the SHA-256 of every file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pydantic import ValidationError

from porttool.config import Closed
from porttool.errors import CheckpointError, PorttoolError, explain_os_error, intact
from porttool.standing import made_folder, occupied, partial_folder, require_free

JOURNAL = "journal.jsonl"
BLOCK = 1 << 22


class FileRecord(Closed):
    """Size and SHA-256 of a file, as a manifest keeps them."""

    bytes: int
    sha256: str


class JournalEntry(FileRecord):
    """A complete file of a pending folder: a line of its journal."""

    name: str


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is still the one that it was: identity, size, time of change.

    The status changes with every write too, and its time cannot be set back; but it also does so
    with a new link or other permissions, so it is not part of a comparison.
    """

    inode: int
    size: int
    changed: int
    status_changed: int = field(compare=False)

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        """Take what matters of a file's status."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class PendingFolder:
    """A folder being written. Use `pending_folder` to get one."""

    def __init__(self, target: Path, path: Path) -> None:
        self.target = target
        self.path = path
        self.files: dict[str, FileRecord] = {}

    def add_file(self, name: str, record: FileRecord) -> None:
        """Note a complete file, so that a later run need not write it again."""
        self.files[name] = record
        entry = JournalEntry(name=name, **record.model_dump())
        with (self.path / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(entry.model_dump_json() + "\n")
            sync(journal)

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            sync(file)
        self.add_file(name, FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))

    def finish(self, manifest_name: str, manifest: str) -> None:
        """Write the manifest and put the folder in its place, over an older one if there is one."""
        with (self.path / manifest_name).open("w", encoding="utf-8") as file:
            file.write(manifest)
            sync(file)
        (self.path / JOURNAL).unlink()
        sync_folder(self.path)
        old = self.target.with_name(f".{self.target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(self.target):
            self.target.rename(old)
        self.path.rename(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self, fingerprint: str) -> None:
        """Take over what an interrupted run of the same work left, or start from nothing.

        Every file taken over is read and hashed: the disk may have been failing when it was left.
        """
        head = json.dumps({"fingerprint": fingerprint})
        kept = []
        if (entries := read_journal(self.path / JOURNAL, head)) is None:
            for child in self.path.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        else:
            kept = [entry for entry in entries if self._holds(entry)]
        lines = [head, *(entry.model_dump_json() for entry in kept)]
        partial = self.path / f"{JOURNAL}.new"
        with partial.open("w", encoding="utf-8") as journal:
            journal.writelines(f"{line}\n" for line in lines)
            sync(journal)
        partial.rename(self.path / JOURNAL)
        self.files = {e.name: FileRecord(bytes=e.bytes, sha256=e.sha256) for e in kept}

    def _holds(self, entry: JournalEntry) -> bool:
        path = self.path / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            return False
        return hash_file(path).sha256 == entry.sha256


def read_journal(path: Path, head: str) -> list[JournalEntry] | None:
    """Return a journal's entries up to the first that a kill cut off; None if it is not ours."""
    if not path.is_file():
        return None
    first, *lines = path.read_bytes().splitlines() or [b""]
    if first != head.encode():
        return None
    entries = []
    for line in lines:
        try:
            entries.append(JournalEntry.model_validate_json(line))
        except ValidationError:
            break
    return entries


@contextmanager
def pending_folder(
    target: Path,
    fingerprint: str,
    *,
    manifest: str,
    replace: bool = False,
    sources: Sequence[Path] = (),
) -> Iterator[PendingFolder]:
    """Open a folder for writing; `fingerprint` says what work it is, for resuming.

    One that was finished with the `manifest` may be replaced if `replace` says so; `sources` are
    read meanwhile and may not lie there. Raises UsageError if something stands at the
    target that may not be replaced, and PorttoolError if another process writes there, the place
    cannot be written, or the disk fills up. A KeyboardInterrupt gets a note of what is left; work
    that is refused before a file is complete leaves nothing.
    """
    target = target if target.name.strip(".") else target.resolve()
    require_free(target, manifest, replace=replace, sources=sources)
    path = partial_folder(target)
    try:
        with made_folder(path), locked(path, target):
            if occupied(target) and not replace:  # another process has finished it since
                path.rmdir()
            require_free(target, manifest, replace=replace, sources=sources)
            folder = PendingFolder(target, path)
            folder.resume(fingerprint)
            try:
                yield folder
            except (PorttoolError, OSError):
                if not folder.files:
                    shutil.rmtree(path, ignore_errors=True)
                raise
    except OSError as error:
        raise PorttoolError(explain_os_error(error, target, path)) from error
    except KeyboardInterrupt as error:
        if path.exists():
            error.add_note(
                f"{path} keeps what was written: run the same command again to finish, or remove "
                "that folder to be rid of it"
            )
        raise


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock on a folder that dies with the process; raise if another process has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
            raise PorttoolError(f"{target} was finished by another process meanwhile")
        yield
    except BlockingIOError as error:
        raise PorttoolError(f"{target} is being written by another process") from error
    finally:
        os.close(descriptor)


def sync(file: IO[str] | IO[bytes]) -> None:
    """Push a file's data to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Push a folder's names to the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Return where the user's caches are, by the XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "porttool"


def hash_file(path: Path) -> FileRecord:
    """Return a file's size and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def find_files(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, Stamp]:
    """Check that every file is there and has its size; return their stamps."""
    stamps = {}
    for name, record in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{folder}: the manifest names a file outside: {name!r:.200}")
        with intact(folder):
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing; make the folder again")
            stamps[name] = Stamp.of(path.stat())
        if stamps[name].size != record.bytes:
            raise CheckpointError(
                f"{path}: has {stamps[name].size} bytes, the manifest says {record.bytes}; "
                "the folder is incomplete or altered, make it again"
            )
    return stamps


def require_record(path: Path, found: FileRecord, record: FileRecord) -> None:
    """Raise CheckpointError for a file that is not the one its manifest knows."""
    if found != record:
        raise CheckpointError(
            f"{path}: its SHA-256 is not the manifest's; "
            "the file was altered, make the folder again"
        )


def verify_files(
    folder: Path, files: Mapping[str, FileRecord], but: Collection[str] = ()
) -> dict[str, Stamp]:
    """Check every file's size and hash; name the first that is missing or altered.

    Of those named in `but`, which somebody else hashes, the size alone. The stamps returned were
    taken before: a file that has its stamp still is the one verified.
    """
    stamps = find_files(folder, files)

    def check(name: str) -> None:
        with intact(folder / name):
            found = hash_file(folder / name)
        require_record(folder / name, found, files[name])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(check, (name for name in files if name not in but)):
            pass
    return stamps
