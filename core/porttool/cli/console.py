"""Everything that a person sees: messages, tables, progress. The only module that knows rich."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from porttool.progress import Progress, format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

    from porttool.evaluator import Report

LAST_STREAM = 2
"""Descriptor of standard error."""
PLAIN_INTERVAL = 5.0
"""Seconds between lines of progress where there is no terminal."""


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


def open_closed_streams() -> None:
    """Give standard streams that are closed (`>&-`) to the null device.

    A file that is opened later would take their place, and a library's messages.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - for as long as it runs
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def tolerate_encodings() -> None:
    """Escape what the encoding of a standard stream cannot say, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "") -> None:
    """Print text as it is, tabs and control characters included."""
    write(text + "\n")


def write(text: str, *, beside: bool = False) -> None:
    """Print a piece of a stream at once, without a line's end; on standard error if `beside`."""
    stream = sys.stderr if beside else sys.stdout
    stream.write(text)
    stream.flush()


def say_json(value: Any, *, indent: int | None = 1) -> None:
    """Print a value for machines; without an indent it takes one line."""
    say(json.dumps(value, indent=indent))


_noted: set[str] = set()


def note(text: str) -> None:
    """Print something beside the result; a report does not say it again."""
    _noted.add(text)
    _console(stderr=True).print(text, markup=False, style="dim")


def error(text: str) -> None:
    """Print what went wrong."""
    from rich.text import Text

    _console(stderr=True).print(Text.assemble(("error: ", "bold red"), text))


@contextmanager
def without_notes() -> Iterator[None]:
    """Let Ctrl-C end a command without the notes of its parts on what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.__notes__ = []
        raise


def failure(raised: Exception, culprit: str) -> None:
    """Print where an error came from that is nobody's mistake but a plugin's, and whose."""
    traceback.print_exception(raised)
    error(f"{culprit}: {type(raised).__name__}: {raised}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column whose cells are all numbers is set right."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title, style="bold"), title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(is_number(row[i]) for row in rows)
        drawn.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    _console().print(drawn)


STYLES = {"pass": "bold green", "FAIL": "bold red", "ok": "green", "broken": "bold red"}


def is_number(text: str) -> bool:
    """Return true for a number, with or without a sign or a unit after it."""
    return bool(text) and (text[0].isdigit() or text[0] in "+-.") and text[-1:] != ":"


def show_report(report: Report) -> None:
    """Print a report's verdicts and how it ends."""
    rows = [(v.word, v.name, v.found, v.bound, v.detail) for v in report.verdicts]
    for found in report.tables:
        table(found.title, found.columns, found.rows)
    if rows:
        title = f"{report.evaluator}: {report.engine} beside {report.reference}"
        table(title, ("verdict", "check", "found", "bound", ""), rows)
    for remark in report.notes:
        if remark not in _noted:
            say(remark)
    count = f"{len(rows)} checks, {len(report.failed)} failed"
    say(count if rows else "nothing was checked")


_shown: list[Bars] = []
"""The bars on the terminal, which hide its cursor until they are stopped."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Take away what bars are left in the end: work that fails or is interrupted ends none."""
    try:
        yield
    finally:
        while _shown:
            _shown.pop().stop()


class ConsoleProgress(Progress):
    """A bar with its rate on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: Any = None
        self._label = self._unit = ""
        self._total = self._done = 0
        self._began = self._told = 0.0

    def start(self, label: str, total: int, *, unit: str = "B") -> None:
        """Begin a bar, or the plain lines of one."""
        self._label, self._unit, self._total, self._done = label, unit, total, 0
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bars = bars(_console(stderr=True), in_bytes=unit == "B")
            self._bars.start()
            _shown.append(self._bars)
            self._task = self._bars.add_task(label, total=total)

    def advance(self, amount: int) -> None:
        """Move the bar; without a terminal, print a line every few seconds."""
        self._done += amount
        if self._bars is not None:
            self._bars.advance(self._task, amount)
        elif self._done < self._total and time.monotonic() - self._told > PLAIN_INTERVAL:
            self._told = time.monotonic()
            note(self._line())

    def finish(self) -> None:
        """End the bar and say how fast it went."""
        if self._bars is not None:
            self._bars.stop()
            _shown.remove(self._bars)
            self._bars = None
        note(self._line())

    def note(self, text: str) -> None:
        """Say one thing beside the bar."""
        note(text)

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        if self._unit == "B":
            done, total = format_bytes(self._done), format_bytes(self._total)
            return f"{self._label}: {done} of {total}, {format_bytes(rate)}/s"
        return f"{self._label}: {self._done} of {self._total} {self._unit}, {rate:.1f}/s"


def bars(shown_on: Console, *, in_bytes: bool) -> Bars:
    """Return rich's bars, counting bytes or plain steps."""
    from rich import progress

    counted: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if in_bytes
        else [progress.MofNCompleteColumn()]
    )
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *counted,
        progress.TimeRemainingColumn(),
        console=shown_on,
        transient=True,
    )
