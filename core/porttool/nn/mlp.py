"""The feed-forward half of a layer: plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from porttool.config import Activation, ModelConfig


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the tanh form of Hendrycks and Gimpel 2016, section 2."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU in the sigmoid form of Hendrycks and Gimpel 2016: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * linear x) when gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.act = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.d_model, config.up_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_model] to the same shape."""
        hidden = self.up(x)  # [..., up_dim]
        if self.gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * linear
        else:
            hidden = self.act(hidden)
        out: Tensor = self.down(hidden)
        return out
