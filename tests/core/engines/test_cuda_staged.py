"""The Gluon kernels on a GPU: products and attention that begin before their predecessor ends.

They have no interpreter: CI compiles them, looks at the order of their instructions, and tests
what chooses them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cuda_cases as cases
from cuda_cases import GPU_SHAPES, TOLERANCE, prompts
from porttool.engines.torch.cuda_candidates import attention_candidates, wide_candidates
from porttool.engines.torch.cuda_tuning import AttentionTile, Tuning, WideTile, tile_rows
from porttool.nn import KVCache, Step

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TILES = [
    WideTile(16, 256, 4, 3, 1, True), WideTile(32, 256, 4, 3, 2, True),
    WideTile(64, 128, 2, 4, 4, True), WideTile(64, 128, 4, 3, 1, True),
    WideTile(32, 512, 8, 2, 8, True), WideTile(8, 256, 4, 2, 1, True),
]  # fmt: skip
ATTENTION = {
    "learned": [(1, 16, 2, 3), (2, 32, 4, 6), (4, 64, 4, 4)],
    "multi-query": [(1, 16, 4, 3), (2, 32, 1, 4), (16, 16, 2, 2), (8, 64, 1, 2)],
    "gated rotary": [(1, 16, 2, 3), (4, 32, 4, 4)],
    "grouped rms": [(1, 16, 4, 2), (4, 16, 2, 3)],
}


def multiply(x: Tensor, w: Tensor, bias: Tensor | None, tile: WideTile, act: str, *,
             gated: bool) -> Tensor:  # fmt: skip
    """Run the kernel; a result [M, N], summed over the parts; memory begins as NaN."""
    from porttool.engines.torch.kernels.staged import staged_linear

    rows, k = x.shape
    n = w.shape[0] // (2 if gated else 1)
    out = torch.full((rows, n), float("nan"), dtype=x.dtype, device="cuda")
    part = torch.full((tile.split, rows, n), float("nan"), device="cuda")
    block_m = min(tile_rows(rows), 32)
    staged_linear[(-(-n // tile.block_n), tile.split, -(-rows // block_m))](
        x, w, x if bias is None else bias, out, part, rows, N=n, K=k, GATED=gated, ACT=act,
        HAS_BIAS=bias is not None, SPLIT=tile.split, BLOCK_M=block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, STAGES=tile.stages, PDL=False, num_warps=tile.warps,
    )  # fmt: skip
    return part.sum(0) if tile.split > 1 else out.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 48, 64), (7, 203, 1600), (32, 1600, 1608), (45, 96, 520)])
class TestProducts:
    """Beside the same product in float64."""

    pytestmark = on_gpu

    def test_plain(self, shape: tuple[int, int, int], tile: WideTile, dtype: torch.dtype) -> None:
        x, w, bias = self.inputs(shape, dtype, 1)
        found = multiply(x, w, bias, tile, "gelu_tanh", gated=False)
        wanted = x.double() @ w.double().T
        if tile.split == 1:
            wanted = F.gelu(wanted + bias.double(), approximate="tanh")
        self.compare(found, wanted, dtype if tile.split == 1 else torch.float32)

    def test_gated(self, shape: tuple[int, int, int], tile: WideTile, dtype: torch.dtype) -> None:
        if tile.split > 1 or tile.block_n == 64:
            pytest.skip("gates are not cut, and take two tiles of shared memory")
        x, w, bias = self.inputs(shape, dtype, 2)
        found = multiply(x, w, bias, tile, "silu", gated=True)
        gate, linear = (x.double() @ w.double().T + bias.double()).chunk(2, dim=1)
        self.compare(found, F.silu(gate) * linear, dtype)

    def inputs(self, shape: tuple[int, int, int], dtype: torch.dtype, matrices: int) -> Any:
        """Draw x [rows, k], w [matrices * n, k] and a bias."""
        rows, n, k = shape
        torch.manual_seed(rows)
        sizes = ((rows, k), (matrices * n, k), (matrices * n,))
        return tuple(torch.randn(size, device="cuda").to(dtype) for size in sizes)

    def compare(self, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
        """Allow a rounding to the type, and float32 sums."""
        error = (found.double() - wanted).abs() / (wanted.abs() + wanted.std())
        assert float(error.max()) < {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-5)


def staged(tuning: Tuning, attention: tuple[int, int, int, int]) -> Tuning:
    """Let every product of up to 32 rows and all attention of several rows be staged."""
    tiles = {
        "qkv": WideTile(32, 256, 4, 3, 2, True), "out": WideTile(16, 256, 4, 3, 4, True),
        "up": WideTile(16, 128, 4, 3, 1, True), "down": WideTile(64, 128, 2, 4, 1, True),
    }  # fmt: skip
    wide = {rows: {**old, **tiles} if int(rows) <= 32 else old for rows, old in tuning.wide.items()}
    tile = AttentionTile(*attention, staged=True)
    return replace(tuning, wide=wide, wide_attention=dict.fromkeys(tuning.wide_attention, tile))


def make(case: str, attention: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    """Return a decoder in staged tiles, the reference and its cache; unset memory is NaN."""
    from porttool.engines.torch.cuda import CudaDecoder

    shape = cases.config(case, **GPU_SHAPES[case])
    plain = cases.drawn(shape, dtype, "cuda")
    made = CudaDecoder(shape, plain.state_dict(), dtype=dtype, limits=cases.limits(40, 600))
    made.use(staged(made.tuning, attention))
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made, plain, KVCache(shape, 40, 600, dtype=torch.float64, device="cuda")


DECODERS = pytest.mark.parametrize(
    ("case", "attention"), [(case, tile) for case, tiles in ATTENTION.items() for tile in tiles]
)


@DECODERS
class TestDecoder:
    """A whole decoder in staged tiles."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_logits(
        self, case: str, attention: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        made, plain, cache = make(case, attention, dtype)
        lengths = [500, 37, 128, 1]
        many = [3 + 13 * i for i in range(40)]
        steps = [
            Step.prefill(prompts(lengths), [4, 0, 2, 7]),
            cases.one_token([4, 0, 2, 7], torch.arange(4), lengths),
            Step(torch.tensor([4, 2]), torch.arange(6).view(2, 3), torch.tensor([501, 129]),
                 torch.tensor([3, 2])),
            Step.prefill(prompts(many, seed=2)),
            cases.one_token(list(range(40)), torch.arange(40), many),
            cases.one_token(list(range(29)), torch.arange(29), [n + 1 for n in many[:29]]),
        ]  # fmt: skip
        for step in steps:
            wanted = cases.reference(plain, cache, step)
            assert cases.relative_error(made.step(step), wanted) < TOLERANCE[dtype]

    def test_a_row_is_the_same_bits_in_any_batch(
        self, case: str, attention: tuple[int, int, int, int]
    ) -> None:
        made, _, _ = make(case, attention, torch.float16)
        cases.assert_same_bits_in_any_batch(made)

    def test_greedy_tokens_repeat(self, case: str, attention: tuple[int, int, int, int]) -> None:
        made, _, _ = make(case, attention, torch.float16)
        lengths = [20 + 5 * i for i in range(24)]
        made.step(Step.prefill(prompts(lengths)))
        begin = cases.one_token(list(range(24)), torch.arange(24), lengths)
        found = made.decode(begin, 40)
        for _ in range(3):
            assert torch.equal(found, made.decode(begin, 40))


@pytest.mark.parametrize("staged", [True, False])
def test_staged_tiles_are_tried_only_where_they_run(staged: bool) -> None:
    config = cases.config("multi-query", **GPU_SHAPES["multi-query"])
    attention = list(attention_candidates(config, 32, staged=staged))
    products = [
        tile
        for rows in (16, 32, 128)
        for name in ("qkv", "up", "head")
        for tile in wide_candidates(1000, 768, rows, name, gated=False, staged=staged)
        if tile.staged and not (name == "head" or rows == 128)
    ]
    assert bool(products) is staged
    assert any(tile.staged for tile in attention) is staged
    assert not any(tile.staged for tile in attention_candidates(config, 1, staged=staged))


@pytest.mark.parametrize(
    ("name", "rows", "k"), [("head", 32, 768), ("up", 64, 768), ("up", 32, 90)]
)
def test_what_staged_products_do_not_take(name: str, rows: int, k: int) -> None:
    tiles = wide_candidates(1000, k, rows, name, gated=False, staged=True)
    assert not any(tile.staged for tile in tiles)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from porttool.engines.torch.kernels import staged, staged_attention

LINEAR = dict(N=1600, K=1608, GATED={gated}, ACT="silu", HAS_BIAS=True, SPLIT={split}, BLOCK_M=32,
              BLOCK_N=32, BLOCK_K=256, STAGES=3, PDL=True)
ATTENTION = dict(HEADS=6, KV=1, DIM=80, ROTARY=40, PARTS=2, HAS_BIAS=True, BLOCK_D=128, BLOCK_T=16,
                 SPLITS={split}, STAGES=3, APPEND=True, PDL=True)
KERNELS = {{
    "linear": (staged.staged_linear, LINEAR),
    "attention": (staged_attention.staged_attention, ATTENTION),
    "group": (staged_attention.staged_group_attention, dict(ATTENTION, BLOCK_G=16)),
}}
TYPES = dict(slots="*i32", positions="*i32", part="*fp32", cosine="*fp32", sine="*fp32",
             weight="*fp32", scale="fp32", capacity="i32", stride="i32", M="i32")
kernel, constants = KERNELS["{name}"]
names = kernel.arg_names
types = {{n: "constexpr" if n in constants else TYPES.get(n, "*{kind}") for n in names}}
whole = {{(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n].startswith("*")}}
source = GluonASTSource(kernel, signature=types, constexprs=constants, attrs=whole)
made = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, launch_pdl=True))
print(made.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("name", "kind", "split", "gated"),
    [("linear", "fp16", 4, False), ("linear", "bf16", 1, True), ("attention", "fp16", 1, False),
     ("group", "bf16", 2, False)],
)  # fmt: skip
def test_copies_begin_before_the_wait(name: str, kind: str, split: int, gated: bool) -> None:
    code = COMPILE.format(name=name, kind=kind, split=split, gated=gated)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, wait, after = done.stdout.partition("griddepcontrol.wait")
    assert wait and "griddepcontrol.launch_dependents" in before
    assert before.count("cp.async.commit_group") == 2
    copied = before.count("cp.async.cg.shared.global")
    assert copied and copied == before.count("cp.async.c") - 2
    assert ("mma.sync" in after) is (name != "attention")
    assert "mma.sync" not in before
