"""A rank's slices, put back together by the rules of tensor parallelism, are the whole model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from porttool.builder import Rank
from porttool.config import ModelConfig
from porttool.errors import UsageError
from porttool.nn import Decoder, Step
from porttool.sharding import rank_config, require_divisible, shard


def config(**changes):
    return ModelConfig(**{
        "vocab_size": 67, "n_positions": 16, "n_layer": 2, "n_head": 8, "n_kv_head": 8,
        "head_dim": 4, "d_model": 32, "d_ff": 48, "activation": "gelu", "attention_scale": 0.5,
        **changes,
    })  # fmt: skip


SHAPES = {
    "heads": config(),
    "grouped": config(n_kv_head=4),
    "one key head": config(n_kv_head=1),
    "two key heads": config(n_kv_head=2),
    "gated, rotary, untied": config(
        gated=True, position="rotary", tied_head=False, activation="silu", mlp_bias=False
    ),
}


def drawn(config):
    decoder = Decoder(config).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.2)
    return decoder


def part_of(decoder, rank):
    """The decoder that one rank holds."""
    part = Decoder(rank_config(decoder.config, rank.world_size)).double().requires_grad_(False)
    state = {
        name: shard(name, decoder.config, rank, lambda a, b, t=t: t[a:b], t.shape[0])
        for name, t in decoder.state_dict().items()
    }
    part.load_state_dict(state)
    return part


def parallel_logits(parts, step):
    """Run ranks side by side, adding where the ranks of a real machine would all-reduce."""
    first = parts[0]
    rows = first.embedding.num_embeddings
    x = sum(
        p.embedding((step.tokens - r * rows).clamp(0, rows - 1))
        * ((step.tokens // rows) == r)[..., None]
        for r, p in enumerate(parts)
    )
    if first.config.position == "learned":
        x = x + first.position(step.positions)
    for layers in zip(*(p.layers for p in parts), strict=True):
        normed = layers[0].norm1(x)
        x = x + reduced([y.attention for y in layers], normed, step)
        normed = layers[0].norm2(x)
        x = x + reduced([y.mlp for y in layers], normed, None)
    return torch.cat([p.logits(first.norm(x)) for p in parts], dim=-1)


def reduced(modules, x, step):
    """The sum over ranks of a row-parallel output, its bias counted once."""
    bias = getattr(modules[0], "out", None) or modules[0].down
    given = (x,) if step is None else (x, step.positions, None, step.slots)
    out = sum(m(*given) for m in modules)
    return out if bias.bias is None else out - (len(modules) - 1) * bias.bias


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ranks_together_are_the_whole(shape, world_size):
    decoder = drawn(shape)
    parts = [part_of(decoder, Rank(i, world_size)) for i in range(world_size)]
    step = Step.prefill([[1, 66, 33, 5, 34, 9], [60, 2]])
    found = parallel_logits(parts, step)
    expected = decoder(step)
    vocab = shape.vocab_size
    torch.testing.assert_close(found[..., :vocab], expected, atol=1e-12, rtol=0)
    assert found.shape[-1] == -(-vocab // world_size) * world_size
    assert not found[..., vocab:].any()


def test_padding_of_the_vocabulary_is_zero():
    weight = torch.ones(67, 32)
    parts = [
        shard("embedding.weight", config(), Rank(i, 4), lambda a, b: weight[a:b], 67)
        for i in range(4)
    ]
    assert [tuple(p.shape) for p in parts] == [(17, 32)] * 4
    assert parts[3].sum(1).tolist() == [32.0] * 16 + [0.0]


def test_only_a_ranks_rows_are_read():
    read = []

    def rows(first, last):
        read.append((first, last))
        return torch.ones(last - first, 32)

    shard("layers.0.mlp.up.weight", config(), Rank(1, 4), rows, 48)
    assert read == [(12, 24)]


@pytest.mark.parametrize(
    ("changes", "world_size"), [({}, 3), ({"d_ff": 50}, 4), ({"n_kv_head": 2}, 5), ({}, 16)]
)
def test_what_does_not_divide(changes, world_size):
    with pytest.raises(UsageError, match=rf"--tp {world_size} does not divide n_head 8, n_kv_head"):
        require_divisible(config(**changes), world_size)


def test_linear_is_what_this_file_thinks_it_is():
    """[out, in]: a rank of rows of a column-parallel weight gives a slice of its output."""
    x, weight = torch.randn(3, 32).double(), torch.randn(48, 32).double()
    assert F.linear(x, weight)[:, 12:24].allclose(F.linear(x, weight[12:24]))
