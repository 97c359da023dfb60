"""The likeliest token of a float32 head without reading all of it: `head.h` as Python sees it."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from porttool.engines.native.library import load_library

CHUNK = 4096
"""Rows that are rounded to int8 at a time."""
MOST_THREADS = 8
"""Threads that choose a token, at most: they start anew for each, and a few keep memory busy."""


class HeadFields(ctypes.Structure):
    """Mirrors `Head` in head.h."""

    _fields_ = [
        ("vocab_size", c_int64),
        ("d_model", c_int64),
        *((name, c_void_p) for name in ("weight", "coarse", "scale", "error")),
    ]


class ScreenedHead:
    """A head [vocab_size, d_model] of any type, and an int8 copy that says which rows to read."""

    def __init__(self, weight: Tensor) -> None:
        self.library = load_library()
        self.kept = (weight.detach(), *round_rows(weight.detach()))
        self.fields = HeadFields(*weight.shape, *(tensor.data_ptr() for tensor in self.kept))

    def likeliest(self, x: Tensor, threads: int) -> Tensor:
        """Return the ids [n] of the highest logits for x [n, d_model]; both are float32.

        Of equal ones the lowest. In whichever order another library sums its logits, its highest is
        among the rows that are computed here, in this code's own order.
        """
        near, out = torch.empty(len(x), len(self.kept[0])), torch.empty(len(x), dtype=torch.int64)
        x = x.contiguous()
        self.library.porttool_choose(
            byref(self.fields), x.data_ptr(), len(x), near.data_ptr(), out.data_ptr(),
            min(threads, MOST_THREADS),
        )  # fmt: skip
        return out


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows [n, d] to int8; return them, their scales and a bound on what rounding costs.

    With `error` the third, |weight . x - scale * coarse . x| <= error * |x| for every x, however
    the two products are summed in float32. The norm of the rounding error bounds their exact
    difference (Cauchy-Schwarz). A sum of d products in any order, fused or not, is off by at most
    gamma |weight| |x|, gamma = d u / (1 - d u), u = 2^-24 (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1). It is taken four times: for both products, and for what
    the scale, the comparison and this computation round, which is a few u.
    """
    coarse = torch.empty(weight.shape, dtype=torch.int8)
    scale, error = torch.empty(len(weight)), torch.empty(len(weight))
    gamma = (weight.shape[1] + 2) * 2.0**-24
    for start in range(0, len(weight), CHUNK):
        rows, part = weight[start : start + CHUNK].float(), slice(start, start + CHUNK)
        scale[part] = (rows.abs().amax(1) / 127).clamp(min=1e-30)
        coarse[part] = (rows / scale[part, None]).round().clamp(-127, 127).to(torch.int8)
        lost = (rows - coarse[part] * scale[part, None]).norm(dim=1)
        error[part] = (lost + 4 * gamma * rows.norm(dim=1)) * 1.0001
    return coarse, scale, error
