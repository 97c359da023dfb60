"""Balanced attention on a GPU: logits, bits, tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cuda_cases as cases
from cuda_cases import TOLERANCE, prompts
from cuda_cluster_cases import tensors_of
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import AttentionTile, Tuning, WideTile
from porttool.nn import KVCache, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = {
    "learned": {"head_dim": 64, "n_head": 3, "n_kv_head": 3, "d_model": 192, "d_ff": 768},
    "gated rotary": {"head_dim": 128, "n_head": 3, "n_kv_head": 3, "d_model": 384, "d_ff": 640},
    "multi-query": {"head_dim": 128, "n_head": 20, "d_model": 320, "d_ff": 640},
    "grouped rms": {"head_dim": 64, "n_head": 6, "n_kv_head": 2, "d_model": 384, "d_ff": 640},
}


def own(block_t: int, warps: int, stages: int) -> AttentionTile:
    """Return a tile for heads of their own."""
    return AttentionTile(1, block_t, warps, stages, balanced=True)


def shared(splits: int, slot: int, stages: int, warps: int = 4) -> AttentionTile:
    """Return a tile for heads that share keys."""
    return AttentionTile(splits, slot, warps, stages, balanced=True)


OWN = [own(64, 8, 6), own(32, 4, 2), own(128, 8, 3)]
SHARED = [shared(1, 64, 6), shared(3, 112, 7), shared(8, 80, 5)]
EVERY = [
    *((case, tile) for case in ("learned", "gated rotary") for tile in OWN),
    *((case, tile) for case in ("multi-query", "grouped rms") for tile in SHARED),
    ("multi-query", shared(6, 48, 4, 8)),
]


def name_of(value: object) -> str:
    """Name a case or a tile."""
    if isinstance(value, AttentionTile):
        return f"{value.splits}x{value.block_t}-{value.warps}-{value.stages}"
    return str(value)


def tuned(shape, tile: AttentionTile, *, cut: int) -> Tuning:
    """Return the rule's tuning with balanced attention; qkv's inner dimension is cut."""
    plain = default_tuning(shape, "cuda")
    several = {rows: tile if rows != "16" else old for rows, old in plain.wide_attention.items()}
    qkv = WideTile(64, 64, 4, 3, cut)
    wide = {rows: {**tiles, "qkv": qkv} for rows, tiles in plain.wide.items()}
    return replace(plain, wide_attention=several, wide=wide)


def made_with(case: str, dtype: torch.dtype, tile: AttentionTile, slots: int, *, cut: int = 1):  # type: ignore[no-untyped-def]
    """Return the decoder under test, the reference and its cache; unset memory is NaN."""
    shape = cases.config(case, n_positions=640, vocab_size=1003, **SHAPES[case])
    plain = cases.drawn(shape, dtype, "cuda")
    made = CudaDecoder(shape, plain.state_dict(), dtype=dtype, limits=cases.limits(slots, 600),
                       tuning=tuned(shape, tile, cut=cut).as_dict())  # fmt: skip
    assert ", balanced attention of several rows" in made.description
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    for tensor in tensors_of(made._scratch_of(made._bucket(slots))).values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return made, plain, KVCache(shape, slots, 600, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("n", [17, 64, 150])
@pytest.mark.parametrize(("case", "tile"), EVERY, ids=name_of)
def test_logits(case: str, tile: AttentionTile, n: int, cut: int) -> None:
    dtype = torch.bfloat16 if n == 64 else torch.float16
    made, plain, cache = made_with(case, dtype, tile, n, cut=cut)
    lengths = [1 + 37 * i % 290 for i in range(n)]
    first = Step.prefill(prompts(lengths))
    made.step(first), cases.reference(plain, cache, first)
    for i in range(3):
        starts = [length + i for length in lengths]
        step = cases.one_token(list(range(n)), torch.arange(n) + i, starts)
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("case", "tile"), EVERY, ids=name_of)
def test_a_row_has_the_same_bits_beside_any_others(case: str, tile: AttentionTile) -> None:
    made, _, _ = made_with(case, torch.float16, tile, 32)
    made.step(Step.prefill(prompts([300 + 7 * i for i in range(32)])))
    starts = [300 + 7 * i for i in range(32)]
    whole = made.step(cases.one_token(list(range(32)), torch.arange(32), starts))
    for _ in range(20):
        rows = torch.randperm(32)[:20].tolist()
        step = cases.one_token(rows, torch.tensor(rows), [starts[row] for row in rows])
        assert torch.equal(made.step(step), whole[rows])


@pytest.mark.parametrize("n", [24, 128])
@pytest.mark.parametrize(("case", "tile"), [EVERY[3], EVERY[7]], ids=name_of)
def test_tokens_repeat_and_equal_single_steps(case: str, tile: AttentionTile, n: int) -> None:
    made, _, _ = made_with(case, torch.float16, tile, n)
    cases.assert_tokens_repeat_and_equal_single_steps(made, [20 + 11 * i % 300 for i in range(n)])


@pytest.mark.parametrize(("case", "tile"), [EVERY[2], EVERY[11]], ids=name_of)
def test_without_a_graph_it_is_the_same(case: str, tile: AttentionTile) -> None:
    made, _, _ = made_with(case, torch.float16, tile, 20)
    made.step(Step.prefill(prompts([9 + i for i in range(20)])))
    step = cases.one_token(list(range(20)), torch.arange(20), [9 + i for i in range(20)])
    wanted = made.step(step)
    made.graphed = False
    assert torch.equal(made.step(step), wanted)
