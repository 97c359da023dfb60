"""The source of balanced attention, compiled for a CPU and run thread by thread.

`tests/hopper/` stands in place of the machine's instructions: heads are drawn, asked for, attended
to and joined as it is written, by several programs at once, in an order drawn at random.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cuda_cases as cases
from cuda_attention_cases import ROTARY, TOLERANCE, Case, assert_right, compiled, error, same_bits
from hopper_emulation import NOT_BROKEN, needs_compiler
from porttool.engines.torch import cuda_balanced, cuda_hopper
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import AttentionTile
from porttool.nn import KVCache

pytestmark = needs_compiler


def tile(block_t: int, warps: int, stages: int) -> AttentionTile:
    """Return the tile of a ring."""
    return AttentionTile(1, block_t, warps, stages, balanced=True)


MIXED = [(4, 37), (-1, 9), (0, 0), (5, 64), (2, 33), (1, 16)]
KINDS = [
    (MIXED, torch.float16, tile(16, 4, 2), {"n_head": 2, "head_dim": 64}),
    (MIXED, torch.bfloat16, tile(32, 8, 3),
     {"n_head": 1, "head_dim": 64, "parts": 3, "biased": True, **ROTARY}),
    (MIXED, torch.bfloat16, tile(64, 4, 2), {"n_head": 2, "head_dim": 128}),
    (MIXED, torch.float16, tile(16, 8, 2),
     {"n_head": 1, "head_dim": 128, "parts": 2, "biased": True, **ROTARY}),
    (MIXED[:3], torch.float16, tile(16, 4, 3), {"n_head": 1, "head_dim": 256, "parts": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "dtype", "ring", "shape"), KINDS)
def test_every_kind_of_attention(rows, dtype, ring, shape) -> None:
    programs = (2, 3, 1, len(rows) * shape["n_head"] + 1, 2, 3, 5, 1)
    assert_right(Case(rows, dtype, ring, **shape), programs)


BROKEN = {
    "a slot is read before it is full": (
        "barrier_wait(shared_address(&s.full[i]), taken / SLOTS & 1);", ""),
    "a slot is given back by a warp for all": (
        "barrier_init(shared_address(&s.empty[i]), WARPS);",
        "barrier_init(shared_address(&s.empty[i]), 1);"),
    "the queue is read before a head is there": (
        "barrier_wait(shared_address(&s.drawn[",
        "if (n < QUEUE) barrier_wait(shared_address(&s.drawn["),
    "heads are drawn too far ahead": (
        "barrier_wait(shared_address(&s.noted[n % QUEUE]), (n / QUEUE & 1) ^ 1);", ""),
    "a query takes another's place": (
        "barrier_wait(shared_address(&s.answered[i]), (n / 2 & 1) ^ 1);", ""),
    "what was found takes another's place": (
        "barrier_wait(shared_address(&s.joined[which]), (n / 2 & 1) ^ 1);", ""),
    "the kernel before is not awaited": ("await_last();", ""),
    "the count is not put back": ("if (number == heads - 1) *a.drawn = 0;", ""),
    "keys beyond the end are compared": ("holds && row < live ? low", "holds ? low"),
    "keys beyond the first half's end are compared": (
        "holds && row + 8 < live ? high", "holds ? high"),
    "values beyond the end are multiplied": (
        "if (first + t >= live) v[i] = {0, 0, 0, 0};", ""),
    "chances meet other lanes' units": ("{row == group ? a : 0, row == group ? b : 0}", "{a, b}"),
    "every warp counts the step's own position": (
        "if (warp == 0) begin_with_own(", "begin_with_own("),
    "what was found before does not shrink": ("acc[l][i / 4][i % 4] *= shrink;", ";"),
    "a slot is given back while it is read": (
        "                __syncwarp();\n                if (lane == 0) barrier_arrive("
        "shared_address(&s.empty[i]), 1);",
        "                if (lane == 31) barrier_arrive(shared_address(&s.empty[i]), 1);"),
}  # fmt: skip


FAR = {
    "the largest score of half a block counts": ("warp_most(fmaxf(low, high))", "warp_most(low)"),
    "scores below zero are in the wrong order": ("bits ^ (bits >> 31 & 0x7fffffff)", "bits"),
    "the maximum sinks": ("if (above > top) rise(above);", "rise(above);"),
}
"""Where scores are not as far apart as in some models, any number serves for their maximum."""


@pytest.mark.parametrize("what", [*BROKEN, *FAR])
def test_what_the_emulation_finds(what: str) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    rows = [(4, 0), (-1, 3), (-1, 5), (1, 1), (0, 30), (3, 140), (2, 2), (5, 3)]
    scale = 0.25
    if what in FAR:
        rows, scale = [(4, 1), (0, 30), (3, 140), (1, 1), (2, 2), (5, 1)], 4.0
    case = Case(rows, torch.float16, tile(32, 2, 2), n_head=2, head_dim=64, attention_scale=scale)
    wanted, appended = case.wanted(), case.appended()

    def wrong(seed: int, broken: tuple[str, str]) -> bool:
        found = case.run(1 + seed % 2, seed=seed, broken=broken)
        if found is None:
            return True
        right = error(found[0], wanted) < TOLERANCE[case.dtype] and found[2] == 0
        return not (right and same_bits(found[1], appended))

    assert not any(wrong(seed, NOT_BROKEN) for seed in range(8))
    assert any(wrong(seed, {**BROKEN, **FAR}[what]) for seed in range(8))


class Emulated:
    """In place of a kernel on a GPU."""

    resident = 2
    launched = 0

    def __init__(self, name: str, defined: Mapping[str, object], **_: object) -> None:
        assert name == "balanced_attention"
        self.library = compiled(name, defined)

    def launch_clusters(self, grid, cluster, stream, argument, *, chained) -> None:
        assert (grid, cluster) == ((4, 1), 1)
        Emulated.launched += 1
        assert self.library.run(ctypes.byref(argument), 4, self.launched, None, 0) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernel")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
def test_steps_of_a_model(monkeypatch) -> None:
    shape = cases.config("gated rotary", d_model=64, d_ff=64, head_dim=64, n_head=2, n_kv_head=2,
                         qkv_bias=True)  # fmt: skip
    plain = cases.drawn(shape, torch.float16)
    made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float16,
                       limits=cases.limits(17, 8), device="cpu")  # fmt: skip
    chosen = default_tuning(shape, "cpu")
    cut = {**chosen.wide["32"], "qkv": replace(chosen.wide["32"]["qkv"], split=2)}
    made.use(replace(chosen, wide={**chosen.wide, "32": cut},
                     wide_attention={**chosen.wide_attention, "32": tile(32, 4, 2)}))  # fmt: skip
    monkeypatch.setattr(cuda_hopper, "load", Emulated)
    monkeypatch.setattr(Emulated, "launched", 0)
    monkeypatch.setattr(cuda_balanced, "programs_of", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cache, slots = KVCache(shape, 17, 8, dtype=torch.float64), list(range(17))
    for i in range(3):
        step = cases.one_token(slots, torch.arange(17) + 17 * i, [i] * 17)
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < cases.TOLERANCE[torch.float16]
    assert Emulated.launched == 3 * shape.n_layer
