"""Whether the comparison could fail at all."""

from __future__ import annotations

from porttool.testing.parallel import load_rank
from porttool.testing.specimen import Specimen

LEAST = 1e-6
"""A change of logits below this could be missed; 1e-9 is what the kit asks for."""


def inert_tensors(made: Specimen) -> list[str]:
    """Return the canonical tensors whose elements can be reversed without moving a logit."""
    import torch

    from porttool.builder import Rank
    from porttool.nn import Step

    module = load_rank(made.checkpoint, Rank())
    tokens = list(range(min(made.config.vocab_size, 2 * len(made.prompts[2]))))
    step = Step.prefill([tokens[: made.config.n_positions]])
    inert = []
    with torch.inference_mode():
        usual = module(step)
        for name, parameter in module.named_parameters():
            kept = parameter.clone()
            parameter.copy_(kept.flatten().flip(0).view_as(kept))
            if float((module(step) - usual).abs().max()) < LEAST:
                inert.append(name)
            parameter.copy_(kept)
    return inert
