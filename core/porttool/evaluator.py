"""The contract of an evaluator: measure a port beside its source and come to verdicts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_core import PydanticSerializationError

from porttool.component import Component
from porttool.config import Closed
from porttool.errors import CheckFailed, PluginError, PorttoolError, require_kind
from porttool.progress import SILENT, Progress
from porttool.standing import made_folder, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.converter import Converter
    from porttool.engine import EngineManifest
    from porttool.prompt_table import PromptTable
    from porttool.runner import Runner
    from porttool.text import Tokenizer

REPORT = "report.json"


class Verdict(Closed):
    """One thing that was checked: the number found, the bound it was held to, and the outcome.

    `passed` is None when nothing could be compared; a report with such a verdict fails.
    """

    name: str
    passed: bool | None
    found: str
    bound: str
    detail: str = ""

    @property
    def word(self) -> str:
        """The outcome in a word; what could not be compared fails."""
        return "pass" if self.passed else "FAIL"


class Table(Closed):
    """Rows of text under column heads, for whoever shows a report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Report(Closed):
    """What an evaluation found. `measurements` is the evaluator's own record, JSON all through."""

    evaluator: str
    engine: str
    reference: str
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    measurements: dict[str, Any] = Field(default_factory=dict)

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts that are not yes."""
        return [v for v in self.verdicts if not v.passed]

    @property
    def passed(self) -> bool:
        """True only if something was checked and every verdict is yes."""
        return bool(self.verdicts) and not self.failed

    def require_pass(self) -> None:
        """Raise CheckFailed naming every verdict that is not yes, or that there is none."""
        if self.passed:
            return
        what = "; ".join(
            f"{v.name}: {v.found}, bound {v.bound}" + (f" ({v.detail})" if v.detail else "")
            for v in self.failed
        )
        raise CheckFailed(f"{self.evaluator}: {what or 'nothing was compared'}")


@dataclass(frozen=True)
class Port:
    """An engine beside the source that it came from; either side may be absent.

    `source` is the Hugging Face folder. `converter` reads it, or reads `origin` where the engine
    was converted from something that transformers cannot run, such as a .nemo archive.
    `tokenizer` defaults to the source's own. `manifest` is that of an engine that does not run, so
    that a reference that runs alone cuts its prompts as the engine will. The virtual tokens of a
    `prompt_table` precede every prompt; `taught` are each task's rows in its source. `named` is the
    Hugging Face folder that somebody said is the engine's model, also where it does not run.
    With `compare` both sides are wanted, so that an engine without a source is a mistake.
    """

    runner: Runner | None = None
    tokenizer: Tokenizer | None = None
    source: Path | None = None
    converter: Converter | None = None
    origin: Path | None = None
    manifest: EngineManifest | None = None
    prompt_table: PromptTable | None = None
    taught: Mapping[str, Tensor] | None = None
    named: Path | None = None
    compare: bool = False

    @property
    def engine(self) -> EngineManifest | None:
        """The engine's manifest, also where it does not run."""
        return self.runner.engine.manifest if self.runner else self.manifest


class Evaluator(Component):
    """Compares an engine with its source. Either side may come from a saved result."""

    @abstractmethod
    def run(self, port: Port, output: Path, *, progress: Progress = SILENT) -> Report:
        """Evaluate, and leave whatever files belong to the report in `output`, which exists.

        What is missing and cannot be done without is a UsageError saying how to get it.
        """


EXPORTED = "or make one with `porttool export CHECKPOINT --format huggingface`"
"""Where a Hugging Face folder comes from if the source is none."""


def missing_side(port: Port, command: str) -> str:
    """Say what a command lacks, and why the recorded source is not it."""
    said = (
        f"{command} needs the engine and the Hugging Face folder that it came from; name the "
        "folder with --hf-model"
    )
    recorded = port.runner.engine.manifest.source.path if port.runner else None
    if recorded is None or (Path(recorded) / "config.json").is_file():
        return said
    there = Path(recorded).exists()
    why = (
        "has no config.json, so that transformers cannot run it" if there else "is no longer there"
    )
    made = f", {EXPORTED}" if there else ""
    return f"{recorded}, which the engine was converted from, {why}: {said}{made}"


def evaluate(
    evaluator: Evaluator, port: Port, output: Path, *, progress: Progress = SILENT
) -> Report:
    """Run an evaluator and keep its report as `report.json` in `output`.

    One that is refused leaves no empty folder.
    """
    with made_folder(output):
        report = evaluator.run(port, output, progress=progress)
        require_kind(report, Report, f"{type(evaluator).__qualname__}.run")
        with telling(report, progress):
            write_whole(output / REPORT, text_of(report))
    return report


def text_of(report: Report) -> str:
    """Return a report's JSON; PluginError where its measurements are none."""
    try:
        return report.model_dump_json(indent=1) + "\n"
    except PydanticSerializationError as error:
        raise PluginError(
            f"the evaluator {report.evaluator!r} measured what JSON cannot hold: {error}"
        ) from error


@contextmanager
def telling(report: Report, progress: Progress) -> Iterator[None]:
    """Tell the verdicts of a report that cannot be written (the disk became full, say).

    The work is not lost then; the error is raised all the same.
    """
    try:
        yield
    except PorttoolError:
        for verdict in report.verdicts:
            said = f"{verdict.name}: {verdict.found}, bound {verdict.bound}"
            progress.note(f"{verdict.word}: {said}")
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Its folder is made: another run that had made it and failed takes it away while it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")
