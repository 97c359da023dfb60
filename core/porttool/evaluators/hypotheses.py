"""Testing causes: which single mistake, made on purpose, gives the engine's logits?

The canonical decoder is run on the source's own weights with one thing wrong at a time. A mistake
that explains the engine's logits almost completely is named with confidence, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from porttool.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]

EXPLAINED = 0.1
"""Share of the engine's relative error that may be left for a mistake to count as its cause."""

MAX_PARAMETERS = 2_000_000_000
"""Larger models are not tried: every mistake costs one pass in float32 on the CPU."""


def unchanged(weights: Weights) -> Weights:
    """Leave the weights as they are."""
    return weights


@dataclass(frozen=True)
class Mistake:
    """One thing done wrong, in the config or in the weights."""

    text: str
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[Weights], Weights] = unchanged


def mistakes(config: ModelConfig) -> Iterator[Mistake]:
    """Yield the mistakes that are made when a model like this one is ported."""
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        if activation != config.activation:
            yield Mistake(
                f"the activation is {activation}, not {config.activation}",
                {"activation": activation},
            )
    unscaled = config.attention_scale == 1
    scale = config.head_dim**-0.5 if unscaled else 1.0
    yield Mistake("attention is scaled" if unscaled else "attention is not scaled",
                  {"attention_scale": scale})  # fmt: skip
    if config.inverse_layer_scale:
        yield Mistake("attention lacks the factor 1/(layer + 1)", {"inverse_layer_scale": False})
    else:
        yield Mistake("attention has a factor 1/(layer + 1)", {"inverse_layer_scale": True})
    if config.position == "learned":
        yield Mistake("positions are one too high", weights=partial(shifted_positions, by=1))
        yield Mistake("positions are one too low", weights=partial(shifted_positions, by=-1))
    yield Mistake("norm1 and norm2 are swapped", weights=swapped_norms)
    if config.gated:
        yield Mistake("the MLP's gate and linear half are swapped", weights=swapped_halves)
    yield from norm_mistakes(config)
    yield from rotary_mistakes(config)


def small_mistakes(config: ModelConfig) -> Iterator[Mistake]:
    """Yield what is less than a half-precision type rounds; of an epsilon, any that is wrong."""
    twin = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}.get(config.activation)
    if twin is not None:
        yield Mistake(f"the activation is {twin}, not {config.activation}", {"activation": twin})
    yield Mistake(f"the norms' epsilon is not {config.norm_eps:g}",
                  {"norm_eps": config.norm_eps / 10})  # fmt: skip


def norm_mistakes(config: ModelConfig) -> Iterator[Mistake]:
    """Yield what goes wrong with norms."""
    for eps in (1e-5, 1e-6, 1e-8, 1e-12):
        if eps != config.norm_eps:
            yield Mistake(f"the norms' epsilon is {eps:g}, not {config.norm_eps:g}",
                          {"norm_eps": eps})  # fmt: skip
    if config.norm == "layernorm":
        yield Mistake("the norms add one to their weights", {"norm": "layernorm1p"})
    if config.norm == "layernorm1p":
        yield Mistake("the norms do not add one to their weights", {"norm": "layernorm"})


def rotary_mistakes(config: ModelConfig) -> Iterator[Mistake]:
    """Yield what goes wrong with rotary positions."""
    if config.position != "rotary":
        return
    for fraction in other_fractions(config):
        yield Mistake(
            f"{fraction:g} of each head is rotated, not {config.rotary_fraction:g}",
            {"rotary_fraction": fraction},
        )
    yield Mistake("keys are one position too far on", weights=shifted_keys(config, by=1))
    yield Mistake("keys are one position behind", weights=shifted_keys(config, by=-1))
    if config.rotary_base != 10000:
        yield Mistake(f"the rotary base is 10000, not {config.rotary_base:g}",
                      {"rotary_base": 10000.0})  # fmt: skip
    yield Mistake("neighbours are rotated together instead of halves", weights=interleaved(config))


def other_fractions(config: ModelConfig) -> list[float]:
    """Return the usual rotary fractions that this model's heads could have but do not."""
    dims = {f: int(config.head_dim * f) for f in (1.0, 0.5, 0.25)}
    return [f for f, dim in dims.items() if dim and dim % 2 == 0 and dim != config.rotary_dim]


def shifted_keys(config: ModelConfig, by: int) -> Callable[[Weights], Weights]:
    """Rotate every key as if it stood `by` positions further on than it does.

    Rotary scores depend on distances alone (Su et al. 2021, section 3.1): shifting queries and
    keys together changes nothing. A rotation is linear, so that the weights can do it.
    """

    def shift(weights: Weights) -> Weights:
        import torch

        from porttool.nn.attention import rotary_angles, rotate

        result = dict(weights)
        for name, tensor in weights.items():
            if ".attention.qkv." in name:
                q, k, v = tensor.double().split(config.qkv_rows)
                heads = k.reshape(1, config.n_kv_head, config.head_dim, -1).transpose(2, 3)
                angles = rotary_angles(config, torch.tensor([[by]]), torch.float64)  # [1, 1, half]
                turned = rotate(heads, angles).transpose(2, 3).reshape(k.shape)
                result[name] = torch.cat((q, turned, v)).to(tensor.dtype)
        return result

    return shift


def swapped_halves(weights: Weights) -> Weights:
    """Exchange the two halves of every gated MLP's first projection."""
    import torch

    return {
        name: torch.cat(t.chunk(2)[::-1]) if ".mlp.up." in name else t
        for name, t in weights.items()
    }


def shifted_positions(weights: Weights, by: int) -> Weights:
    """Give every position the row `by` after its own; the end of the table keeps its row."""
    table = weights["position.weight"]
    order = [min(max(i + by, 0), len(table) - 1) for i in range(len(table))]
    return {**weights, "position.weight": table[order]}


def swapped_norms(weights: Weights) -> Weights:
    """Exchange the two norms of every layer."""
    other = {".norm1.": ".norm2.", ".norm2.": ".norm1."}
    result = dict(weights)
    for name in weights:
        for here, there in other.items():
            if here in name:
                result[name] = weights[name.replace(here, there)]
    return result


def interleaved(config: ModelConfig) -> Callable[[Weights], Weights]:
    """Permute query and key rows so that rotating halves acts as rotating neighbours did."""

    def permute(weights: Weights) -> Weights:
        import torch

        half = config.rotary_dim // 2
        within = torch.arange(config.head_dim)
        within[: 2 * half] = torch.cat((torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2)))
        heads = torch.arange(config.n_head + config.n_kv_head)[:, None] * config.head_dim
        rotated = (heads + within).flatten()
        order = torch.cat((rotated, torch.arange(len(rotated), config.qkv_dim)))
        return {n: t[order] if ".attention.qkv." in n else t for n, t in weights.items()}

    return permute


def find_mistake(
    config: ModelConfig,
    weights: Weights,
    tokens: list[int],
    engine: Tensor,
    *,
    rows: Tensor | None = None,
) -> str | None:
    """Return the mistake that explains an engine's logits [len(tokens), vocab_size], if one does.

    `weights` are the source's own under canonical names, in float32 or wider, `rows` those of a
    prompt table.
    """
    from porttool.evaluators.stages import relative_error

    def logits(mistake: Mistake) -> Tensor:
        return logits_with(config, weights, tokens, mistake, rows)

    right = logits(Mistake("none"))
    error = relative_error(engine, right)
    left = {mistake.text: relative_error(engine, logits(mistake)) for mistake in mistakes(config)}
    best = min(left, key=lambda text: left[text])
    if not isfinite(left[best]) or left[best] > EXPLAINED * error:
        return None
    return f"{best} (this leaves {left[best] / error:.1%} of the difference)"


def logits_with(
    config: ModelConfig,
    weights: Weights,
    tokens: list[int],
    mistake: Mistake,
    rows: Tensor | None = None,
) -> Tensor:
    """Run the canonical decoder with a mistake; logits [len(tokens), vocab_size]."""
    import torch

    from porttool.nn import Step, meta_decoder

    decoder = meta_decoder(config.model_copy(update=dict(mistake.config))).eval()
    decoder.load_state_dict(dict(mistake.weights(weights)), assign=True)
    decoder.prompt_table = rows
    with torch.inference_mode():
        logits: Tensor = decoder(Step.prefill([tokens]))[0]
    return logits
