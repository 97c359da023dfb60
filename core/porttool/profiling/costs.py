"""What a step has to do at least: floating-point operations and bytes of each module.

A product of [m, k] and [k, n] is 2 m k n operations. Bytes are those of weights, cache and
activations, each once: what a perfect implementation would move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from porttool.config import ITEMSIZE, ModelConfig


@dataclass(frozen=True)
class Cost:
    """Operations and bytes."""

    flops: float
    nbytes: float

    def __add__(self, other: Cost) -> Cost:
        """Return both together."""
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)

    def seconds(self, peak: Peak) -> float:
        """Return the least time on a device (Williams, Waterman and Patterson 2009)."""
        return max(self.flops / peak.flops, self.nbytes / peak.bandwidth)


@dataclass(frozen=True)
class Peak:
    """What a device was measured to do: operations and bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class StepSize:
    """A step: rows, tokens of each, keys that each sees on average, and bytes of a number."""

    batch: int
    width: int
    reach: int
    itemsize: int

    @classmethod
    def prefill(cls, batch: int, n_input: int, dtype: str) -> Self:
        """Return the step of prompts; a causal query sees half of its own on average."""
        return cls(batch, n_input, (n_input + 1) // 2, ITEMSIZE[dtype])

    @classmethod
    def decode(cls, batch: int, n_input: int, n_output: int, dtype: str) -> Self:
        """Return the step of one token of every row, in the middle of the output."""
        return cls(batch, 1, n_input + (n_output + 1) // 2, ITEMSIZE[dtype])


def linear(size: StepSize, n_in: int, n_out: int) -> Cost:
    """Return the cost of one linear map of every token."""
    tokens = size.batch * size.width
    numbers = n_in * n_out + tokens * (n_in + n_out)
    return Cost(2.0 * tokens * n_in * n_out, float(numbers * size.itemsize))


def layer_costs(config: ModelConfig, size: StepSize) -> dict[str, Cost]:
    """Return the costs of one layer's modules; norms, additions and activations move bytes."""
    c = config
    tokens, heads = size.batch * size.width, c.n_head * c.head_dim
    cached = size.batch * size.reach * 2 * c.n_kv_head * c.head_dim
    moved = Cost(0, 2.0 * tokens * c.d_model * size.itemsize)
    return {
        "norm1": moved,
        "attention.qkv": linear(size, c.d_model, c.qkv_dim),
        "attention": Cost(4.0 * tokens * heads * size.reach, float(cached * size.itemsize)),
        "attention.out": linear(size, heads, c.d_model),
        "norm2": moved,
        "mlp.up": linear(size, c.d_model, c.up_dim),
        "mlp": Cost(0, float(tokens * (c.up_dim + c.d_ff) * size.itemsize)),
        "mlp.down": linear(size, c.d_ff, c.d_model),
    }


def ends_costs(config: ModelConfig, size: StepSize) -> dict[str, Cost]:
    """Return the costs of what is there once: one row of logits for each row of the batch."""
    last = StepSize(size.batch, 1, 1, size.itemsize)
    tokens = size.batch * size.width
    return {
        "embedding": Cost(0, 2.0 * tokens * config.d_model * size.itemsize),
        "head": linear(last, config.d_model, config.vocab_size),
    }


def total_cost(config: ModelConfig, size: StepSize) -> Cost:
    """Return the cost of a whole step."""
    total = Cost(0, 0)
    for cost in layer_costs(config, size).values():
        total += Cost(cost.flops * config.n_layer, cost.nbytes * config.n_layer)
    for cost in ends_costs(config, size).values():
        total += cost
    return total
