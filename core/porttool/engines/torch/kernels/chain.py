"""How consecutive kernels overlap: programmatic dependent launch and prefetch into the L2 cache.

A kernel of the decode chain first does what does not depend on its predecessor (it loads weights
into registers and asks the L2 cache for more), then waits for it, then reads activations.
Every kernel waits, so that after its wait everything earlier in the chain is complete.
A kernel that lets its successor start before its own wait (`EARLY`) only promises weights: the
first kernel of each token does not, so that later ones may read positions and old cache entries
before their wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PREFETCH: tl.constexpr = tl.constexpr(
    "{ .reg .pred p, q; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 q, t, 0;"
    " setp.gt.and.s32 p, $2, 0, q; @p cp.async.bulk.prefetch.L2.global [$1], $2;"
    " mov.u32 $0, 0; }"
)


@triton.jit
def announce(PDL: tl.constexpr):
    """Let the next kernel of the chain start as soon as this one's programs are all running."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_predecessor(PDL: tl.constexpr):
    """Wait until every earlier kernel of the chain is complete and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(base, first, n_bytes):
    """Ask the L2 cache for [base + first, base + first + n_bytes): one bulk instruction.

    Only thread 0 issues it, and it holds no register while in flight. Multiples of 16 bytes.
    """
    address = base.to(tl.int64, bitcast=True) + first
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [address, n_bytes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_share(base, n_bytes):
    """Ask the L2 cache for this program's share of the first n_bytes at `base`."""
    share = tl.cdiv(n_bytes, tl.num_programs(0) * 16) * 16
    first = tl.program_id(0).to(tl.int64) * share
    prefetch(base, first, tl.minimum(share, tl.maximum(n_bytes - first, 0)).to(tl.int32))
