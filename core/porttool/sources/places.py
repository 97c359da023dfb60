"""What stands at a path, told before it is read: files that are not what their names promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from porttool.errors import SourceError, UsageError
from porttool.standing import made_folder, require_place

POINTER = b"version https://git-lfs"
"""How a pointer file of Git LFS begins (its specification, version 1)."""


def is_present(path: Path) -> bool:
    """Return true for a file that is there; a link whose file is gone is a SourceError."""
    if path.is_symlink() and not path.exists():
        raise SourceError(
            f"{path}: is a link to a file that is gone ({path.readlink()!s:.300}); fetch the model "
            "again"
        )
    return path.is_file()


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
