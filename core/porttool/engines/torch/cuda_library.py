"""Products by the library (cuBLAS on a GPU), for prompts and where they are faster in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from porttool.engines.torch.cuda_weights import Linear
from porttool.engines.torch.kernels.activation import activate_kernel


def product(
    linear: Linear, x: Tensor, out: Tensor, *, biased: bool = True, gelu: bool = False
) -> None:
    """Write x @ weight.T to out; with the bias, and with GELU in the product's epilogue."""
    weight, bias = linear.weight.t(), linear.bias
    if bias is None or not biased:
        torch.mm(x, weight, out=out)
    elif gelu:
        torch._addmm_activation(bias, x, weight, use_gelu=True, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def activated_product(linear: Linear, x: Tensor, gates: Tensor, out: Tensor, act: str) -> None:
    """Write act(x @ weight.T + bias) to out, the same memory as gates unless the MLP is gated."""
    gelu = _in_epilogue(linear, act, x)
    product(linear, x, gates, gelu=gelu)
    if not gelu:
        activation(gates, out, act, gated=linear.gated)


def _in_epilogue(linear: Linear, act: str, x: Tensor) -> bool:
    """Whether the library applies this activation within its product (GELU's tanh form)."""
    whole = linear.bias is not None and not linear.gated
    return whole and act == "gelu_tanh" and x.is_cuda and x.dtype != torch.float32


def activation(hidden: Tensor, out: Tensor, kind: str, *, gated: bool) -> None:
    """Activate [rows, up_dim] into [rows, up_dim], or half as wide when gated; may be in place."""
    activate_kernel[(-(-out.numel() // 2048),)](
        hidden, out, out.numel(), HALF=out.shape[1], GATED=gated, KIND=kind, BLOCK=2048,
        num_warps=8,
    )  # fmt: skip
