"""What already stands where something is to be written, and whether it may be replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from porttool.errors import UsageError


def occupied(target: Path) -> bool:
    """Whether something stands at the target; an empty folder is as good as nothing."""
    if target.is_symlink() or not target.is_dir():
        return os.path.lexists(target)
    return any(target.iterdir())


def require_place(target: Path) -> None:
    """Raise UsageError if nothing can be made at the target, for a file stands above it."""
    above = next(p for p in target.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise UsageError(f"{target}: {above} is not a folder; choose another place")


@contextmanager
def made_folder(path: Path) -> Iterator[Path]:
    """Make a folder; work in it that fails and leaves nothing there takes away what was made."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # something is in it
            for folder in new:
                with suppress(FileNotFoundError):
                    folder.rmdir()
        raise


def require_free(target: Path, replaces: str | None, sources: Sequence[Path]) -> None:
    """Raise UsageError if something stands at the target, or above it, that may not be replaced.

    What may be is a folder that was finished with the manifest `replaces`: never what somebody else
    put there, and never what is being read.
    """
    require_place(target)
    if not occupied(target):
        return
    if replaces is None:
        raise UsageError(f"{target} exists already; choose another --output, or add --force")
    if target.is_symlink() or not (target / replaces).is_file():
        raise UsageError(
            f"{target} has no {replaces}, and --force replaces only what was finished with one; "
            "choose another --output, or take away yourself what stands there"
        )
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise UsageError(
                f"{source} is being read and lies in {target}, which --force would replace; choose "
                "another --output"
            )
