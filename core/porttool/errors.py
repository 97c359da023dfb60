"""Every error that a user can cause: what happened, in which file or tensor, what to do next."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porttool.weights import TensorSource


class PorttoolError(Exception):
    """Base of all errors that the command line shows as one message, without a traceback."""

    exit_status = 1


class UsageError(PorttoolError):
    """The request itself cannot be carried out: an unknown name, a bad option, a limit exceeded."""

    exit_status = 2


class MissingFolder(UsageError):
    """A folder that one of porttool's steps makes is not there; `path` is its place."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} does not exist")
        self.path = path


class SourceError(PorttoolError):
    """A source checkpoint is missing, damaged, hostile or of another family."""


class UntoldError(SourceError):
    """A source does not say what an option has to: the request lacks that option.

    `tensors` and `known`, fields of a model's config, are what it does say.
    """

    exit_status = 2

    def __init__(
        self, message: str, tensors: TensorSource, known: Mapping[str, int | float | str]
    ) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.known = known


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Begin a SourceError with the source's path, where it does not name it itself.

    What the system says of a file that cannot be read becomes a SourceError, too.
    """
    try:
        yield
    except SourceError as error:
        if str(source) in str(error):
            raise
        raise SourceError(f"{source}: {error}") from error
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror}: {error.filename!s:.300}") from error


class CheckpointError(PorttoolError):
    """A porttool checkpoint is incomplete, altered or from an incompatible version."""


@contextmanager
def intact(place: Path) -> Iterator[None]:
    """Turn what the system says of a file or folder's that cannot be read into a CheckpointError.

    It names the file where one is not to be opened, and does not where reading fails.
    """
    try:
        yield
    except OSError as error:
        other = error.filename and str(error.filename) != str(place)
        named = f": {error.filename!s:.300}" if other else ""
        raise CheckpointError(f"{place}: {error.strerror}{named}") from error


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where there is no room left; it names no file then."""


def said_by_system(error: OSError, path: Path | None = None) -> str:
    """Return what the system says of a file, `path` if it names none, and what can be done."""
    named = error.filename or path
    where = f"{named!s:.300}: " if named else ""
    if error.errno in FULL:
        return f"{where}the disk is full; free some space and run the same command again"
    if error.errno == errno.EROFS:
        return f"{where}{error.strerror}; choose another place for what is written"
    return f"{where}{error.strerror or f'{type(error).__name__}: {error}'}"


def explain_os_error(error: OSError, target: Path, path: Path) -> str:
    """Return what went wrong with the disk that `target` is written to, and what is left."""
    if error.errno in FULL and path.exists():
        return (
            f"{target}: the disk is full; the complete files are kept in {path}, "
            "free some space and run the same command again to go on"
        )
    if error.errno in FULL:
        error.filename = str(target)
    return said_by_system(error, target)


class EngineError(PorttoolError):
    """An engine cannot be built, opened or run."""


class PluginError(PorttoolError):
    """A plugin is broken, blocked, or clashes with another one."""


def require_kind(found: object, kind: type, method: str) -> None:
    """Refuse what a plugin's method returned where it is of another kind."""
    if not isinstance(found, kind):
        raise PluginError(f"{method} returned a {type(found).__name__}, not a {kind.__name__}")


class CheckFailed(PorttoolError):
    """A check ran to its end and its verdict is no."""


class MissingExtra(PorttoolError):
    """An optional dependency is not installed, or does not load for the reason it is raised from.

    `extra` is the name of the extra that brings it, `package` the import that failed. `why` says
    what is wrong with one that is there.
    """

    def __init__(self, extra: str, package: str, why: str | None = None) -> None:
        super().__init__(
            f"the package {package!r} {why or 'is not installed; install it with'} "
            f"pip install {'--upgrade ' if why else ''}'porttool[{extra}]'"
        )
        self.extra = extra
        self.package = package

    def __str__(self) -> str:
        """Say of a package that is there and does not load why: installing it changes nothing."""
        cause = self.__cause__
        if cause is None or find_spec(self.package) is None:
            return super().__str__()
        return (
            f"the package {self.package!r} is installed and does not load: {cause}; "
            f"pip install --upgrade 'porttool[{self.extra}]' may mend it"
        )


@contextmanager
def importing(extra: str, package: str) -> Iterator[None]:
    """Turn an import of an extra's package that fails into MissingExtra."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(extra, package) from error


def require_extra(extra: str, *packages: str) -> None:
    """Raise MissingExtra before any work is done if a package of an extra is absent or too old.

    Nothing else holds an environment to an extra that nobody asked for.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(extra, package)
        with suppress(PackageNotFoundError):  # modules alone, or onnxruntime-gpu
            found, least = version(package), least_version(extra, package)
            if least and release(found) < release(least):
                why = f"is there in version {found}, and porttool needs {least}:"
                raise MissingExtra(extra, package, why)


def least_version(extra: str, package: str) -> str | None:
    """Return the oldest version of a package that porttool declares for an extra."""
    name = package.replace("_", "[-_.]")
    declared = re.compile(rf"{name}>=([\d.]+);.*extra == .{extra}.$")
    found = (declared.match(line) for line in requires("porttool") or ())
    return next((match[1] for match in found if match), None)


def release(text: str) -> list[int]:
    """Return the numbers of a version, as 5, 4 and 0 of 5.4.0+cpu."""
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
