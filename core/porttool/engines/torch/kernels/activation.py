"""The activation functions of `ModelConfig`, on float32 registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Apply one activation; "none" passes through. The tanh of GELU is written as a sigmoid."""
    if KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif KIND == "silu":
        x = x * tl.sigmoid(x)
    else:
        tl.static_assert(KIND == "none", "unknown activation")
    return x


@triton.jit
def activate_kernel(
    x, out, N, HALF: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = act(x[i]), or act(gate) * linear for rows gate | linear of x [rows, 2 * HALF].

    Moves each element once in and once out; N is the number of elements of `out`.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    if GATED:
        first = at // HALF * (2 * HALF) + at % HALF
        gate = tl.load(x + first, mask=live, other=0.0).to(tl.float32)
        linear = tl.load(x + first + HALF, mask=live, other=0.0).to(tl.float32)
        y = activate(gate, KIND) * linear
    else:
        y = activate(tl.load(x + at, mask=live, other=0.0).to(tl.float32), KIND)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)
