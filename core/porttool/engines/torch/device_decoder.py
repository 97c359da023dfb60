"""What the torch runner expects of a decoder for one kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.errors import EngineError
from porttool.nn import KVCache, Step, meta_decoder, require_shapes
from porttool.runner import Choose, Runner


class DeviceDecoder(ABC):
    """Weights packed for a device and a static cache. `weights` are canonical, on the CPU."""

    description: str
    decodes_on_device = False
    samples_on_device = False
    tokens_at_once = Runner.tokens_at_once

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        limits: Limits,
    ) -> None:
        require_shapes(config, {name: tuple(w.shape) for name, w in weights.items()})
        self.config = config
        self.dtype = dtype
        self.limits = limits
        self.n_slots = limits.max_batch_size
        self.max_len = limits.max_len

    @abstractmethod
    def step(self, step: Step, *, all_positions: bool) -> Tensor:
        """See Runner.step."""

    @abstractmethod
    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """See Runner.copy_slots."""

    @abstractmethod
    def load_prompt_table(self, table: Tensor | None) -> None:
        """See Runner.load_prompt_table."""

    def decode(self, step: Step, n_tokens: int) -> Tensor:
        """See Runner.decode: the likeliest tokens. Only called when `decodes_on_device`."""
        raise EngineError(f"{self.description} does not decode on the device")

    def sample(self, step: Step, n_tokens: int, choose: Choose) -> Tensor:
        """See Runner.decode. Only called when `samples_on_device`."""
        raise EngineError(f"{self.description} does not sample on the device")


class CanonicalDecoder(DeviceDecoder):
    """The plain torch decoder itself, on any device and in any type: slow, and the reference."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        limits: Limits,
        device: str = "cpu",
    ) -> None:
        super().__init__(config, weights, dtype=dtype, limits=limits)
        self.description = f"canonical decoder on {device}"
        self.module = meta_decoder(config).eval().requires_grad_(False)
        self.module.load_state_dict(
            {n: w.to(device, dtype) for n, w in weights.items()}, assign=True
        )
        self.cache = KVCache(config, self.n_slots, self.max_len, dtype=dtype, device=device)
        self.device = device

    @torch.inference_mode()
    def step(self, step: Step, *, all_positions: bool) -> Tensor:
        """Run the module and pick each row's last real token."""
        step = step.to(self.device)
        logits: Tensor = self.module(step, self.cache)
        if not all_positions:
            logits = logits[torch.arange(len(logits)), step.lengths - 1]
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy whole cache rows."""
        self.cache.copy_slots(torch.tensor(source), torch.tensor(target))

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Hand the rows to the module's embedding."""
        self.module.prompt_table = None if table is None else table.to(self.device, self.dtype)
