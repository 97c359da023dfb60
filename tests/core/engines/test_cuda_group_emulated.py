"""The source of attention of heads that share keys, compiled for a CPU and run thread by thread.

`tests/hopper/` stands in place of the machine's instructions: the ring, the exchange of highest
scores, products on tensor cores and the joining of a cluster's parts run as they are written, in
an order drawn at random.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from cuda_attention_cases import ROTARY, TOLERANCE, Case, assert_right, compiled, error, same_bits
from hopper_emulation import described, needs_compiler
from porttool.engines.torch import cuda_balanced, cuda_hopper
from porttool.engines.torch.cuda_balanced import BalancedAttention
from porttool.engines.torch.cuda_launch import Projected
from porttool.engines.torch.cuda_state import DeviceCache
from porttool.engines.torch.cuda_tuning import AttentionTile

pytestmark = needs_compiler


def tile(splits: int, slot: int, warps: int, stages: int) -> AttentionTile:
    """Return the tile of clusters of so many programs that take so many positions at a time."""
    return AttentionTile(splits, slot, warps, stages, balanced=True)


# behind slot 5 the cache ends, behind 2 and 4 it holds no number; 201 is the last position
MIXED = [(5, 201), (-1, 9), (2, 130), (0, 0), (4, 64), (3, 1)]
KINDS = [
    (MIXED[2:5], torch.float16, tile(1, 64, 8, 5), {"n_head": 48, "n_kv_head": 1, "head_dim": 128}),
    (MIXED, torch.bfloat16, tile(3, 80, 4, 5),
     {"n_head": 48, "n_kv_head": 1, "head_dim": 64, "parts": 3, "biased": True, **ROTARY}),
    (MIXED, torch.float16, tile(2, 112, 4, 9),
     {"n_head": 6, "n_kv_head": 2, "head_dim": 128, "position": "rotary"}),
    (MIXED[:4], torch.bfloat16, tile(5, 48, 8, 4),
     {"n_head": 6, "n_kv_head": 1, "head_dim": 256, "parts": 2, "biased": True}),
    (MIXED, torch.bfloat16, tile(8, 32, 8, 4), {"n_head": 16, "n_kv_head": 1, "head_dim": 128}),
    (MIXED, torch.float16, tile(8, 16, 4, 7),
     {"n_head": 6, "n_kv_head": 1, "head_dim": 64, "parts": 2, **ROTARY}),
    (MIXED[:5], torch.float16, tile(1, 96, 4, 7), {"n_head": 4, "n_kv_head": 1, "head_dim": 64}),
    (MIXED[:3], torch.float16, tile(2, 64, 1, 4), {"n_head": 8, "n_kv_head": 1, "head_dim": 256}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "dtype", "ring", "shape"), KINDS)
def test_every_kind_of_attention(rows, dtype, ring, shape) -> None:
    assert_right(Case(rows, dtype, ring, **shape), [None] * 3)


BROKEN = {
    "the next kernel is not let in": "«let_next_start();»",
    "a slot is read before it is full":
        "«barrier_wait(shared_address(&s.full[i % RING]), i / RING & 1);»",
    "a full slot is filled again":
        "«barrier_wait(shared_address(&s.empty[i]), (copies / RING & 1) ^ 1);»",
    "values behind the end count":
        "«clear_rest(s.values[(copy + live / GRAIN) % RING], live % GRAIN);»",
    "others' highest scores are not awaited": "«together();»\n#pragma unroll",
    "others' weights are not awaited": "«together();»\n    for (int g",
    "queries are not awaited": "«together();»\n}\n\n// What a warp has",
    "the step's own key is not awaited": "«together();»\n}\n\n__device__ __forceinline__ void take",
    "the step's own key stays out": "«if (part.last && t + live == part.high) "
        "place_own(s, (end - 1) % RING, (live - 1) % GRAIN);»",
    "sums take the ring's place too early": "«together();»  // nobody reads the ring any more",
    "sums are sent before they are there": "«together();»\n        if (SPLIT > 1) {",
    "others' barriers are not awaited": "«cluster_wait();»\n            if (warp == 0)",
    "others' sums are not awaited": "«barrier_wait(shared_address(&s.all_heard), 0);»",
    "the kernel before is not awaited": "«await_last();»",
}  # fmt: skip
SEEDS = range(24)


@pytest.fixture(scope="module")
def case() -> Case:
    """Rows whose contexts take a ring of four copies one and a half times, in part, and not."""
    rows = [(4, 170), (-1, 3), (1, 45), (0, 0)]
    made = Case(rows, torch.float16, tile(2, 64, 4, 4), n_head=6, n_kv_head=2, head_dim=64)
    made.leaving = tuple(BROKEN.values())
    return made


def wrong(case: Case, seed: int, left_out: int = -1) -> bool:
    """Whether a run hangs or gives wrong numbers."""
    found = case.run(seed=seed, left_out=left_out)
    if found is None:
        return True
    right = error(found[0], case.wanted()) < TOLERANCE[case.dtype]
    return not (right and same_bits(found[1], case.appended()))


def test_the_emulation_finds_nothing_in_what_is_right(case: Case) -> None:
    assert not any(wrong(case, seed) for seed in SEEDS)


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str, case: Case) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    assert any(wrong(case, seed, list(BROKEN).index(what)) for seed in SEEDS)


class Emulated:
    """In place of a kernel on a GPU."""

    def __init__(self, name: str, defined: dict[str, object], *, threads: int, **_: object) -> None:
        self.library, self.warps = compiled(name, defined), threads // 32

    def launch_clusters(self, grid, cluster, stream, argument, *, chained) -> None:
        assert (grid[1], cluster, chained, self.warps) == (1, 8, True, 9)
        assert self.library.run(ctypes.byref(argument), grid[0], 1, None, 0) == 0


def test_as_the_engine_launches_it(monkeypatch) -> None:
    """What it tells the kernel of a layer is right: the second of three."""
    monkeypatch.setattr(cuda_hopper, "load", Emulated)
    monkeypatch.setattr(cuda_balanced, "tensor_map", described)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    rows, dtype, ring, shape = KINDS[4]
    case = Case(rows, dtype, ring, **shape)
    layers = torch.full((2, 3, *case.cache[0, 1:].shape), torch.nan, dtype=dtype)
    layers[:, 1] = case.cache[:, 1:]
    c, (slots, positions) = case.config, case.rows.T.contiguous()
    cache = DeviceCache(*layers)
    model = SimpleNamespace(config=c, dtype=dtype, cache=cache, chained=True, cosine=case.tables[0],
                            sine=case.tables[1])  # fmt: skip
    out = torch.full((len(rows), c.n_head, c.head_dim), torch.nan, dtype=dtype)
    told = SimpleNamespace(slots=slots, positions=positions), SimpleNamespace(attended=out)
    drawn = torch.zeros(1, dtype=torch.int32)
    BalancedAttention(model, *told, 1, len(rows), ring, Projected(case.qkv[0]), drawn).enqueue()
    assert error(out, case.wanted()) < TOLERANCE[dtype]
    assert same_bits(layers[:, 1], case.appended()[:, 1:])
    assert bool(layers[:, ::2].isnan().all())
