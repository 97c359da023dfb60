"""The graph bound to its cache: tokens go in, logits come out, the cache stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.engines.onnx.rows import RowMap
from porttool.engines.onnx.session import translated_errors
from porttool.nn import KVCache, Step

if TYPE_CHECKING:
    from porttool.config import Limits, ModelConfig


@dataclass(frozen=True)
class StepShape:
    """Everything that a binding depends on: the first cache row, batch, width, logits rows."""

    first: int
    batch: int
    width: int
    rows: int


@dataclass(frozen=True)
class Binding:
    """One step's inputs, at fixed addresses, bound together with the cache rows they go with."""

    shape: StepShape
    io: Any
    tokens: Tensor
    positions: Tensor
    starts: Tensor
    wanted: Tensor
    news: tuple[Tensor, Tensor] | None


class CachedGraph:
    """A session of the exported graph, and the cache that it reads and writes in place."""

    def __init__(
        self, session: Any, config: ModelConfig, limits: Limits, *, dtype: str, device: str
    ) -> None:
        self.session = session
        self.config = config
        self.dtype = dtype
        self.device = device
        self.capacity = limits.max_len
        self.scatters = any(o.name.startswith("present_key") for o in session.get_outputs())
        kind = getattr(torch, dtype)
        self.cache = KVCache(
            config, limits.max_batch_size, limits.max_len, dtype=kind, device=device
        )
        self.table = torch.zeros(limits.max_prompt_rows, config.d_model, dtype=kind, device=device)
        self._rows = RowMap(limits.max_batch_size)
        self._last: Binding | None = None

    @torch.inference_mode()
    def run(self, step: Step, *, all_positions: bool) -> Tensor:
        """Feed a step that fits; logits [n, vocab_size], or [n, width, vocab_size]."""
        n, width = step.tokens.shape
        place = self._rows.arrange(step.slots.tolist())
        self._copy(place.moves)
        order = torch.tensor(place.order)
        back = torch.empty_like(order)
        back[order] = torch.arange(n)
        ends = torch.arange(n) * width + step.lengths[order] - 1
        wanted = torch.arange(n * width) if all_positions else ends
        bound = self._bind(StepShape(place.first, n, width, len(wanted)))
        for target, source in (
            (bound.tokens, step.tokens[order]),
            (bound.positions, step.positions[order]),
            (bound.starts, step.starts[order]),
            (bound.wanted, wanted),
        ):
            target.copy_(source)
        logits = self._execute(bound)
        if bound.news is not None:
            self._store(bound, bound.news)
        if all_positions:
            logits = logits.view(n, width, -1)
        return logits if n == 1 else logits[back.to(self.device)]

    def copy_slots(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the rows of whole slots, as if at once."""
        rows = self._rows.row_of
        self._copy([(rows[a], rows[b]) for a, b in zip(source, target, strict=True)])

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        if moves:
            source, target = zip(*moves, strict=True)
            self.cache.copy_slots(torch.tensor(source), torch.tensor(target))

    def _execute(self, bound: Binding) -> Tensor:
        logits = torch.empty(bound.shape.rows, self.config.vocab_size, device=self.device)
        self._bind_tensor(bound.io.bind_output, "logits", logits)
        with translated_errors("ONNX Runtime could not run the step"):
            self.session.run_with_iobinding(bound.io)
        return logits

    def _bind(self, shape: StepShape) -> Binding:
        """Return the last binding if it has the shape: decoding binds once for many steps."""
        if self._last is None or self._last.shape != shape:
            self._last = self._make_binding(shape)
        return self._last

    def _make_binding(self, shape: StepShape) -> Binding:
        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64, device=self.device)

        grid = (shape.batch, shape.width)
        bound = Binding(
            shape, self.session.io_binding(), integers(*grid), integers(*grid),
            integers(shape.batch), integers(shape.rows), self._news(shape),
        )  # fmt: skip
        for name in ("tokens", "positions", "starts", "wanted"):
            self._bind_tensor(bound.io.bind_input, name, getattr(bound, name))
        if len(self.table):
            self._bind_tensor(bound.io.bind_input, "prompt_table", self.table)
        self._bind_cache(bound)
        return bound

    def _news(self, shape: StepShape) -> tuple[Tensor, Tensor] | None:
        """Return room for a step's new keys and values, where the graph does not store them."""
        if self.scatters:
            return None
        c = self.config
        sizes = (c.n_layer, shape.batch, c.n_kv_head, shape.width, c.head_dim)
        kind = self.cache.keys.dtype
        return (
            torch.empty(sizes, dtype=kind, device=self.device),
            torch.empty(sizes, dtype=kind, device=self.device),
        )

    def _bind_cache(self, bound: Binding) -> None:
        """Bind the rows of every layer: as past, and again as present, the same memory."""
        rows = slice(bound.shape.first, bound.shape.first + bound.shape.batch)
        wholes = (self.cache.keys, self.cache.values)
        for i, (kind, whole) in enumerate(zip(("key", "value"), wholes, strict=True)):
            for layer in range(self.config.n_layer):
                past = whole[layer, rows]
                self._bind_tensor(bound.io.bind_input, f"past_{kind}.{layer}", past)
                if bound.news is None:
                    self._bind_tensor(bound.io.bind_output, f"present_{kind}.{layer}", past)
                else:
                    new = bound.news[i][layer]
                    self._bind_tensor(bound.io.bind_output, f"new_{kind}.{layer}", new)

    def _store(self, bound: Binding, news: tuple[Tensor, Tensor]) -> None:
        """Put a step's new keys and values where they belong."""
        rows = torch.arange(bound.shape.batch, device=self.device)[:, None] + bound.shape.first
        for whole, new in zip((self.cache.keys, self.cache.values), news, strict=True):
            whole[:, rows, :, bound.positions] = new.permute(1, 3, 0, 2, 4)

    def _bind_tensor(self, bind: Any, name: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        device_id = tensor.device.index or 0
        bind(
            name, tensor.device.type, device_id, ELEMENT_TYPES[dtype], list(tensor.shape),
            tensor.data_ptr(),
        )  # fmt: skip
