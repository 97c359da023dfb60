"""Why an engine is not the same model: where the two part, and which mistake explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool.evaluators.hypotheses import MAX_PARAMETERS, find_mistake
from porttool.evaluators.logits import BOUNDS, LogitError, measure
from porttool.evaluators.matching import match_by_weights
from porttool.evaluators.reference import ReferenceModel
from porttool.evaluators.stages import Parting, StageMap, compare_stages, find_parting

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.evaluators.accounting import Derivation
    from porttool.evaluators.probe import Probe


def locate(
    probe: Probe, derivation: Derivation, *, named: bool = True
) -> tuple[Parting | None, str]:
    """Find the first operation where the two part; return it and a sentence about it.

    `named` says that the family's rules name the reference's modules; else weights tell them.
    """
    from porttool.nn import Step

    wide = ReferenceModel(probe.source, device=probe.device)
    rules = StageMap.of(derivation.rules)
    stage_map = rules if named else match_by_weights(derivation, wide.weights())
    if not stage_map.places:
        return None, (
            "where the two part cannot be said: no module of the Hugging Face folder holds the "
            "weights that the engine was converted from"
        )
    tokens = probe.prompts[worst_row(probe)]
    dtype = probe.runner.engine.manifest.dtype
    if probe.runner.traces:
        ours, of = probe.runner.trace(Step.prefill([tokens])), "the engine's weights"
    else:
        ours, of = trace_source(derivation, tokens), "the source's weights"
        dtype = "float32"

    def trace(model: ReferenceModel) -> dict[str, Tensor]:
        return stage_map.arrange(model.trace(tokens, stage_map.modules), derivation.config)

    own = None
    if probe.own is not None and probe.runner.traces:
        own = trace(ReferenceModel(probe.source, dtype=dtype, device=probe.device))
    parting = find_parting(compare_stages(ours, trace(wide), dtype, own))
    if parting is not None:
        return parting, parting.text
    return None, (
        f"the canonical decoder on {of} agrees with the reference at every stage; the fault is in "
        f"the {probe.runner.name} engine's own arithmetic (its kernels, its graph, or how it "
        "feeds tokens and positions)"
    )


def trace_source(derivation: Derivation, tokens: list[int]) -> dict[str, Tensor]:
    """Trace the canonical decoder on weights made of the source."""
    import torch

    from porttool.nn import Decoder, Step
    from porttool.nn.trace import traced

    with torch.device("meta"):
        decoder = Decoder(derivation.config).eval()
    decoder.load_state_dict(source_weights(derivation), assign=True)
    return traced(decoder, Step.prefill([tokens]))


def source_weights(derivation: Derivation) -> dict[str, Tensor]:
    """Make every canonical tensor, in float32."""
    return {name: derivation.tensor(name).float() for name in derivation.shapes}


def worst_row(probe: Probe) -> int:
    """Return the prompt whose prefill is furthest off."""
    return measure(probe.prefill(), probe.of_prompts(probe.logits)).row


def suspect(probe: Probe, derivation: Derivation) -> str | None:
    """Return the one mistake that explains the engine's prefill, if there is such a one."""
    import math

    if sum(math.prod(s) for s in derivation.shapes.values()) > MAX_PARAMETERS:
        return None
    row = worst_row(probe)
    weights = source_weights(derivation)
    return find_mistake(derivation.config, weights, probe.prompts[row], probe.prefill()[row])


def explain_decode(probe: Probe) -> str:
    """Say from where on decoding goes wrong although prefill is right: the cache, or positions."""
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
            return (
                f"prefill agrees but decode does not, with {shape}: {rows}, first in prompt {row} "
                f"at new token {at}; likely the cache (what is written where, how far it is read) "
                "or the positions of later tokens"
            )
    return "prefill agrees but decode drifts beyond its bound without a jump; likely precision"


def first_wrong(ours: Tensor, theirs: Tensor, bound: float) -> int | None:
    """Return the first position whose logits are off by more than the bound over their scale."""
    for at in range(len(ours)):
        error: LogitError = measure([ours[at : at + 1]], [theirs[at : at + 1]])
        if error.worst > bound:
            return at
    return None
