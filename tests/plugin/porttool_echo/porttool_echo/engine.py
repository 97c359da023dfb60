"""The engine: every token is followed by the one `shift` places on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool import Builder, Runner
from porttool.component import Options

if TYPE_CHECKING:
    from torch import Tensor

    from porttool import Checkpoint, Engine
    from porttool.builder import BuildRequest, Rank
    from porttool.nn import Step
    from porttool.progress import Progress


class EchoOptions(Options):
    """`shift`: how far the next token is from the last."""

    shift: int = 1


class EchoBuilder(Builder):
    """Writes the shift and nothing of the weights."""

    name = "echo"
    Options = EchoOptions
    options: EchoOptions

    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Write echo.json."""
        (out / "echo.json").write_text(json.dumps({"shift": self.options.shift}))
        return {"shift": self.options.shift}


class EchoRunner(Runner):
    """Says the token that comes `shift` after the last one."""

    name = "echo"

    def __init__(self, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(engine, options)
        self.shift = int(json.loads((engine.rank_path() / "echo.json").read_text())["shift"])

    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Return logits that are 1 for the next token and 0 for the others."""
        import torch

        self.check(step)
        n = self.config.vocab_size
        logits = torch.nn.functional.one_hot((step.tokens + self.shift) % n, n).float()
        return logits if all_positions else logits[torch.arange(len(logits)), step.lengths - 1]

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Keep nothing: there is no state to copy."""
