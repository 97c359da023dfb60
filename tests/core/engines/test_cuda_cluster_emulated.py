"""The source of products in clusters, compiled for a CPU and run thread by thread.

`tests/hopper/` stands in place of the machine's instructions: ring, barriers, swizzle,
exchange of sums and the end of a product run as they are written, in an order drawn at random.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, Late, described, emulated, needs_compiler
from porttool.engines.torch import cuda_chains, cuda_cluster, cuda_hopper
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_cluster import CHUNK, NAMES, TOLD, _Arguments, macros, residual
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import AttentionTile, ClusterTile
from porttool.errors import EngineError
from porttool.nn import KVCache, Step

pytestmark = needs_compiler


def compiled(
    defined: tuple[tuple[str, object], ...], broken: tuple[str, str] = NOT_BROKEN
) -> ctypes.CDLL:
    """Return the library of a product."""
    machine = ("machine.hpp", "overlap.hpp", "cluster.hpp", "warpgroup.hpp")
    return emulated(machine, ("activation.cuh", "linear.cu"), "run_product.hpp", defined, broken)


class Case:
    """A product of one kind: what goes in, what is right, and what came out."""

    def __init__(self, name: str, n: int, dtype: torch.dtype, **shape: Any) -> None:
        self.name, self.n, self.dtype = name, n, dtype
        self.config = cases.config("learned", **{"d_model": 192, "d_ff": 320, **shape})
        c, draw = self.config, torch.Generator().manual_seed(n)

        def drawn(*sides: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*sides, generator=draw).to(kind)

        self.parts = 2 if c.gated and name == "up" else 1
        self.columns, self.inner = {
            "qkv": (136, 192), "up": (200, 192), "out": (192, 128), "down": (192, self.config.d_ff),
        }[name]  # fmt: skip
        self.weight = drawn(self.parts * self.columns, self.inner, kind=dtype) / 8
        self.x = 3 * drawn(n, self.inner if not residual(name) else self.columns) + 1
        self.gamma = drawn(self.x.shape[1]) * 0.02
        self.bias = drawn(self.parts * self.columns, kind=dtype)
        self.activations = drawn(n, self.inner, kind=dtype)

    def norm_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x times gamma / 0.03125 in 16 bits, and the sums by TOLD columns."""
        told = [torch.stack((p.sum(1), (p**2).sum(1)), -1) for p in self.x.split(TOLD, 1)]
        return (self.x * self.gamma * 32).to(self.dtype), torch.stack(told).contiguous()

    def wanted(self) -> torch.Tensor:
        """Return what is right, in float64."""
        w, c = self.weight.double(), self.config
        if residual(self.name):
            return self.x.double() + self.activations.double() @ w.T + self.bias.double()
        x = self.x.double()
        mean = 0 if c.norm == "rmsnorm" else x.mean(1, keepdim=True)
        deviation = ((x**2).mean(1, keepdim=True) - mean**2 + c.norm_eps).sqrt()
        value = (x - mean) / deviation * self.gamma.double() @ w.T + self.bias.double()
        if self.name == "qkv":
            return value
        f = torch.nn.functional
        act = {"gelu_tanh": lambda v: f.gelu(v, approximate="tanh"), "silu": f.silu}[c.activation]
        if self.parts == 1:
            return act(value)
        return act(value[:, : self.columns]) * value[:, self.columns :]

    def run(self, tile: ClusterTile, *, seed: int, broken: tuple[str, str] = NOT_BROKEN) -> Any:
        """Return the result and what was left for the next product; None if it hung."""
        rows = cuda_cluster.tile_rows(self.n)
        library = compiled(
            tuple(macros(self.config, self.dtype, self.name, tile, rows).items()), broken
        )
        assert library.arguments_bytes() == ctypes.sizeof(_Arguments)
        normed, told = self.norm_input()
        true = self.activations if residual(self.name) else normed
        x, inputs, heard = (torch.full_like(t, torch.nan) for t in (self.x, true, told))
        out = torch.full((self.n, self.columns), torch.nan, dtype=self.dtype)
        left = torch.full((-(-self.columns // TOLD), self.n, 2), torch.nan)
        late = [Late(a.data_ptr(), b.data_ptr(), b.nbytes)
                for a, b in ((x, self.x), (inputs, true), (heard, told))]  # fmt: skip
        column_sum = self.weight.float() @ self.gamma if not residual(self.name) else self.bias
        bias = self.bias if residual(self.name) else self.bias.float()
        chunks = inputs.view(self.n, -1, CHUNK).transpose(0, 1)
        wide, high = -(-self.columns // tile.block_n) * tile.split, -(-self.n // rows)
        parts = torch.full((wide * self.parts * rows * tile.block_n,), torch.nan)
        met = torch.zeros(wide, dtype=torch.int32)
        pointers = (bias, column_sum, heard, x, out, self.gamma, left, parts, met)
        fixed = (
            described(self.weight, (CHUNK, tile.block_n)), described(chunks, (CHUNK, rows, 1)),
            described(chunks, (CHUNK, rows, min(tile.ahead, tile.stages))),
            *(None if t is None else t.data_ptr() for t in pointers),
            self.n, self.columns, self.inner // CHUNK, len(told), self.inner,
        )  # fmt: skip
        hung = 0
        for row_tile in range(high if tile.by_memory else 1):
            arguments = _Arguments(*fixed, row_tile, 4.0, 1 / 32)
            hung |= library.run(ctypes.byref(arguments), wide, 1 if tile.by_memory else high, seed,
                                (Late * len(late))(*late), len(late))  # fmt: skip
            late = []  # of the first launch only: it writes where its predecessor did
        if not hung:
            assert not met.any()
        return None if hung else (x if residual(self.name) else out, out, left)


KINDS = [
    ("qkv", 5, torch.float16, ClusterTile(64, 3, 2, 1), {}),
    ("qkv", 21, torch.bfloat16, ClusterTile(128, 1, 2, 2), {"norm": "rmsnorm", "norm_bias": False}),
    ("up", 17, torch.float16, ClusterTile(64, 2, 2, 2), {}),
    ("up", 9, torch.float16, ClusterTile(64, 2, 3, 2), {"gated": True, "activation": "silu"}),
    ("out", 16, torch.float16, ClusterTile(64, 4, 2, 2), {}),
    ("down", 30, torch.bfloat16, ClusterTile(128, 3, 2, 1), {}),
    ("down", 33, torch.float16, ClusterTile(64, 5, 3, 3), {}),
    ("up", 130, torch.float16, ClusterTile(192, 1, 2, 1), {}),
    ("down", 20, torch.float16, ClusterTile(64, 1, 5, 2), {"d_ff": 576}),
    ("down", 30, torch.float16, ClusterTile(192, 2, 2, 1), {}),
    ("down", 20, torch.float16, ClusterTile(256, 2, 2, 1), {}),
    ("out", 70, torch.bfloat16, ClusterTile(192, 2, 2, 1, True), {}),
    ("down", 130, torch.float16, ClusterTile(128, 3, 2, 2, True), {}),
    ("up", 40, torch.float16, ClusterTile(64, 3, 2, 1, True),
     {"gated": True, "activation": "silu"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "n", "dtype", "tile", "shape"), KINDS)
def test_every_kind_of_product(name, n, dtype, tile, shape) -> None:
    case = Case(name, n, dtype, **shape)
    wanted = case.wanted()
    for seed in (1, 2):
        found = case.run(tile, seed=seed)
        assert found is not None, "it hung"
        value, out, left = found
        assert cases.relative_error(value, wanted) < (2e-3 if dtype == torch.float16 else 1e-2)
        if residual(name):
            scaled = wanted * case.gamma.double() * 4
            assert cases.relative_error(out, scaled) < (2e-3 if dtype == torch.float16 else 1e-2)
            parts = wanted.split(TOLD, 1)
            told = torch.stack([torch.stack((p.sum(1), (p**2).sum(1)), -1) for p in parts])
            assert cases.relative_error(left, told) < 1e-4


BROKEN = {
    "a slot is given back before its product is computed": (
        "await_products<QUEUED>();", "await_products<1>();"),
    "weights are not awaited": (
        "barrier_wait(shared_address(&s.full[i % STAGES]), i / STAGES & 1);", ""),
    "a full slot is filled again": (
        "barrier_wait(shared_address(&s.empty[i % STAGES]), (i / STAGES & 1) ^ 1);", ""),
    "activations are read before they are there": (
        "await_last();\n        copy_chunks", "copy_chunks"),
    "sums take the ring's place too early": ("meet<1, MULTIPLYING>();", ""),
    "others' sums are not awaited": ("barrier_wait(shared_address(&s.all_heard), 0);", ""),
    "a program ends while others read its sums": (
        "stays\n    if (CLUSTERED) cluster_wait();", ""),
    "the next kernel is not let in": ("if (at.chunks <= AHEAD + LEFT) let_next_start();", ""),
    "the old residual stream is not awaited": ("barrier_wait(shared_address(&s.old_read), 0);", ""),
}  # fmt: skip
IN_MEMORY = {
    "others' sums are not awaited": (
        "if (threadIdx.x == 0) meet_programs(a.met + at.tile, SPLIT);", ""),
    "sums are read a turn too far ahead": ("Quad quad = next;", "Quad& quad = next;"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    case = Case("down", 20, torch.float16)
    wanted, tile = case.wanted(), ClusterTile(128, 2, 2, 1)
    assert cases.relative_error(case.run(tile, seed=1)[0], wanted) < 2e-3
    found = (case.run(tile, seed=seed, broken=BROKEN[what]) for seed in range(1, 7))
    assert any(f is None or not cases.relative_error(f[0], wanted) < 2e-3 for f in found)


@pytest.mark.parametrize("what", list(IN_MEMORY))
def test_what_the_emulation_finds_of_sums_in_memory(what: str) -> None:
    case = Case("down", 130, torch.float16)
    wanted, tile = case.wanted(), ClusterTile(128, 3, 2, 1, by_memory=True)
    found = (case.run(tile, seed=seed, broken=IN_MEMORY[what]) for seed in range(1, 7))
    assert any(f is None or not cases.relative_error(f[0], wanted) < 2e-3 for f in found)


class Emulated:
    """In place of a kernel on a GPU."""

    resident = 1

    def __init__(self, name: str, defined: Mapping[str, object], **_: object) -> None:
        assert name == cuda_cluster.KERNEL
        self.library = compiled(tuple(defined.items()))

    def launch_clusters(self, grid, cluster, stream, argument, *, chained) -> None:
        assert grid[0] % cluster == 0
        assert self.library.run(ctypes.byref(argument), *grid, 1, None, 0) == 0


@pytest.fixture
def emulation(monkeypatch) -> None:
    monkeypatch.setattr(cuda_hopper, "load", Emulated)
    monkeypatch.setattr(cuda_cluster, "programs_of", lambda device: 4)
    monkeypatch.setattr(cuda_cluster, "tensor_map", described)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def made_with(case: str, down: ClusterTile) -> tuple[CudaDecoder, Any]:
    """Return a decoder of products in clusters and the same model in float64."""
    n_head, n_kv_head = (4, 1) if case == "multi-query" else (2, 2)
    shape = cases.config(case, d_model=128, d_ff=128, head_dim=128 // n_head, n_head=n_head,
                         n_kv_head=n_kv_head)  # fmt: skip
    plain = cases.drawn(shape, torch.float16)
    made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float16,
                       limits=cases.limits(2, 16), device="cpu")  # fmt: skip
    tiles = ClusterTile(64, 2, 2, 1), ClusterTile(128, 1, 2, 2), ClusterTile(64, 1, 2, 2), down
    chosen = default_tuning(shape, "cpu")
    made.use(replace(chosen, cluster={"16": dict(zip(NAMES, tiles, strict=True))},
                     wide_attention={"16": AttentionTile(1, 16, 1)}))  # fmt: skip
    return made, plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
@pytest.mark.parametrize(("case", "by_memory"), [("multi-query", True), ("gated rotary", False)])
def test_a_step_of_a_model(case: str, by_memory: bool, emulation, monkeypatch) -> None:
    made, plain = made_with(case, ClusterTile(64, 2, 2, 2, by_memory))
    shape = made.config
    cache = KVCache(shape, 2, 16, dtype=torch.float64)
    first = Step.prefill([[5, 7], [9, 11]])  # four tokens: a small step, too
    step = cases.one_token([0, 1], torch.arange(2), [2, 2])
    for one in (first, step):
        wanted = cases.reference(plain, cache, one)
        assert cases.relative_error(made.step(one), wanted) < cases.TOLERANCE[torch.float16]
    monkeypatch.setattr(cuda_chains, "layer_products", None)
    made.step(step)  # what was made for a step is kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
def test_programs_that_wait_for_each_other_must_all_have_room(emulation, monkeypatch) -> None:
    """Else they would wait for ever."""
    monkeypatch.setattr(cuda_cluster, "programs_of", lambda device: 3)
    made, _ = made_with("multi-query", ClusterTile(64, 2, 2, 2, by_memory=True))
    step = cases.one_token([0, 1], torch.arange(2), [2, 2])
    with pytest.raises(EngineError, match=r"down's 4 programs wait .* --set tune false"):
        made.step(step)
