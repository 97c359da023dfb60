"""The static key and value cache: a fixed number of slots of a fixed capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.errors import EngineError
from porttool.memory import zeros
from porttool.progress import format_bytes

if TYPE_CHECKING:
    from porttool.nn.decoder import Step


class KVCache:
    """Keys and values of every layer, [n_layer, n_slots, n_kv_head, capacity, head_dim] each.

    A row of a batch lives in one slot; where its next token goes is the caller's to say, so rows
    join, leave and step back without any bookkeeping here.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, n_slots, config.n_kv_head, capacity, config.head_dim)
        self._written = [0] * n_slots  # leading places of each slot that may hold something
        if str(device) != "cpu":
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            return
        try:
            self.keys, self.values = zeros(shape, dtype), zeros(shape, dtype)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            size = 2 * math.prod(shape) * dtype.itemsize
            raise EngineError(
                f"there is no memory for the caches of {n_slots} rows of {capacity} tokens, "
                f"{format_bytes(size)}; build the engine for fewer or shorter ones"
            ) from error

    def prepare(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        writes_first: bool = True,
    ) -> None:
        """Note that a step writes places `starts` to `ends` (exclusive) of slots; clear remains.

        Where a row begins anew, what the last one left behind its end becomes zero; all of it
        where the step reads before it writes. A query weighs what it does not see with 0, and 0
        times infinity is no number: that of a row that overflowed would become the next one's.
        """
        for slot, start, end in zip(slots, starts, ends, strict=True):
            kept = end if writes_first else 0
            if start == 0 and self._written[slot] > kept:
                for whole in (self.keys, self.values):
                    whole[:, slot, :, kept : self._written[slot]] = 0
                self._written[slot] = 0
            if start < self.keys.shape[3]:
                self._written[slot] = max(self._written[slot], end)

    def begin(self, step: Step) -> None:
        """Prepare for a step of which only what is real is stored: once, before all layers."""
        ends = step.starts + step.lengths
        self.prepare(step.slots.tolist(), step.starts.tolist(), ends.tolist())

    def update(self, layer: int, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what is real of a step's [n, n_kv_head, width, head_dim]; return the rows' all.

        The result is [n, n_kv_head, reach, head_dim], where reach covers the last real token.
        """
        rows, columns = step.real
        places = step.positions[rows, columns]
        where = (step.slots[rows], slice(None), places)
        self.keys[layer][where] = keys[rows, :, columns]
        self.values[layer][where] = values[rows, :, columns]
        reach = int(places.max()) + 1
        return self.keys[layer, step.slots, :, :reach], self.values[layer, step.slots, :, :reach]

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots, as if at once: a target may also be a source."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
        written = [self._written[slot] for slot in source.tolist()]
        for slot, places in zip(target.tolist(), written, strict=True):
            self._written[slot] = places
