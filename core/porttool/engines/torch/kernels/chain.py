"""How consecutive kernels overlap: programmatic dependent launch.

A kernel of the decode chain first does what does not depend on its predecessor (it loads weights
and old cache entries into registers), then waits for it, then reads activations.
Every kernel waits, so that after its wait everything earlier in the chain is complete.
A kernel that lets its successor start before its own wait (`EARLY`) only promises weights: the
first kernel of each token does not, so that later ones may read positions and old cache entries,
and count the heads that they draw, before their wait.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
