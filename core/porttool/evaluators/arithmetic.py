"""What half precision hides: an engine's arithmetic beside the reference's, both in float32.

The two forms of GELU differ by less than a half-precision engine rounds by. So the canonical
decoder runs as the engine's config says, on the source's own weights in float32, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from porttool.config import ModelConfig
from porttool.evaluator import Verdict
from porttool.evaluators.agreement import TOLERANCES
from porttool.evaluators.logits import judge_logits, measure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from porttool.evaluators.accounting import Derivation
    from porttool.evaluators.logits import LogitError
    from porttool.evaluators.probe import Probe
    from porttool.evaluators.results import Continuation

NAME = "arithmetic in float32"
"""Name of the rung, and of the verdict of `summarize`."""

N_ARTICLES = 4
"""Articles whose chosen tokens are computed once more; each costs a pass through every layer."""


def check_arithmetic(probe: Probe, derivation: Derivation) -> tuple[Verdict, LogitError | None]:
    """Hold an engine's config to the bounds of float32, whatever type its weights have."""
    config = probe.runner.config
    if shapes_of(config) != derivation.shapes:
        return Verdict(
            name=NAME, passed=False, found="other shapes", bound="the source's",
            detail="the engine's config and the source's weights do not fit together",
        ), None  # fmt: skip
    ours = source_logits(derivation, config, probe.prompts, probe.rows)
    error = measure(ours, probe.of_prompts(probe.logits))
    return judge_logits(NAME, error, "float32"), error


def shapes_of(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the name and shape of every canonical tensor of a config."""
    from porttool.nn import canonical_shapes

    return canonical_shapes(config)


def source_logits(
    derivation: Derivation,
    config: ModelConfig,
    prompts: Sequence[list[int]],
    rows: Tensor | None = None,
    *,
    first: Sequence[int] | None = None,
) -> list[Tensor]:
    """Logits [len(prompt) - first, vocab_size] of each prompt from its position `first` on.

    One layer is in memory at a time, and what one prompt needs. `rows` are a prompt table's.
    """
    import torch

    from porttool.nn import Step, meta_decoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = meta_decoder(config).eval()
    decoder.prompt_table = None if rows is None else rows.to(device)
    steps = [Step.prefill([prompt]).to(device) for prompt in prompts]
    with torch.inference_mode():
        for name, module in decoder.named_children():
            if name != "layers":
                fill(module, f"{name}.", derivation, device)
        states = [decoder.embed(step.tokens, step.positions) for step in steps]  # [1, n, d_model]
        for i, layer in enumerate(decoder.layers):
            fill(layer, f"layers.{i}.", derivation, device)
            pairs = zip(states, steps, strict=True)
            states = [layer(x, step.positions, None, step) for x, step in pairs]
            layer.to("meta")
        kept = zip(states, first or [0] * len(states), strict=True)
        return [decoder.logits(decoder.norm(x[0, start:])).cpu() for x, start in kept]


def fill(module: nn.Module, prefix: str, derivation: Derivation, device: str) -> None:
    """Give a module made without memory its weights of the source, in float32."""
    names = module.state_dict()
    weights = {name: derivation.tensor(f"{prefix}{name}").float().to(device) for name in names}
    module.load_state_dict(weights, assign=True)


def judge_chosen(
    derivation: Derivation,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Continuation],
) -> Verdict:
    """Hold what an engine's config makes of the reference's own tokens to the drift of float32."""
    import numpy as np

    pairs = [(list(p), c) for p, c in zip(prompts, reference, strict=True) if c.tokens]
    few = [(p, list(c.tokens), c.logprobs) for p, c in pairs[:N_ARTICLES] if c.logprobs]
    bound = TOLERANCES["float32"].drift
    drift: list[float] = []
    whole, before = [p + t for p, t, _ in few], [len(p) - 1 for p, _, _ in few]
    logits = source_logits(derivation, config, whole, first=before) if few else []
    for row, (_, tokens, wanted) in zip(logits, few, strict=True):
        chosen = row[:-1].log_softmax(-1)[range(len(tokens)), tokens]
        drift += [abs(a - b) for a, b in zip(chosen.tolist(), wanted, strict=True)]
    p99 = float(np.quantile(drift, 0.99)) if drift else 0.0
    return Verdict(
        name=NAME,
        passed=p99 <= bound if drift else None,
        found=f"{p99:.2g}",
        bound=f"99 % ≤ {bound:.2g}",
        detail=f"the engine's config on the source's weights, {len(drift)} tokens of {len(few)} "
        "articles",
    )
