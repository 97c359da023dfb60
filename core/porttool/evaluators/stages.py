"""Where two models part: what goes into and comes out of every operation, compared in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from porttool.config import Dtype, ModelConfig
from porttool.weights import Take, as_is, concat, interleaved_qkv, transpose

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.weights import Via

BASE: dict[Dtype, float] = {
    "float64": 1e-11, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1,
}  # fmt: skip
"""Relative error of a stage, ||a - b|| / ||b||, up to which it agrees without a yardstick."""

FACTOR = 3.0
"""How many times the reference's own error in the engine's type a stage may have."""

FLOOR = 1e-5
"""A relative error that is never held against a stage in half precision."""

RULE = "or a weight rule that names another module than this"
"""The reference's stages are found by the family's rules: a wrong one shows as a wrong input."""

CAUSES = (
    ("embedding.out", "the token embedding's weights, or a prompt table's rows"),
    ("position.out", "positions: an offset, or the position table"),
    ("norm1.out", "the norm before attention: its weight, bias, epsilon or kind"),
    ("norm2.out", "the norm before the MLP: its weight, bias, epsilon or kind"),
    ("norm1.in", f"what goes into the layer: embeddings, positions or a residual sum, {RULE}"),
    ("norm2.in", f"the residual sum after attention, {RULE}"),
    ("attention.qkv.out", "the query, key and value projection: weights, bias or order of rows"),
    (
        "attention.out.in",
        "inside attention: scale, mask, positions, grouping of heads, or query, "
        "key and value taken for one another by a weight rule",
    ),
    ("attention.out.out", "attention's output projection: weights or bias"),
    ("mlp.up.out", "the MLP's first projection: weights or bias"),
    ("mlp.down.in", "the activation, or a gated MLP's halves"),
    ("mlp.down.out", "the MLP's second projection: weights or bias"),
    ("norm.in", f"the residual sum after the last layer, {RULE}"),
    ("norm.out", "the final norm: its weight, bias, epsilon or kind"),
    ("logits", "the head's weights"),
)
"""End of a stage's name → what is wrong if everything before it agrees."""

UNSEEN = {
    "attention.out.in": ("attention.qkv.out", "the query, key and value projection"),
    "mlp.down.in": ("mlp.up.out", "the MLP's first projection"),
}
"""End of a stage's name → the stage before it, and what else is wrong if that is not compared."""


@dataclass(frozen=True)
class Place:
    """The reference's modules that do what a canonical module does.

    `order` makes the canonical output's rows of theirs; None where the outputs do not correspond.
    """

    names: tuple[str, ...]
    order: Via | None = field(default=as_is)


@dataclass(frozen=True)
class StageMap:
    """Where canonical modules are in the reference."""

    places: Mapping[str, Place]

    @classmethod
    def of(cls, rules: Mapping[str, Take]) -> StageMap:
        """Read the map off a family's rules, which name the modules of the reference itself."""
        places = {}
        for name, rule in rules.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and all(n.endswith(".weight") for n in rule.names):
                names = tuple(n.removesuffix(".weight") for n in rule.names)
                places[module] = Place(names, output_order(module, names, rules))
        return cls(places)

    @property
    def modules(self) -> dict[str, str]:
        """Name in a trace → module of the reference, for each of a place's modules."""
        return {
            part(module, i): name
            for module, place in self.places.items()
            for i, name in enumerate(place.names)
        }

    def arrange(self, trace: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Make of a trace of `modules` the stages that correspond, in canonical order of rows."""
        found = {"logits": trace["logits"]}
        for module, place in self.places.items():
            if f"{module}.in" in trace:
                found[f"{module}.in"] = trace[f"{module}.in"]
            outputs = [trace.get(f"{part(module, i)}.out") for i in range(len(place.names))]
            seen = [t.flatten(0, -2).t() for t in outputs if t is not None]  # [rows, tokens] each
            if place.order is None or len(seen) < len(place.names):
                continue
            try:
                found[f"{module}.out"] = place.order(config, seen).t()
            except (RuntimeError, ValueError, IndexError):
                continue  # the rule is for weights alone
        return found


def part(module: str, index: int) -> str:
    """Name one of the reference's modules in a trace; the first has the canonical name."""
    return f"{module}|{index}" if index else module


def output_order(module: str, names: tuple[str, ...], rules: Mapping[str, Take]) -> Via | None:
    """Return how the reference's outputs become canonical ones: as its bias does, if it has one.

    A matrix may be turned besides, and what turns it says nothing about the order of outputs.
    """
    if module.rpartition(".")[2].startswith(("norm", "embedding", "position")):
        return as_is
    bias = rules.get(f"{module}.bias")
    if bias is not None and bias.names == tuple(f"{name}.bias" for name in names):
        return bias.via
    via = rules[f"{module}.weight"].via
    if via in (as_is, transpose) and len(names) == 1:
        return as_is
    return via if via in (concat, interleaved_qkv) else None


@dataclass(frozen=True)
class Stage:
    """A stage and how far the engine is from the reference there.

    `nonfinite` says on which side something is NaN or infinite there, if it is.
    """

    name: str
    error: float
    bound: float
    nonfinite: str = ""

    @property
    def agrees(self) -> bool:
        """True if the error is no more than rounding."""
        return self.error <= self.bound and not self.nonfinite

    @property
    def text(self) -> str:
        """How far off it is, in words."""
        return f"NaN or infinity {self.nonfinite}" if self.nonfinite else f"off by {self.error:.1e}"


def compare_stages(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    dtype: Dtype,
    own: Mapping[str, Tensor] | None = None,
) -> list[Stage]:
    """Compare all stages that correspond and are in both, in the order in which they happen.

    `own` is the reference's trace in the engine's type: what it is off by is allowed for.
    """
    stages = []
    for name, ours_at in ours.items():
        theirs_at = theirs.get(name)
        if theirs_at is None or not ours_at.is_floating_point():
            continue
        if theirs_at.numel() != ours_at.numel():
            continue
        bound = BASE[dtype]
        if own and name in own:
            bound = max(FLOOR, FACTOR * relative_error(own[name], theirs_at))
        nonfinite = nonfinite_side(ours_at, theirs_at)
        stages.append(Stage(name, relative_error(ours_at, theirs_at), bound, nonfinite))
    return stages


def nonfinite_side(ours: Tensor, theirs: Tensor) -> str:
    """Say on which side something is NaN or infinite; nothing where nothing is."""
    wild = (not ours.isfinite().all(), not theirs.isfinite().all())
    return {
        (True, True): "on both sides",
        (True, False): "on the engine's side alone",
        (False, True): "on Hugging Face's side alone",
    }.get(wild, "")


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
        return f"first differs at {self.stage.name} ({self.stage.text}{after}); likely {self.cause}"


def find_parting(stages: list[Stage]) -> Parting | None:
    """Return where the two sides part, or None if every stage agrees."""
    for index, stage in enumerate(stages):
        if not stage.agrees:
            after = stages[index - 1].name if index else None
            return Parting(stage, after, likely_cause(stage.name, after))
    return None


def likely_cause(stage: str, after: str | None = None) -> str:
    """Return what a difference that begins at a stage points to, if `after` still agrees."""
    cause = next((text for end, text in CAUSES if stage.endswith(end)), "an operation before it")
    for end, (projection, text) in UNSEEN.items():
        if stage.endswith(end) and not (after or "").endswith(projection):
            return f"{text}, or {cause}"
    return cause
