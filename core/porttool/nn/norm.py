"""Layer norm, layer norm with a weight stored minus one, and RMS norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from porttool.config import ModelConfig


class Norm(nn.Module):
    """Normalises the last dimension, in float32 at least.

    `layernorm`: Ba, Kiros and Hinton 2016. `rmsnorm`: Zhang and Sennrich 2019. `layernorm1p` is
    layer norm whose stored weight is added to one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_model] to the same shape and dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide) + (1 if self.kind == "layernorm1p" else 0)
        bias = None if self.bias is None else self.bias.to(wide)
        if self.kind == "rmsnorm":
            return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)
        return F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps).to(x.dtype)
