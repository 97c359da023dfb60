"""The source of balanced attention, compiled for a CPU and run thread by thread.

`tests/hopper/` stands in place of the machine's instructions: heads are drawn, asked for, attended
to and joined as it is written, by several programs at once, in an order drawn at random.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, Late, emulated, needs_compiler
from porttool.engines.torch import cuda_balanced, cuda_hopper
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_balanced import _Own, _Step, macros
from porttool.engines.torch.cuda_state import rotary_tables
from porttool.engines.torch.cuda_tuning import AttentionTile, default_tuning
from porttool.nn import KVCache

pytestmark = needs_compiler
CAPACITY, N_SLOTS = 80, 6
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


def compiled(defined: Mapping[str, object], broken: tuple[str, str] = NOT_BROKEN) -> ctypes.CDLL:
    """Return the library of an attention."""
    machine, kernel = ("machine.hpp", "overlap.hpp"), ("heads.cuh", "attend.cu")
    return emulated(machine, kernel, "run_attention.hpp", tuple(defined.items()), broken)


def tile(block_t: int, warps: int, stages: int) -> AttentionTile:
    """Return the tile of a ring."""
    return AttentionTile(1, block_t, warps, stages, balanced=True)


class Case:
    """Rows of several lengths: what goes in, what is right, and what came out.

    rows: the slot and position of each. Of the cache only what they may read is a number.
    """

    def __init__(
        self, rows: list[tuple[int, int]], dtype: torch.dtype, ring: AttentionTile, *,
        n_head: int, parts: int = 1, biased: bool = False, **shape: Any,
    ) -> None:  # fmt: skip
        self.config = cases.config("learned", n_head=n_head, n_kv_head=n_head, **shape)
        self.dtype, self.parts = dtype, parts
        self.defined = macros(self.config, dtype, ring, parts=parts, has_bias=biased)
        c, draw = self.config, torch.Generator().manual_seed(len(rows))
        self.rows = torch.tensor(rows, dtype=torch.int32)  # [rows, 2]
        kind = dtype if parts == 1 else torch.float32
        qkv = torch.randn(parts, len(rows), c.qkv_dim, generator=draw) * 2 * parts**-0.5
        self.qkv = qkv.to(kind)
        self.bias = torch.randn(c.qkv_dim, generator=draw).to(dtype) if biased else None
        sides = (2, N_SLOTS + 1, n_head, CAPACITY, c.head_dim)  # slot -1 is there, too
        self.cache = torch.full(sides, torch.nan, dtype=dtype)
        for slot, position in rows:
            if slot >= 0:
                place = self.cache[:, slot + 1, :, :position]
                place.copy_(torch.randn(place.shape, generator=draw))
        self.tables = rotary_tables(c, CAPACITY, "cpu")

    def heads(self) -> Tensor:
        """Queries, keys and values of the step, [3, rows, heads, head_dim], rounded as cached."""
        c, summed = self.config, self.qkv.double().sum(0)
        if self.bias is not None:
            summed = summed + self.bias.double()
        heads = summed.view(len(self.rows), 3, c.n_head, c.head_dim).transpose(0, 1)
        if c.position == "rotary":
            half = c.rotary_dim // 2
            cosine, sine = (t[self.rows[:, 1]].double()[:, None] for t in self.tables)
            x, y = heads[:2, ..., :half].clone(), heads[:2, ..., half : 2 * half].clone()
            heads[:2, ..., :half] = x * cosine - y * sine
            heads[:2, ..., half : 2 * half] = y * cosine + x * sine
        return heads.to(self.dtype).double()

    def wanted(self) -> Tensor:
        """Return what is right, [rows, heads, head_dim] in float64."""
        found = []
        for row, (slot, position) in enumerate(self.rows.tolist()):
            q, *own = self.heads()[:, row]
            cached = self.cache[:, slot + 1, :, : position if slot >= 0 else 0].double()
            k, v = (torch.cat((old, new[:, None]), 1) for old, new in zip(cached, own, strict=True))
            scores = torch.einsum("hd,htd->ht", q, k) * self.config.layer_scale(0)
            found.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v))
        return torch.stack(found)

    def appended(self) -> Tensor:
        """Return what the cache is to hold afterwards."""
        after = self.cache.clone()
        for row, (slot, position) in enumerate(self.rows.tolist()):
            if slot >= 0:
                after[:, slot + 1, :, position] = self.heads()[1:, row].to(self.dtype)
        return after

    def part(self, first: int, end: int) -> Case:
        """Return some of the rows, the rest as it is."""
        some = Case.__new__(Case)
        some.__dict__ = dict(self.__dict__, rows=self.rows[first:end].contiguous(),
                             qkv=self.qkv[:, first:end].contiguous())  # fmt: skip
        return some

    def run(
        self, programs: int, *, seed: int, broken: tuple[str, str] = NOT_BROKEN
    ) -> tuple[Tensor, Tensor, int] | None:
        """Return the result, the cache and the count of draws; None if it hung."""
        library, c = compiled(self.defined, broken), self.config
        assert library.arguments_bytes() == ctypes.sizeof(_Own)
        qkv, cache = torch.full_like(self.qkv, torch.nan), self.cache.clone()
        out = torch.full((len(self.rows), c.n_head, c.head_dim), torch.nan, dtype=self.dtype)
        drawn = torch.zeros(1, dtype=torch.int32)
        slots, positions = self.rows.T.contiguous()
        tensors = (qkv, self.bias, *cache[:, 1:], slots, positions, *self.tables, out)
        step = _Step(*(None if t is None else t.data_ptr() for t in tensors), CAPACITY,
                     len(self.rows), c.layer_scale(0))  # fmt: skip
        late = Late(qkv.data_ptr(), self.qkv.data_ptr(), qkv.nbytes)
        hung = library.run(
            ctypes.byref(_Own(step, drawn.data_ptr())), programs, seed, ctypes.byref(late), 1
        )
        return None if hung else (out, cache, int(drawn))


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of a row's head."""
    difference = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(difference.nan_to_num(torch.inf).max())


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of 16-bit numbers are the same; NaN is as good as any."""
    return torch.equal(found.view(torch.int16), wanted.view(torch.int16))


ROTARY = {"position": "rotary", "rotary_fraction": 0.5}
MIXED = [(4, 37), (-1, 9), (0, 0), (5, 64), (2, 33), (1, 16)]
KINDS = [
    (MIXED, torch.float16, tile(16, 4, 2), {"n_head": 2, "head_dim": 64}),
    (MIXED, torch.bfloat16, tile(32, 8, 3),
     {"n_head": 1, "head_dim": 64, "parts": 3, "biased": True, **ROTARY}),
    (MIXED, torch.bfloat16, tile(64, 4, 2), {"n_head": 2, "head_dim": 128}),
    (MIXED, torch.float16, tile(16, 8, 2),
     {"n_head": 1, "head_dim": 128, "parts": 2, "biased": True, **ROTARY}),
    (MIXED[:3], torch.float16, tile(8, 4, 3), {"n_head": 1, "head_dim": 256, "parts": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "dtype", "ring", "shape"), KINDS)
def test_every_kind_of_attention(rows, dtype, ring, shape) -> None:
    """Right, the same bits in any company and order, and nothing is left behind but the cache."""
    case = Case(rows, dtype, ring, **shape)
    wanted, appended = case.wanted(), case.appended()
    first: Tensor | None = None
    for seed, programs in enumerate((2, 3, 1, len(rows) * shape["n_head"] + 1, 2, 3, 5, 1)):
        found = case.run(programs, seed=seed)
        assert found is not None, "it hung"
        out, cache, drawn = found
        assert error(out, wanted) < TOLERANCE[dtype]
        assert_appended(cache, appended, case)
        assert drawn == 0
        first = out if first is None else first
        assert same_bits(out, first)
    for begin, end in ((0, 1), (1, 3)):
        alone = case.part(begin, end).run(2, seed=5)
        assert alone is not None, "it hung"
        assert same_bits(alone[0], first[begin:end])


def assert_appended(cache: Tensor, wanted: Tensor, case: Case) -> None:
    """The step's keys and values are in the cache, and everything else is as before."""
    own = (cache.view(torch.int16) != case.cache.view(torch.int16)).any(-1)  # [2, slot, head, pos]
    assert torch.equal(own, (wanted.view(torch.int16) != case.cache.view(torch.int16)).any(-1))
    assert error(cache[own], wanted[own].double()) < TOLERANCE[case.dtype]


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
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    rows = [(4, 0), (-1, 3), (-1, 5), (1, 1), (0, 30), (3, 35), (2, 2), (5, 3)]
    case = Case(rows, torch.float16, tile(16, 4, 2), n_head=2, head_dim=64)
    wanted, appended = case.wanted(), case.appended()

    def wrong(seed: int, broken: tuple[str, str]) -> bool:
        found = case.run(1 + seed % 2, seed=seed, broken=broken)
        if found is None:
            return True
        right = error(found[0], wanted) < TOLERANCE[case.dtype] and found[2] == 0
        return not (right and same_bits(found[1], appended))

    assert not any(wrong(seed, NOT_BROKEN) for seed in range(8))
    assert any(wrong(seed, BROKEN[what]) for seed in range(8))


class Emulated:
    """In place of a kernel on a GPU."""

    resident = 2
    launched = 0

    def __init__(self, name: str, defined: Mapping[str, object], **_: object) -> None:
        assert name == "balanced_attention"
        self.library = compiled(defined)

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
