"""The evaluations that come with porttool, registered like any stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Evaluator

api_version = 1


@hookimpl
def porttool_evaluators() -> Iterable[type[Evaluator]]:
    """Return the evaluators of summaries, of programs and of logits."""
    from porttool.evaluators.infill import InfillEvaluator
    from porttool.evaluators.parity import ParityEvaluator
    from porttool.evaluators.summarize import SummarizeEvaluator

    return [InfillEvaluator, ParityEvaluator, SummarizeEvaluator]
