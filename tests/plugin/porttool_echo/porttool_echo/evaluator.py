"""The evaluator: does the engine count as it was built to?"""

from __future__ import annotations

from pathlib import Path

from porttool import Evaluator, Sampling
from porttool.errors import UsageError
from porttool.evaluator import Port, Report, Verdict
from porttool.generate import generate
from porttool.progress import SILENT, Progress


class EchoEvaluator(Evaluator):
    """Continues one token and looks whether each is the one after the last."""

    name = "echo"

    def run(self, port: Port, output: Path, *, progress: Progress = SILENT) -> Report:
        """Compare four tokens with a count."""
        if port.runner is None:
            raise UsageError("echo evaluates an engine: build one first")
        ((found,),) = generate(port.runner, [[1]], Sampling(max_new_tokens=4), eos=())
        verdict = Verdict(
            name="count", passed=found.tokens == (2, 3, 4, 5), found=str(found.tokens),
            bound="(2, 3, 4, 5)",
        )  # fmt: skip
        path = str(port.runner.engine.path)
        return Report(evaluator=self.name, engine=path, reference="counting", verdicts=(verdict,))
