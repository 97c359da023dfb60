"""Residual addition and layer norm (or RMS norm) in one pass over the row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def residual_norm_kernel(
    x,
    delta,
    gamma,
    beta,
    out,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RMS: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """x[row] += delta[row]; out[row] = norm(x[row]) * gamma + beta. One program a row of D.

    The row stays in registers between the two statistics passes, so that x and delta are read
    once, x and out written once. Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < D
    value = tl.load(x + row * D + at, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(delta + row * D + at, mask=live, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x + row * D + at, value.to(x.dtype.element_ty), mask=live)
    if RMS:
        centred = value
    else:
        centred = tl.where(live, value - tl.sum(value, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    y = centred * scale * tl.load(gamma + at, mask=live, other=0.0)
    if HAS_BETA:
        y += tl.load(beta + at, mask=live, other=0.0)
    tl.store(out + row * D + at, y.to(out.dtype.element_ty), mask=live)
