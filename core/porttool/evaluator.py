"""The contract of an evaluator: measure a port beside its reference and come to a verdict."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from porttool.component import Component
from porttool.config import Closed
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from porttool.runner import Runner
    from porttool.text import Tokenizer


class Verdict(Closed):
    """One thing that was checked: the number found, the bound it was held to, and the outcome.

    `passed` is None when nothing could be compared; a report with such a verdict fails.
    """

    name: str
    passed: bool | None
    found: str
    bound: str
    detail: str = ""


class Report(Closed):
    """What an evaluation found. `measurements` is the evaluator's own record, JSON all through."""

    evaluator: str
    engine: str
    reference: str
    verdicts: tuple[Verdict, ...]
    measurements: dict[str, Any] = Field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only if something was checked and every verdict is yes."""
        return bool(self.verdicts) and all(v.passed is True for v in self.verdicts)


class Evaluator(Component):
    """Compares a runner with a reference model. Either side may come from a saved result."""

    @abstractmethod
    def run(
        self,
        *,
        runner: Runner | None,
        tokenizer: Tokenizer | None,
        reference: Path | None,
        output: Path,
        progress: Progress = SILENT,
    ) -> Report:
        """Evaluate and leave the report's files in `output`.

        `reference` is a Hugging Face folder. A missing side must have been saved in `output` by
        an earlier run; if it was not, that is a UsageError saying which command makes it.
        """
