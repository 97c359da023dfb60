"""How far an engine is right: prompts up to the longest that it takes, and what follows that."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Self

from porttool.evaluators.logits import bound_for, first_wrong, judge_logits, make_step, measure

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.config import Dtype
    from porttool.evaluator import Verdict
    from porttool.evaluators.logits import LogitError
    from porttool.evaluators.reference import ReferenceModel
    from porttool.progress import Progress
    from porttool.runner import Runner

NAME = "long contexts"
"""Name of the rung."""


@dataclass
class Reach:
    """Random tokens that fill an engine: prompts of some `lengths`, the longest one continued.

    lengths   of prompts, each twice as long as the one before, up to all that the engine takes
    n_new     tokens that follow the longest, one a step
    logits    the reference's behind each prompt and each new token, [len(lengths) + n_new, vocab]
    own       the same from the reference in the engine's type, where that is asked for
    """

    tokens: list[int]
    lengths: list[int]
    n_new: int
    logits: Tensor
    own: Tensor | None = None

    @classmethod
    def make(
        cls, runner: Runner, model: ReferenceModel, *, covered: int, n_new: int, seed: int
    ) -> Self | None:
        """Let the reference run behind what is `covered` already; None if nothing is left."""
        config, limits = runner.config, runner.engine.manifest.limits
        longest = min(limits.max_input_len, config.n_positions - n_new)
        if longest <= covered:
            return None
        lengths = [longest]
        while lengths[0] // 2 > covered:
            lengths.insert(0, lengths[0] // 2)
        random = Random(seed)
        tokens = [random.randrange(config.vocab_size) for _ in range(longest + n_new)]
        return cls(tokens, lengths, n_new, model.logits(tokens, positions_of(lengths, n_new)))

    def run(self, model: ReferenceModel) -> None:
        """Let the reference run in the engine's type."""
        self.own = model.logits(self.tokens, positions_of(self.lengths, self.n_new))

    def engine_logits(self, runner: Runner, progress: Progress) -> Tensor:
        """Return the engine's logits, of the shape of `logits`."""
        import torch

        progress.start(NAME, sum(self.lengths) + self.n_new, unit="tokens")
        logits = []
        parts = [(0, length) for length in self.lengths]
        parts += [(self.lengths[-1] + i, 1) for i in range(self.n_new)]
        for at, n in parts:
            logits.append(runner.step(make_step(runner, [self.tokens], [at], [n], None)).cpu())
            progress.advance(n)
        progress.finish()
        return torch.cat(logits)

    def judge(self, runner: Runner, progress: Progress) -> tuple[Verdict, LogitError, str]:
        """Compare; return the verdict, the error, and where the two part if they do."""
        dtype: Dtype = runner.engine.manifest.dtype
        ours = self.engine_logits(runner, progress)
        error = measure([ours], [self.logits])
        yardstick = None if self.own is None else measure([self.own], [self.logits])
        verdict = judge_logits(NAME, error, dtype, yardstick)
        prompts = ", ".join(map(str, self.lengths))
        detail = f"prompts of {prompts} tokens, {self.n_new} more; {verdict.detail}"
        first = first_wrong(ours, self.logits, bound_for(dtype, yardstick).worst)
        where = "" if verdict.passed else self.describe(error.position if first is None else first)
        return verdict.model_copy(update={"detail": detail}), error, where

    def describe(self, at: int) -> str:
        """Say up to where the two agree, if they first part at a position of `logits`."""
        if at >= len(self.lengths):
            return (
                f"prompts of up to {self.lengths[-1]} tokens agree, what follows does not, from "
                f"new token {at - len(self.lengths)} on; likely the cache, or positions, that far"
            )
        before = f"a prompt of {self.lengths[at - 1]} tokens agrees" if at else "shorter ones agree"
        return (
            f"a prompt of {self.lengths[at]} tokens does not agree, {before}; likely what the "
            "engine does with long contexts alone: tiles, buffers, positions, masks"
        )


def positions_of(lengths: list[int], n_new: int) -> list[int]:
    """Return the last position of every prompt, and the new ones."""
    return [*(length - 1 for length in lengths), *range(lengths[-1], lengths[-1] + n_new)]
