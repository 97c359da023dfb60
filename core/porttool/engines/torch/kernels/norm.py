# ruff: noqa: RUF005 (Triton compiles no unpacking)
"""Residual addition and layer norm (or RMS norm) in one pass over the row."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.chain import announce, await_predecessor

PIECE = 2048
"""Elements of a float32 row that a program takes at a time, 4 (16 bytes) a thread."""

REGISTERS = 65536
"""Of a multiprocessor of every GPU that the kernel runs on."""


def blocking(width: int, itemsize: int) -> dict[str, int]:
    """Return BLOCK, warps and registers for rows of so many elements of x.

    A float32 row is one of a decode step's few: all its loads shall be in flight at once. Left to
    itself the compiler saves registers, and loads a part when it has added the one before: 6 round
    trips to the L2 cache one after the other with 4096 elements and 4 parts. So it may use them
    all. A 16-bit row is one of a prompt's thousands, which hide each other's loads.
    """
    block = triton.next_power_of_2(width)
    if itemsize < 4:
        return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}
    block = min(block, PIECE)
    warps = max(block // 128, 1)
    return {"BLOCK": block, "num_warps": warps, "maxnreg": min(REGISTERS // (32 * warps), 248)}


@triton.jit
def _pieces(line, D: tl.constexpr, BLOCK: tl.constexpr):
    """A line's elements in pieces [BLOCK]; zeros from D on."""
    pieces = ()
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        pieces = pieces + (tl.load(line + at, mask=at < D, other=0.0),)
    return pieces


@triton.jit
def _added(x, values, sums, extra, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
           HAS_BIAS: tl.constexpr):  # fmt: skip
    """Pieces `values` of a row, the PARTS lists in `sums` and `extra` added; stored in x."""
    out = ()
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        value = values[i].to(tl.float32)
        for p in tl.static_range(PARTS):
            value += sums[p][i].to(tl.float32)
        if HAS_BIAS:
            value += extra[i].to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(x + at, value, mask=at < D)
        out = out + (value,)
    return out


@triton.jit
def residual_norm_kernel(
    x, delta, bias, gamma, beta, out, eps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr, HAS_BETA: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x[row] += sum_p delta[p, row] + bias; out[row] = norm(x[row]) * gamma + beta.

    x, out [rows, D]; delta [PARTS, rows, D], none with PARTS 0. One program a row: it stays in
    registers between the two statistics passes, so that x and delta are read once, x and out
    written once. Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019.
    """
    if EARLY:
        announce(PDL)
    row = tl.program_id(0).to(tl.int64)
    scale = _pieces(gamma, D, BLOCK)
    if HAS_BETA:
        shift = _pieces(beta, D, BLOCK)
    extra = ()
    if HAS_BIAS:
        extra = _pieces(bias, D, BLOCK)
    await_predecessor(PDL)
    if not EARLY:
        announce(PDL)
    x += row * D
    values = _pieces(x, D, BLOCK)
    if PARTS > 0:
        sums = ()
        for p in tl.static_range(PARTS):
            sums = sums + (_pieces(delta + (p * rows + row) * D, D, BLOCK),)
        values = _added(x, values, sums, extra, D, BLOCK, PARTS, HAS_BIAS)
    mean = 0.0
    if not RMS:
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range((D + BLOCK - 1) // BLOCK):
            total += values[i].to(tl.float32)
        mean = tl.sum(total, 0) / D
    square = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        centred = tl.where(at < D, values[i].to(tl.float32) - mean, 0.0)
        square += centred * centred
    inverse = tl.rsqrt(tl.sum(square, 0) / D + eps)
    for i in tl.static_range((D + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        y = (values[i].to(tl.float32) - mean) * inverse * scale[i]
        if HAS_BETA:
            y += shift[i]
        tl.store(out + row * D + at, y.to(out.dtype.element_ty), mask=at < D)
