"""Why an engine is not the same model: where the two part, and which mistake explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from porttool.config import Dtype, ModelConfig
from porttool.evaluators.arithmetic import NAME, shapes_of, source_logits
from porttool.evaluators.hypotheses import MAX_PARAMETERS, find_mistake
from porttool.evaluators.logits import BOUNDS, first_wrong, measure
from porttool.evaluators.matching import match_by_weights
from porttool.evaluators.reference import ReferenceModel
from porttool.evaluators.stages import Parting, StageMap, compare_stages, find_parting

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.evaluators.accounting import Derivation
    from porttool.evaluators.parity import Findings
    from porttool.evaluators.probe import Probe


@dataclass(frozen=True)
class Subject:
    """What is diagnosed: an engine, or its config on the source's weights in float32.

    `logits` are its own of the prompts; `weights` says whose weights the decoder is traced with.
    """

    probe: Probe
    derivation: Derivation
    logits: Sequence[Tensor]
    weights: Literal["engine", "source"]

    @classmethod
    def of(cls, probe: Probe, derivation: Derivation) -> Self:
        """Take the engine itself, traced if its runner can do that."""
        whose: Literal["engine", "source"] = "engine" if probe.runner.traces else "source"
        return cls(probe, derivation, probe.prefill(), whose)

    @classmethod
    def of_config(cls, probe: Probe, derivation: Derivation) -> Self:
        """Take what the engine's config makes of the source."""
        logits = source_logits(derivation, probe.runner.config, probe.prompts, probe.rows)
        return cls(probe, derivation, logits, "source")

    @property
    def worst(self) -> int:
        """The prompt whose logits are furthest off."""
        return measure(self.logits, self.probe.of_prompts(self.probe.logits)).row

    @property
    def dtype(self) -> Dtype:
        """Type that the decoder is traced in."""
        return "float32" if self.weights == "source" else self.probe.runner.engine.manifest.dtype

    def trace(self, tokens: list[int]) -> dict[str, Tensor]:
        """Trace the canonical decoder as the engine's config says."""
        from porttool.nn import Step

        probe, virtual = self.probe, self.probe.virtual
        if self.weights == "engine":
            found = probe.runner.trace(Step.prefill([tokens]))
        else:
            found = trace_source(self.derivation, probe.runner.config, tokens, probe.rows)
        if virtual is not None:
            taught, embedded = self.weights == "source", found["embedding.out"]
            found["embedding.out"] = virtual.fill(embedded, tokens, taught=taught)
        return found


def diagnose(
    probe: Probe, derivation: Derivation | None, findings: Findings, *, named: bool
) -> None:
    """Say where the two first part and what the likely cause is.

    The place is found by the family's rules if they are `named` for the Hugging Face folder's
    modules, else by the weights that those hold.
    """
    stepwise = ("decode", "decode, several tokens a step")
    if findings.failed("prefill") and derivation is None:
        findings.notes.append("where the two part cannot be said without the family's rules")
    elif findings.failed("prefill") and derivation is not None:
        accuse(Subject.of(probe, derivation), findings, named=named)
    elif findings.failed(*stepwise):
        cause, note = explain_decode(probe)
        findings.notes.append(note)
        findings.measurements["cause"] = cause
    elif findings.failed("greedy tokens"):
        findings.notes.append(
            "the logits agree but the tokens do not: look at how the runner decodes by itself, "
            "or at what the generation loop does with its logits"
        )
    elif NAME in findings.measurements and findings.failed(NAME) and derivation is not None:
        accuse(Subject.of_config(probe, derivation), findings, named=named)


def accuse(subject: Subject, findings: Findings, *, named: bool) -> None:
    """Name the first operation where the two part, and the one mistake that explains it all."""
    parting, note = locate(subject, named=named)
    if parting is None and findings.failed("config", "weights"):
        note = "no one operation stands out: begin with the config and weights that differ"
    findings.notes.append(note)
    findings.measurements["first_difference"] = parting.stage.name if parting else None
    mistake = suspect(subject)
    if mistake:
        findings.notes.append(f"cause: {mistake}")
        findings.measurements["cause"] = mistake


def locate(subject: Subject, *, named: bool = True) -> tuple[Parting | None, str]:
    """Find the first operation where the two part; return it and a sentence about it.

    `named` says that the family's rules name the reference's modules; else weights tell them.
    """
    probe, derivation = subject.probe, subject.derivation
    wide = probe.reference()
    stage_map = (
        StageMap.of(derivation.rules) if named else match_by_weights(derivation, wide.weights())
    )
    if not stage_map.places:
        return None, (
            "where the two part cannot be said: no module of the Hugging Face folder holds the "
            "weights that the engine was converted from"
        )
    tokens = probe.prompts[subject.worst]

    def trace(model: ReferenceModel) -> dict[str, Tensor]:
        return stage_map.arrange(model.trace(tokens, stage_map.modules), derivation.config)

    own = None
    if probe.own is not None and subject.weights == "engine":
        own = trace(probe.reference(subject.dtype))
    stages = compare_stages(subject.trace(tokens), trace(wide), subject.dtype, own)
    parting = find_parting(stages)
    if parting is not None:
        return parting, parting.text
    return None, (
        f"the canonical decoder on the {subject.weights}'s weights agrees with the reference at "
        f"every stage; the fault is in the {probe.runner.name} engine's own arithmetic (its "
        "kernels, its graph, or how it feeds tokens and positions)"
    )


def trace_source(
    derivation: Derivation, config: ModelConfig, tokens: list[int], rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Trace the canonical decoder on weights made of the source; its own config if they need it."""
    from porttool.nn import Step, meta_decoder
    from porttool.nn.trace import traced

    fits = shapes_of(config) == derivation.shapes
    decoder = meta_decoder(config if fits else derivation.config).eval()
    decoder.load_state_dict(source_weights(derivation), assign=True)
    decoder.prompt_table = rows
    return traced(decoder, Step.prefill([tokens]))


def source_weights(derivation: Derivation) -> dict[str, Tensor]:
    """Make every canonical tensor, in float32."""
    return {name: derivation.tensor(name).float() for name in derivation.shapes}


def suspect(subject: Subject) -> str | None:
    """Return the one mistake that explains the logits, if there is such a one."""
    derivation = subject.derivation
    if sum(math.prod(s) for s in derivation.shapes.values()) > MAX_PARAMETERS:
        return None
    row, weights = subject.worst, source_weights(derivation)
    tokens, engine = subject.probe.prompts[row], subject.logits[row]
    return find_mistake(derivation.config, weights, tokens, engine, rows=subject.probe.rows)


def explain_decode(probe: Probe) -> tuple[str, str]:
    """Name the likely cause of wrong decoding beside a right prefill, and say where it begins.

    A cache or positions that are wrong make logits jump; a decoder's own arithmetic lets all drift.
    """
    bound = BOUNDS[probe.runner.engine.manifest.dtype]
    theirs = probe.of_continuations(probe.logits)
    for width in (1, 3):
        ours = probe.decode(width)
        wrong = [
            (row, first_wrong(a, b, bound.worst))
            for row, (a, b) in enumerate(zip(ours, theirs, strict=True))
        ]
        bad = [(row, at) for row, at in wrong if at is not None]
        if bad:
            row, at = min(bad, key=lambda found: found[1])
            rows = f"{len(bad)} of {len(wrong)} prompts"
            shape = "one token a step" if width == 1 else "several tokens a step"
            return "cache", (
                f"prefill agrees but decode does not, with {shape}: {rows}, first in prompt {row} "
                f"at new token {at}; likely the cache (what is written where, how far it is read) "
                "or the positions of later tokens"
            )
    return "arithmetic of decode", (
        "prefill agrees but decode drifts beyond its bound without a jump; likely the arithmetic "
        "of decode alone: its precision, or a constant of its activation or norms"
    )
