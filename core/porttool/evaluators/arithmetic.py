"""What half precision hides: an engine's arithmetic beside the reference's, both in float32.

The two forms of GELU differ by less than a half-precision engine rounds by. So the canonical
decoder runs as the engine's config says, on the source's own weights in float32, layer by layer.
What the engine's kernels do of it is sought in the engine's logits: rounding goes in every
direction, a mistake always in its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from porttool.config import Dtype, ModelConfig
from porttool.evaluator import Verdict
from porttool.evaluators.agreement import TOLERANCES, drift_of
from porttool.evaluators.hypotheses import small_mistakes
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


HIDDEN = "mistakes below rounding"
"""Name of the rung that looks for a mistake's own direction in an engine's error."""

MAX_SHARE = 0.5
"""Of a small mistake, how much may be in an engine's error: 1 is the mistake, 0 is none."""

MAX_SPREAD = 0.05
"""Standard deviation of that share, from rounding alone, up to which it says something."""


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


def check_hidden(probe: Probe, derivation: Derivation) -> tuple[Verdict, list[str]] | None:
    """Look for small mistakes in a float16 engine's error; return those that are there, too.

    The error beside float32 on the same rounded weights is projected on what each mistake would
    change (a matched filter, North 1943). None where rounding hides all of them.
    """
    config, prompts, rows = derivation.config, probe.prompts, probe.rows
    right = centred(source_logits(derivation, config, prompts, rows, through="float16"))
    error = centred(probe.prefill()) - right
    shares: dict[str, float] = {}
    for mistake in small_mistakes(config):
        wrong = config.model_copy(update=dict(mistake.config))
        made = centred(source_logits(derivation, wrong, prompts, rows, through="float16")) - right
        power = float(made.square().sum())
        n_free = len(error) * min(config.d_model, config.vocab_size)
        if power and float(error.square().sum()) <= MAX_SPREAD**2 * power * n_free:
            shares[mistake.text] = float((error * made).sum()) / power
    if not shares:
        return None
    found = [text for text, share in shares.items() if abs(share) > MAX_SHARE]
    return Verdict(
        name=HIDDEN,
        passed=not found,
        found=", ".join(f"{share:+.2f}" for share in shares.values()),
        bound=f"|share| ≤ {MAX_SHARE:g}",
        detail="; ".join(shares),
    ), found


def centred(logits: Sequence[Tensor]) -> Tensor:
    """Return all positions [n, vocab_size] in float64, each without its mean."""
    import torch

    whole = torch.cat([row.double() for row in logits])
    return whole - whole.mean(-1, keepdim=True)


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
    through: Dtype = "float32",
) -> list[Tensor]:
    """Logits [len(prompt) - first, vocab_size] of each prompt from its position `first` on.

    One layer is in memory at a time, and what one prompt needs. `rows` are a prompt table's.
    Weights are rounded `through` a type.
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
                fill(module, f"{name}.", derivation, device, through)
        states = [decoder.embed(step.tokens, step.positions) for step in steps]  # [1, n, d_model]
        for i, layer in enumerate(decoder.layers):
            fill(layer, f"layers.{i}.", derivation, device, through)
            pairs = zip(states, steps, strict=True)
            states = [layer(x, step.positions, None, step) for x, step in pairs]
            layer.to("meta")
        kept = zip(states, first or [0] * len(states), strict=True)
        return [decoder.logits(decoder.norm(x[0, start:])).cpu() for x, start in kept]


def fill(
    module: nn.Module, prefix: str, derivation: Derivation, device: str, through: Dtype
) -> None:
    """Give a module made without memory its weights of the source, in float32."""
    import torch

    rounded = getattr(torch, through)
    names = module.state_dict()
    weights = {n: derivation.tensor(f"{prefix}{n}").to(rounded).float().to(device) for n in names}
    module.load_state_dict(weights, assign=True)


def judge_chosen(
    derivation: Derivation,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Continuation],
) -> Verdict:
    """Hold what an engine's config makes of the reference's own tokens to the drift of float32."""
    import numpy as np

    pairs = [(p, c) for p, c in zip(prompts, reference, strict=True) if c.tokens]
    few = [(p, c) for p, c in pairs[:N_ARTICLES] if c.logprobs]
    bound = TOLERANCES["float32"].drift
    whole, before = [[*p, *c.tokens] for p, c in few], [len(p) - 1 for p, _ in few]
    logits = source_logits(derivation, config, whole, first=before) if few else []
    found = zip(logits, few, strict=True)
    drift = [each for row, (_, c) in found for each in drift_of(row[:-1], c)]
    p99 = float(np.quantile(drift, 0.99)) if drift else 0.0
    return Verdict(
        name=NAME,
        passed=p99 <= bound if drift else None,
        found=f"{p99:.2g}",
        bound=f"99 % ≤ {bound:.2g}",
        detail=f"the engine's config on the source's weights, {len(drift)} tokens of {len(few)} "
        "articles",
    )
