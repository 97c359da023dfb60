"""Reads one damaged input under watch, and says whether what happened is allowed.

Allowed are a PorttoolError that names the input, and values that are the original ones, or others
where no checksum forbids it. Everything else is a finding: another exception, a hang, too much
memory, a file written or removed outside the output, a process started, a pickle taken apart by
Python's own reader, a result left behind by a refused input, a line on the standard output.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.containers import Container, Values
from porttool.errors import PorttoolError

MAX_SECONDS = 10
MAX_BYTES = 300_000_000
"""Resident memory that reading one input may take beyond what the process had."""

RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
        "subprocess.Popen", "socket.connect", "pickle.find_class")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
           "os.chown", "os.truncate", "os.utime")  # fmt: skip


class Hang(BaseException):
    """Raised by the alarm; no reader may swallow it."""


@dataclass(frozen=True)
class Verdict:
    """What an input did: `outcome` is refused, equal, changed or finding."""

    outcome: str
    damage: str
    detail: str
    seconds: float
    n_bytes: int


class Watch:
    """Notes, through Python's audit events, what is done outside of one folder while it is on."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._inside: str | None = None
        sys.addaudithook(self._note)

    @contextmanager
    def on(self, inside: Path) -> Iterator[None]:
        self.seen.clear()
        self._inside = str(inside.absolute())
        try:
            yield
        finally:
            self._inside = None

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event in RUNS:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and not isinstance(args[0], int):
            flags = args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if (writes and not self._allowed(args[0])) or "secret" in str(args[0]):
                self.seen.append(f"open {args!r:.200}")
        elif event in CHANGES:
            n_paths = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
            below = args[-1] if event in ("os.remove", "os.rmdir") else -1
            if not all(self._allowed(path, below) for path in args[:n_paths]):
                self.seen.append(f"{event} {args!r:.200}")

    def _allowed(self, path: Any, below: int = -1) -> bool:
        """Whether a path is inside; it may be relative to the open folder `below`."""
        if isinstance(path, int) or path is None:
            return True  # what is open already was judged when it was opened
        folder = os.readlink(f"/proc/self/fd/{below}") if below >= 0 else ""  # noqa: PTH115
        whole = os.path.join(folder, os.fsdecode(path))  # noqa: PTH118 - as it was given
        absolute = os.path.abspath(whole)  # noqa: PTH100 - resolve() follows links
        return absolute == self._inside or absolute.startswith(f"{self._inside}/")


class Judge:
    """Judges the inputs of one container; each lives in `box` while it is read."""

    def __init__(self, container: Container, box: Path, watch: Watch) -> None:
        self.container = container
        self._watch = watch
        self._box = box
        self._original = box / "original"
        self._original.mkdir(parents=True)
        container.write(self._original)
        (box / "secret").write_text("nobody may read this")
        self.values = self._read(self._original, self._fresh("output"))

    def judge(self, seed: int, index: int) -> Verdict:
        """Damage a copy of the whole input as seed and index say, and read it."""
        rng = Random(f"{self.container.name}:{seed}:{index}")
        folder, output = self._fresh("input"), self._fresh("output")
        shutil.copytree(self._original, folder, dirs_exist_ok=True)
        damage = self.container.damage(rng, folder)
        before = fresh_peak()
        start = time.perf_counter()
        outcome, detail = self._outcome(folder, output, damage.sealed)
        seconds = time.perf_counter() - start
        n_bytes = peak_memory() - before
        if n_bytes > MAX_BYTES:
            outcome, detail = "finding", f"{n_bytes / 1e6:.0f} MB of memory; {detail}"
        return Verdict(outcome, damage.text, detail, seconds, n_bytes)

    def _outcome(self, folder: Path, output: Path, sealed: bool) -> tuple[str, str]:
        try:
            values = self._read(folder, output)
        except PorttoolError as error:
            outcome, detail = "refused", f"{type(error).__name__}: {error}"
            if problem := self._unclean(str(error), folder, output):
                outcome, detail = "finding", f"{problem}: {detail}"
        except (Exception, Hang) as error:  # noqa: BLE001 - this is what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
            outcome = "finding"
            detail = f"{type(error).__name__}: {error!s:.200} in {' < '.join(ours[::-1][:12])}"
        else:
            outcome = "equal" if values == self.values else "changed"
            detail = ", ".join(n for n in values.keys() | self.values.keys()
                               if values.get(n) != self.values.get(n))[:200]  # fmt: skip
            if outcome == "changed" and self.container.checked and not sealed:
                outcome, detail = "finding", f"values under a checksum changed: {detail}"
            elif problem := self._second_opinion(folder):
                outcome, detail = "finding", f"the format's own library disagrees: {problem}"
        if printed := self._printed.getvalue():
            outcome, detail = "finding", f"printed {printed!r:.200}; {detail}"
        if self._watch.seen:
            outcome, detail = "finding", f"{self._watch.seen[0]}; {detail}"
        return outcome, detail

    def _unclean(self, message: str, folder: Path, output: Path) -> str:
        """Say what a refusal lacks, if anything."""
        names = {str(folder), str(output), *(f.name for f in self._original.rglob("*"))}
        if not any(name in message for name in names):
            return "the message names no file"
        if len(message) > 10_000:
            return f"a message of {len(message)} characters"
        left = [f.name for f in output.iterdir() if f.name != ".made.partial"]
        return f"left behind: {left}" if left else ""

    def _second_opinion(self, folder: Path) -> str:
        try:
            return self.container.opinion(folder) if self.container.opinion else ""
        except Exception as error:  # noqa: BLE001 - a library may raise anything
            return f"{type(error).__name__}: {error!s:.200}"

    def _read(self, folder: Path, output: Path) -> Values:
        self._printed = io.StringIO()
        with (
            self._watch.on(output),
            alarm(MAX_SECONDS),
            warnings.catch_warnings(action="error"),
            redirect_stdout(self._printed),
        ):
            return self.container.read(folder, output)

    def _fresh(self, name: str) -> Path:
        folder = self._box / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Hang when it takes longer. C code that never returns is the driver's to kill."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fresh_peak() -> int:
    """Forget the process's peak of resident memory; return what it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory() -> int:
    """Peak of resident memory since then, in bytes."""
    return status("VmHWM")


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024
