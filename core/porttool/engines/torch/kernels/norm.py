# ruff: noqa: SIM108 (Triton compiles no ternary over tensors)
"""Residual addition and layer norm (or RMS norm) in one pass over the row."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.chain import announce, await_predecessor


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
    at = tl.arange(0, BLOCK)
    live = at < D
    scale = tl.load(gamma + at, mask=live, other=0.0)
    shift = tl.zeros((BLOCK,), tl.float32)
    if HAS_BETA:
        shift = tl.load(beta + at, mask=live, other=0.0)
    extra = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        extra = tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    await_predecessor(PDL)
    if not EARLY:
        announce(PDL)
    value = tl.load(x + row * D + at, mask=live, other=0.0).to(tl.float32)
    if PARTS > 0:
        for p in tl.static_range(PARTS):
            offset = (p * rows + row) * D + at
            value += tl.load(delta + offset, mask=live, other=0.0).to(tl.float32)
        value = (value + extra).to(x.dtype.element_ty)
        tl.store(x + row * D + at, value, mask=live)
        value = value.to(tl.float32)
    if RMS:
        centred = value
    else:
        centred = tl.where(live, value - tl.sum(value, 0) / D, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps) * scale + shift
    tl.store(out + row * D + at, y.to(out.dtype.element_ty), mask=live)
