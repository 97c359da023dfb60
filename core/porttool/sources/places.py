"""What stands at a path, told before it is read: files that are not what their names promise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from porttool.component import Component
from porttool.errors import PorttoolError, SourceError, UsageError
from porttool.standing import kind_of, made_folder, require_place
from porttool.weights import listing

POINTER = b"version https://git-lfs"
"""How a pointer file of Git LFS begins (its specification, version 1)."""


UNREAD = {
    ".zip": "is an archive that porttool does not look into: unpack it and name its folder",
    ".gguf": "is llama.cpp's: name the folder in Hugging Face's layout that it was made from",
}
"""Files that people have of these families and nobody reads, by suffix."""

UNFETCHED = (
    "; fetch them, or, where speed alone is measured, draw them: `porttool build --dummy --config`"
)
"""What to do about a folder that has a config and no weights of any kind."""

MAX_NEAR = 50
"""Folders and files that are looked at where the folder that they lie in is read by nobody."""


@dataclass(frozen=True)
class SourceFiles:
    """A source's files as they are: name, size, time of change, of status change, and identity.

    A file that was put in another's place and taken away again, or given its old time back, still
    has another time of status change.
    """

    source: Path
    stats: tuple[tuple[str, int, int, int, int], ...]

    @classmethod
    def of(cls, source: Path) -> Self:
        """Look at a folder's files, at any depth, or at one file."""
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        return cls(source, tuple(
            (str(f.relative_to(source)), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
            for f in files
            if f.is_file() and (s := f.stat())
        ))  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """A hash of all of it: what a conversion was of, which resuming relies on."""
        return hashlib.sha256(json.dumps(self.stats).encode()).hexdigest()

    def require_unchanged(self) -> None:
        """Raise SourceError, naming the files that are others now, that are new or gone."""
        now = self.of(self.source).stats
        if changed := sorted({str(self.source / name) for name, *_ in {*self.stats} ^ {*now}}):
            raise SourceError(
                f"{listing(changed)}: changed while it was read; convert it again, with nothing "
                "written there meanwhile"
            )


def is_present(path: Path) -> bool:
    """Return true for a file that is there; a link whose file is gone is a SourceError."""
    if path.is_symlink() and not path.exists():
        raise SourceError(
            f"{path}: is a link to a file that is gone ({path.readlink()!s:.300}); fetch the model "
            "again"
        )
    return path.is_file()


def said_type(source: Path) -> str:
    """Return what a folder's config.json says it is; a SourceError if that cannot be read."""
    from porttool.sources.json_file import read_json

    if not is_present(source / "config.json"):
        weights = any(p.suffix in (".safetensors", ".bin") for p in source.glob("*"))
        return " (there are weights in it, and no config.json)" * weights
    kind = read_json(source / "config.json").get("model_type")
    return f" (its config.json says model_type {kind!r})"


def hints_at(source: Path, recognise: Callable[[Path], Iterable[Component]]) -> str:
    """Return what a source that nobody reads says it is, or what near it is read."""

    def known(place: Path) -> str:
        with suppress(PorttoolError, OSError):
            return kind_of(place) or ", ".join(c.name for c in recognise(place))
        return ""

    for place in (source, *sorted(source.glob("*.*"))):
        if (advice := UNREAD.get(place.suffix)) and not (source / "config.json").exists():
            return f"; {'it' if place == source else place.name} {advice}"
    if source.is_file():
        found = known(source.parent)
        return f"; name the folder that it lies in, {source.parent} ({found})" if found else ""
    places = sorted([*source.glob("*"), *source.glob("snapshots/*")])[:MAX_NEAR]
    inside = [f"{path} ({found})" for path in places if (found := known(path))]
    said = f"; name one that lies in it, {' or '.join(inside[:3])}" if inside else ""
    return said_type(source) + said


def refuse_pointer(path: Path) -> None:
    """Raise SourceError for what Git leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise SourceError(
                f"{path}: is a Git LFS pointer, not the file; run `git lfs pull` in its repository"
            )


def require_outside(source: Path, output: Path) -> None:
    """Raise UsageError for an output inside its source, which writing it would change."""
    if source.resolve() in output.resolve().parents:
        raise UsageError(
            f"{output}: the output must not lie in the source {source}; choose another --output"
        )


@contextmanager
def scratch_folder(source: Path, output: Path) -> Iterator[Path]:
    """Make the folder that an output goes into, unless it lies in its source."""
    require_outside(source, output)
    require_place(output)
    with made_folder(output.absolute().parent) as folder:
        yield folder
