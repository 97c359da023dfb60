"""Where two models part: what goes into and comes out of every operation, compared in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from porttool.config import Dtype
from porttool.weights import Take, as_is, transpose

if TYPE_CHECKING:
    from torch import Tensor

BASE: dict[Dtype, float] = {
    "float64": 1e-11, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1,
}  # fmt: skip
"""Relative error of a stage, ||a - b|| / ||b||, up to which it agrees without a yardstick."""

FACTOR = 3.0
"""How many times the reference's own error in the engine's type a stage may have."""

FLOOR = 1e-5
"""A relative error that is never held against a stage in half precision."""

CAUSES = (
    ("embedding.out", "the token embedding's weights"),
    ("position.out", "positions: an offset, or the position table"),
    ("norm1.out", "the norm before attention: its weight, bias, epsilon or kind"),
    ("norm2.out", "the norm before the MLP: its weight, bias, epsilon or kind"),
    ("norm1.in", "what goes into the layer: embeddings, positions or a residual sum"),
    ("norm2.in", "the residual sum after attention"),
    ("attention.qkv.out", "the query, key and value projection: weights, bias or order of rows"),
    ("attention.out.in", "inside attention: scale, mask, positions or grouping of heads"),
    ("attention.out.out", "attention's output projection: weights or bias"),
    ("mlp.up.out", "the MLP's first projection: weights or bias"),
    ("mlp.down.in", "the activation, or a gated MLP's halves"),
    ("mlp.down.out", "the MLP's second projection: weights or bias"),
    ("norm.in", "the residual sum after the last layer"),
    ("norm.out", "the final norm: its weight, bias, epsilon or kind"),
    ("logits", "the head's weights"),
)
"""End of a stage's name → what is wrong if everything before it agrees."""


@dataclass(frozen=True)
class StageMap:
    """Where canonical modules are in the source.

    Outputs are compared only where one source tensor makes one canonical tensor in its own
    order; of fused or permuted projections only the inputs correspond.
    """

    modules: Mapping[str, str]
    outputs: frozenset[str]

    @classmethod
    def of(cls, rules: Mapping[str, Take]) -> StageMap:
        """Read the map off the family's rules."""
        modules, outputs = {}, set()
        for name, rule in rules.items():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or not rule.names[0].endswith(".weight"):
                continue
            modules[module] = rule.names[0].removesuffix(".weight")
            whole = len(rule.names) == 1 and rule.via in (as_is, transpose)
            if whole or module.rpartition(".")[2].startswith("norm"):
                outputs.add(module)
        return cls(modules, frozenset(outputs))

    def keeps(self, stage: str) -> bool:
        """Return true if a stage is the same thing on both sides."""
        module, _, end = stage.rpartition(".")
        return stage == "logits" or end == "in" or module in self.outputs


@dataclass(frozen=True)
class Stage:
    """A stage and how far the engine is from the reference there."""

    name: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """True if the error is no more than rounding."""
        return self.error <= self.bound


def compare_stages(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    stage_map: StageMap,
    dtype: Dtype,
    own: Mapping[str, Tensor] | None = None,
) -> list[Stage]:
    """Compare all stages that correspond, in the order in which they happen.

    `own` is the reference's trace in the engine's type: what it is off by is allowed for.
    """
    stages = []
    for name, ours_at in ours.items():
        theirs_at = theirs.get(name)
        if theirs_at is None or not stage_map.keeps(name) or not ours_at.is_floating_point():
            continue
        if theirs_at.numel() != ours_at.numel():
            continue
        bound = BASE[dtype]
        if own and name in own:
            bound = max(FLOOR, FACTOR * relative_error(own[name], theirs_at))
        stages.append(Stage(name, relative_error(ours_at, theirs_at), bound))
    return stages


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; infinite where something is not a number."""
    a, b = found.double().flatten(), wanted.double().flatten()
    norm = float(b.norm())
    error = float((a - b).norm()) / (norm or 1.0)
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Parting:
    """The first stage that differs, the last before it that agrees, and the likely cause."""

    stage: Stage
    after: str | None
    cause: str

    @property
    def text(self) -> str:
        """One sentence for the report."""
        after = f", {self.after} still agrees" if self.after else ""
        return (
            f"first differs at {self.stage.name} (off by {self.stage.error:.1e}{after}); "
            f"likely {self.cause}"
        )


def find_parting(stages: list[Stage]) -> Parting | None:
    """Return where the two sides part, or None if every stage agrees."""
    for index, stage in enumerate(stages):
        if not stage.agrees:
            after = stages[index - 1].name if index else None
            return Parting(stage, after, likely_cause(stage.name))
    return None


def likely_cause(stage: str) -> str:
    """Return what a difference that begins at a stage points to."""
    return next((cause for end, cause in CAUSES if stage.endswith(end)), "an operation before it")
