"""Rows to try attention kernels for Hopper with, whose source is run on a CPU thread by thread."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, Late, described, emulated
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_balanced import COPIED, _Group, _Own, _Step, kernel, macros
from porttool.engines.torch.cuda_state import rotary_tables
from porttool.engines.torch.cuda_tuning import AttentionTile

CAPACITY, N_SLOTS = 202, 6
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
ROTARY = {"position": "rotary", "rotary_fraction": 0.5}


def compiled(
    name: str, defined: Mapping[str, object], broken: tuple[str, str] = NOT_BROKEN,
    leaving: tuple[str, ...] = (),
) -> ctypes.CDLL:  # fmt: skip
    """Return the library of an attention kernel."""
    machine = ("machine.hpp", "overlap.hpp", "cluster.hpp")
    kernel = ("heads.cuh", cuda_hopper.sources(name)[-1].name)
    return emulated(machine, kernel, "run_attention.hpp", tuple(defined.items()), broken, leaving)


def maps(keys: Tensor, values: Tensor) -> tuple[tuple[int, ...], ...]:
    """Describe keys and values [slots, heads, positions, head_dim] to the emulated copies."""
    halves = keys.shape[-1] // 64
    return tuple(described(cached.view(-1, halves, 64).transpose(0, 1), (64, COPIED, halves))
                 for cached in (keys, values))  # fmt: skip


class Case:
    """Rows of several lengths: what goes in, what is right, and what came out.

    rows: the slot and position of each. Of the cache only what they may read is a number.
    `leaving`: statements that a run may leave out.
    """

    leaving: tuple[str, ...] = ()

    def __init__(
        self, rows: list[tuple[int, int]], dtype: torch.dtype, tile: AttentionTile, *,
        n_head: int, n_kv_head: int | None = None, parts: int = 1, biased: bool = False,
        **shape: Any,
    ) -> None:  # fmt: skip
        c = cases.config("learned", n_head=n_head, n_kv_head=n_kv_head or n_head, **shape)
        self.config, self.dtype, self.tile, self.parts = c, dtype, tile, parts
        self.defined = macros(c, dtype, tile, parts=parts, has_bias=biased)
        draw = torch.Generator().manual_seed(len(rows))
        self.rows = torch.tensor(rows, dtype=torch.int32)  # [rows, 2]
        kind = dtype if parts == 1 else torch.float32
        qkv = torch.randn(parts, len(rows), c.qkv_dim, generator=draw) * 2 * parts**-0.5
        self.qkv = qkv.to(kind)
        self.bias = torch.randn(c.qkv_dim, generator=draw).to(dtype) if biased else None
        sides = (2, N_SLOTS + 1, c.n_kv_head, CAPACITY, c.head_dim)  # slot -1 is there, too
        self.cache = torch.full(sides, torch.nan, dtype=dtype)
        for slot, position in rows:
            if slot >= 0:
                place = self.cache[:, slot + 1, :, :position]
                place.copy_(torch.randn(place.shape, generator=draw))
        self.tables = rotary_tables(c, CAPACITY, "cpu")

    def heads(self) -> tuple[Tensor, Tensor]:
        """Queries [rows, n_head, head_dim] and keys and values [2, rows, n_kv_head, head_dim].

        Of the step, in float64, rounded as cached.
        """
        c, summed = self.config, self.qkv.double().sum(0)
        if self.bias is not None:
            summed = summed + self.bias.double()
        heads = summed.view(len(self.rows), -1, c.head_dim).clone()
        if c.position == "rotary":
            half, rotated = c.rotary_dim // 2, heads[:, : c.n_head + c.n_kv_head]
            cosine, sine = (t[self.rows[:, 1]].double()[:, None] for t in self.tables)
            x, y = rotated[..., :half].clone(), rotated[..., half : 2 * half].clone()
            rotated[..., :half] = x * cosine - y * sine
            rotated[..., half : 2 * half] = y * cosine + x * sine
        q, k, v = heads.to(self.dtype).double().split((c.n_head, c.n_kv_head, c.n_kv_head), 1)
        return q, torch.stack((k, v))

    def wanted(self) -> Tensor:
        """Return what is right, [rows, n_head, head_dim] in float64."""
        c, found, (queries, own) = self.config, [], self.heads()
        for row, (slot, position) in enumerate(self.rows.tolist()):
            cached = self.cache[:, slot + 1, :, : position if slot >= 0 else 0].double()
            both = torch.cat((cached, own[:, row, :, None]), 2)  # [2, n_kv_head, positions, dim]
            k, v = both.repeat_interleave(c.n_head // c.n_kv_head, 1)
            scores = torch.einsum("hd,htd->ht", queries[row], k) * c.layer_scale(0)
            found.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v))
        return torch.stack(found)

    def appended(self) -> Tensor:
        """Return what the cache is to hold afterwards."""
        after, own = self.cache.clone(), self.heads()[1]
        for row, (slot, position) in enumerate(self.rows.tolist()):
            if slot >= 0:
                after[:, slot + 1, :, position] = own[:, row].to(self.dtype)
        return after

    def part(self, first: int, end: int) -> Case:
        """Return some of the rows, the rest as it is."""
        some = Case.__new__(Case)
        some.__dict__ = dict(self.__dict__, rows=self.rows[first:end].contiguous(),
                             qkv=self.qkv[:, first:end].contiguous())  # fmt: skip
        return some

    def run(
        self, programs: int | None = None, *, seed: int,
        broken: tuple[str, str] = NOT_BROKEN, left_out: int = -1,
    ) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
        """Return the result, the cache and the count of draws; None if it hung.

        Without `programs` there are as many as the heads that have keys take.
        """
        c, name = self.config, kernel(self.config)
        library = compiled(name, self.defined, broken, self.leaving)
        ctypes.c_int.in_dll(library, "left_out").value = left_out
        qkv, cache = torch.full_like(self.qkv, torch.nan), self.cache.clone()
        out = torch.full((len(self.rows), c.n_head, c.head_dim), torch.nan, dtype=self.dtype)
        drawn = torch.zeros(1, dtype=torch.int32)
        slots, positions = self.rows.T.contiguous()
        tensors = (qkv, self.bias, *cache[:, 1:], slots, positions, *self.tables, out)
        step = _Step(*(None if t is None else t.data_ptr() for t in tensors), CAPACITY,
                     len(self.rows), c.layer_scale(0))  # fmt: skip
        own = name == "balanced_attention"
        given = _Own(step, drawn.data_ptr()) if own else _Group(*maps(*cache[:, 1:]), step)
        assert library.arguments_bytes() == ctypes.sizeof(given)
        if programs is None:
            programs = len(self.rows) * c.n_kv_head * self.tile.splits
        late = Late(qkv.data_ptr(), self.qkv.data_ptr(), qkv.nbytes)
        hung = library.run(ctypes.byref(given), programs, seed, ctypes.byref(late), 1)
        return None if hung else (out, cache, int(drawn))


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of a row's head."""
    difference = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(difference.nan_to_num(torch.inf).max())


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of 16-bit numbers are the same; NaN is as good as any."""
    return torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def assert_appended(cache: Tensor, wanted: Tensor, case: Case) -> None:
    """The step's keys and values are in the cache, and everything else is as before."""
    own = (cache.view(torch.int16) != case.cache.view(torch.int16)).any(-1)  # [2, slot, head, pos]
    assert torch.equal(own, (wanted.view(torch.int16) != case.cache.view(torch.int16)).any(-1))
    assert error(cache[own], wanted[own].double()) < TOLERANCE[case.dtype]


def assert_right(case: Case, programs: Sequence[int | None]) -> None:
    """Right, the same bits in any company and order, and nothing is left behind but the cache.

    programs: of each run, which has its own seed.
    """
    wanted, appended = case.wanted(), case.appended()
    first: Tensor | None = None
    for seed, count in enumerate(programs):
        found = case.run(count, seed=seed)
        assert found is not None, "it hung"
        out, cache, drawn = found
        assert error(out, wanted) < TOLERANCE[case.dtype]
        assert_appended(cache, appended, case)
        assert drawn == 0
        first = out if first is None else first
        assert same_bits(out, first)
    for begin, end in ((0, 1), (1, 3)):
        alone = case.part(begin, end).run(programs[0], seed=5)
        assert alone is not None, "it hung"
        assert same_bits(alone[0], first[begin:end])
