"""A reference's run that was stopped: kept batch by batch, so that the next run goes on with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, ValidationError

from porttool.config import Closed
from porttool.errors import PorttoolError, said_by_system
from porttool.evaluator import write_whole
from porttool.evaluators.results import Continuation, Kept, Task


class Begun(Closed):
    """Of which run the batches are: another one begins anew.

    `source` is the folder's `fingerprint`, which sees every change of a file. Batches are padded
    together, so that other batches may have other continuations.
    """

    format: Literal["porttool-unfinished"] = "porttool-unfinished"
    description: str
    source: str
    batch_size: PositiveInt
    task: Task


class Batch(Kept):
    """Continuations of the prompts from the `first` on, and how long they took."""

    first: int
    seconds: float
    continuations: tuple[Continuation, ...]


def unfinished_file(folder: Path) -> Path:
    """Return where batches are kept until there is a result."""
    return folder / "reference.unfinished.jsonl"


class Unfinished:
    """The batches that are done, in a folder's `unfinished_file`: a line each.

    `batches` begin with those that an earlier run of the same kind has left there; `replaces` says
    that the file is of a run of another kind.
    """

    def __init__(self, folder: Path, begun: Begun) -> None:
        self.path, self.begun = unfinished_file(folder), begun
        self._head = begun.model_dump_json()
        self.batches: list[Batch] = []
        self.replaces = False
        self._read()
        self._ours = False  # the file is this run's, and whole

    @property
    def n_done(self) -> int:
        """Prompts that have been continued."""
        return sum(len(batch.continuations) for batch in self.batches)

    @property
    def seconds(self) -> float:
        """How long that took."""
        return sum(batch.seconds for batch in self.batches)

    @contextmanager
    def told_when_stopped(self) -> Iterator[None]:
        """Let Ctrl-C say what is kept."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.n_done:
                stop.add_note(f"{self.path} keeps {self.n_done} prompts: the same command goes on")
            raise

    def add(self, found: Sequence[Continuation], seconds: float) -> None:
        """Keep the next batch; PorttoolError where the system refuses."""
        batch = Batch(first=self.n_done, seconds=seconds, continuations=tuple(found))
        self.batches.append(batch)
        if not self._ours:
            lines = [self._head, *(batch.model_dump_json() for batch in self.batches)]
            write_whole(self.path, "".join(f"{line}\n" for line in lines))
            self._ours = True
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{batch.model_dump_json()}\n")
        except OSError as error:
            error.filename = str(self.path)
            raise PorttoolError(said_by_system(error)) from error

    def _read(self) -> None:
        """Take what another run left, up to the first line that was cut off.

        Two runs at once may have left their lines among each other's.
        """
        if not self.path.is_file():
            return
        head, *lines = self.path.read_bytes().splitlines() or [b""]
        self.replaces = head != self._head.encode()
        for line in [] if self.replaces else lines:
            try:
                batch = Batch.model_validate_json(line)
            except ValidationError:
                return
            if batch.first != self.n_done:
                return
            self.batches.append(batch)
