"""What already stands where something is to be written, whether it may be replaced, and room."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from porttool.errors import FULL, PorttoolError, UsageError, said_by_system
from porttool.progress import format_bytes

KINDS = {
    "checkpoint.json": "a checkpoint",
    "engine.json": "an engine",
    "prompt_table.json": "a prompt table",
}
"""Manifest → what a folder is that has it; the modules of these names write them."""
MAX_MANIFEST = 1 << 26
"""Bytes of a manifest that are read; there is none so large."""


def kind_of(folder: Path) -> str | None:
    """Return what a folder of ours is, by its manifest's name; None for any other."""
    return next((kind for name, kind in KINDS.items() if (folder / name).is_file()), None)


def finished_kind(folder: Path) -> str | None:
    """As `kind_of`, but None where a file of that name is somebody else's."""
    for name in KINDS:
        with suppress(OSError), (folder / name).open("rb") as file:
            if b'"porttool-' in file.read(200):
                return KINDS[name]
    return None


def described(folder: Path) -> str:
    """Say what a finished folder of ours is and what it was made of; empty for any other."""
    for name in (name for name in KINDS if (folder / name).is_file()):
        kind = KINDS[name].split(" ", 1)[1]
        # It may be damaged, or not even an object.
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with (folder / name).open("rb") as file:
                made = dict(json.loads(file.read(MAX_MANIFEST)))
            dtype = made.get("dtype") or made["config"]["dtype"]
            origin = made["source"]["path"]
            return f"a finished {kind} of {made['family']} in {dtype}, from {origin}"
        return f"a damaged {kind}"
    return ""


def occupied(target: Path) -> bool:
    """Whether something stands at the target; an empty folder is as good as nothing."""
    if target.is_symlink() or not target.is_dir():
        return os.path.lexists(target)
    return any(target.iterdir())


def require_text_name(path: Path) -> None:
    """Refuse a path that is no UTF-8 text: manifests and reports could not name it.

    Python holds other bytes as surrogates, in an ASCII locale all that are not ASCII.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{str(path.absolute())!r}: its name is no text here; rename it, or, where it is "
            "UTF-8, set a locale that is: LC_ALL=C.UTF-8"
        ) from error


def require_place(target: Path) -> None:
    """Raise UsageError if nothing can be made at the target, for a file stands above it."""
    above = next(p for p in target.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise UsageError(f"{target}: {above} is not a folder; choose another place")


@contextmanager
def made_folder(path: Path) -> Iterator[Path]:
    """Make a folder; work in it that fails and leaves nothing there takes away what was made.

    A full disk, of which the system says no name, is said to be this folder's.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL:
            error.filename = error.filename or str(path)
        with suppress(OSError):  # something is in it
            for folder in filter(os.path.isdir, new):
                folder.rmdir()
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then stands at `path` whole, or else not at all.

    What stood there is kept until then. A link, or what is no plain file, is written to directly.
    Raises PorttoolError with the file's name where the system refuses.
    """
    direct = path.is_symlink() or (path.exists() and not path.is_file())
    partial = path if direct else path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        if not direct:
            if path.exists():
                shutil.copymode(path, partial)
            partial.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise PorttoolError(said_by_system(error)) from error
    finally:
        if not direct:
            with suppress(OSError):
                partial.unlink()


def require_free(
    target: Path, manifest: str, *, replace: bool, sources: Sequence[Path] = ()
) -> None:
    """Raise UsageError if something stands at the target, or above it, that may not be replaced.

    What may be, if it is to `replace` it, is a folder that was finished with the manifest: never
    what somebody else put there, and never what is being read. Nothing is put into a finished
    folder of ours, which --force would take away with all that is in it.
    """
    require_place(target)
    for above in Path(os.path.realpath(target)).parents:
        if kind := finished_kind(above):
            raise UsageError(
                f"{target} lies in {above}, which is {kind}, and would be lost when that is made "
                "anew; choose an --output beside it"
            )
    if not occupied(target):
        return
    if target.is_symlink():
        raise UsageError(
            f"{target} is a symbolic link to {os.path.realpath(target)}, and no link is replaced, "
            "with --force neither; name that folder, or choose another --output"
        )
    found = f" ({said})" if (said := described(target)) else ""
    replaceable = (target / manifest).is_file()
    if not replace:
        cure = ", or add --force to make it anew" if replaceable else ""
        raise UsageError(f"{target} exists already{found}; choose another --output{cure}")
    if not replaceable:
        raise UsageError(
            f"{target}{found} has no {manifest}, and --force replaces only what was finished with "
            "one; choose another --output, or take away yourself what stands there"
        )
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise UsageError(
                f"{source} is being read and lies in {target}, which --force would replace; choose "
                "another --output"
            )


def require_writable(*files: Path | None) -> None:
    """Refuse a result's place that cannot be, before anything is measured.

    Nor may it be in a finished folder of ours, whose files are sealed, or be another result's.
    """
    given = [file for file in files if file is not None]
    for i, file in enumerate(given):
        if file.is_dir():  # "" is one, which a variable of the shell stands for that is not set
            raise UsageError(f"{file} is a folder: name a file for the result")
        folder = file.absolute().parent
        again = any(file.resolve() == other.resolve() for other in given[:i])
        if again and (file.is_file() or not file.exists()):  # /dev/null takes any number
            raise UsageError(f"{file} is named for two results, of which one would be lost")
        for above in file.resolve().parents:
            if kind := finished_kind(above):
                raise UsageError(f"{file} lies in {above}, which is {kind}: choose another place")
        if not folder.is_dir():
            raise UsageError(f"{file}: there is no folder {folder}")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise UsageError(f"{file} cannot be written: choose another place")


def partial_folder(target: Path) -> Path:
    """Return where a folder is written until it is whole: beside its place, hidden."""
    place = target if target.name.strip(".") else target.resolve()
    return place.parent / f".{place.name}.partial"  # the root has no name


def require_space(target: Path, n_bytes: int, *, advice: str = "") -> None:
    """Raise before the work begins if the disk has no room for so many bytes.

    What an interrupted run left is gone on from, or taken away: it has its room already.
    """
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    left = 0
    with suppress(FileNotFoundError):  # another process finishes it at this moment
        left = sum(f.stat().st_size for f in partial_folder(target).rglob("*") if f.is_file())
    free = shutil.disk_usage(parent).free + left
    if free < n_bytes:
        raise PorttoolError(
            f"{target}: {format_bytes(n_bytes)} are needed, {format_bytes(free)} are free; "
            f"free some space, or {advice or 'choose another --output or a smaller --dtype'}"
        )
