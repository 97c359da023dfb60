"""The graph bound to its cache: tokens go in, logits come out, the cache stays where it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porttool.engines.onnx.rows import RowMap
from porttool.nn import KVCache, Step

if TYPE_CHECKING:
    from porttool.config import Limits, ModelConfig


HIDDEN = "norm.out"
"""The last norm's output [rows, d_model], which the head projects: float32 graphs' own name."""
PROJECTED = "projected"
"""Which of these rows get logits, int64: all or none. See `greedy.choosing`."""
MAX_KEPT = 16
"""Bindings of plain decoding that are kept; each holds logits of its own."""


class Program(ABC):
    """The exported graph, loaded by some library on some device."""

    device: str
    scatters: bool
    """True if the graph writes into the cache itself (form `scatter`)."""
    chooses: bool = False
    """True if a run says which rows get logits: see `greedy.choosing`."""

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor], *, repeats: bool) -> Callable[[], None]:
        """Bind memory to every input and output; return what runs the graph on it.

        `repeats` says that the same binding will run for many steps.
        """


@dataclass(frozen=True)
class StepShape:
    """Everything that a binding depends on: the first cache row, batch, width, rows of `output`."""

    first: int
    batch: int
    width: int
    rows: int
    output: str


@dataclass(frozen=True)
class Binding:
    """One step's inputs and logits at fixed addresses, and the call that runs it."""

    tensors: dict[str, Tensor]
    execute: Callable[[], None]
    news: tuple[Tensor, Tensor] | None


class CachedGraph:
    """A program of the exported graph, and the cache that it reads and writes in place."""

    def __init__(
        self, program: Program, config: ModelConfig, limits: Limits, *, dtype: str
    ) -> None:
        self.program = program
        self.config = config
        self.device = program.device
        kind = getattr(torch, dtype)
        self.cache = KVCache(
            config, limits.max_batch_size, limits.max_len, dtype=kind, device=self.device
        )
        size = (limits.max_prompt_rows, config.d_model)
        self.table = torch.zeros(size, dtype=kind, device=self.device)
        self._rows = RowMap(limits.max_batch_size)
        self._kept: dict[StepShape, Binding] = {}

    def run(self, step: Step, *, all_positions: bool) -> Tensor:
        """Feed a step that fits; logits [n, vocab_size], or [n, width, vocab_size]."""
        return self._feed(step, "logits", all_positions=all_positions)

    def hidden(self, step: Step) -> Tensor:
        """Feed a step that fits; what the head projects of each row's last token [n, d_model].

        Only of a program that `chooses`.
        """
        return self._feed(step, HIDDEN, all_positions=False)

    @torch.inference_mode()
    def _feed(self, step: Step, output: str, *, all_positions: bool) -> Tensor:
        n, width = step.tokens.shape
        place = self._rows.arrange(step.slots.tolist())
        self._copy(place.moves)
        order = torch.tensor(place.order)
        starts = step.starts[order].tolist()
        self.cache.prepare(
            range(place.first, place.first + n), starts, [start + width for start in starts],
            writes_first=self.program.scatters,
        )  # fmt: skip
        ends = torch.arange(n) * width + step.lengths[order] - 1
        given = {
            "tokens": step.tokens[order],
            "positions": step.positions[order].clamp(max=self.cache.keys.shape[3] - 1),
            "starts": step.starts[order],
            "wanted": torch.arange(n * width) if all_positions else ends,
        }
        shape = StepShape(place.first, n, width, len(given["wanted"]), output)
        bound = self._binding(shape)
        for name, values in given.items():
            bound.tensors[name].copy_(values)
        bound.execute()
        if bound.news is not None:
            self._store(shape, given, bound.news)
        found = bound.tensors[output]
        back = torch.empty_like(order)
        back[order] = torch.arange(n)
        return (found.view(n, width, -1) if all_positions else found)[back.to(self.device)]

    def copy_slots(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the rows of whole slots, as if at once."""
        rows = self._rows.row_of
        self._copy([(rows[a], rows[b]) for a, b in zip(source, target, strict=True)])

    @contextmanager
    def using(self, program: Program) -> Iterator[None]:
        """Run another program of the same graph for a while, on the same cache."""
        usual, kept = self.program, self._kept
        self.program, self._kept = program, {}
        try:
            yield
        finally:
            self.program, self._kept = usual, kept

    def load_table(self, table: Tensor | None) -> None:
        """Put rows of a prompt table where the graph reads them."""
        self.table.zero_()
        if table is not None:
            self.table[: len(table)] = table

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        if moves:
            source, target = zip(*moves, strict=True)
            self.cache.copy_slots(torch.tensor(source), torch.tensor(target))

    def _binding(self, shape: StepShape) -> Binding:
        """Bind a shape; one of plain decoding is kept, since it comes back with every token."""
        if shape not in self._kept:
            bound = self._bind(shape)
            if shape.width > 1:
                return bound
            if len(self._kept) == MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[shape] = bound
        return self._kept[shape]

    def _bind(self, shape: StepShape) -> Binding:
        news = None if self.program.scatters else self._news(shape)
        tensors = {**self._step_tensors(shape), **self._cache_tensors(shape, news)}
        if len(self.table):
            tensors["prompt_table"] = self.table
        return Binding(tensors, self.program.bind(tensors, repeats=shape.width == 1), news)

    def _step_tensors(self, shape: StepShape) -> dict[str, Tensor]:
        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64, device=self.device)

        projected = shape.rows if shape.output == "logits" else 0
        found = {
            "tokens": integers(shape.batch, shape.width),
            "positions": integers(shape.batch, shape.width),
            "starts": integers(shape.batch),
            "wanted": integers(shape.rows),
            "logits": torch.empty(projected, self.config.vocab_size, device=self.device),
        }
        if self.program.chooses:
            found[PROJECTED] = torch.arange(projected)
            found[HIDDEN] = torch.empty(shape.rows, self.config.d_model)
        return found

    def _news(self, shape: StepShape) -> tuple[Tensor, Tensor]:
        """Return room for a step's new keys and values: the graph does not store them itself."""
        c = self.config
        sizes = (c.n_layer, shape.batch, c.n_kv_head, shape.width, c.head_dim)
        keys, values = (
            torch.empty(sizes, dtype=self.cache.keys.dtype, device=self.device) for _ in range(2)
        )
        return keys, values

    def _cache_tensors(
        self, shape: StepShape, news: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return the rows of every layer: as past, and again as present, the same memory."""
        rows = slice(shape.first, shape.first + shape.batch)
        found = {}
        wholes = (("key", self.cache.keys), ("value", self.cache.values))
        for i, (kind, whole) in enumerate(wholes):
            for layer in range(self.config.n_layer):
                found[f"past_{kind}.{layer}"] = past = whole[layer, rows]
                if news is None:
                    found[f"present_{kind}.{layer}"] = past
                else:
                    found[f"new_{kind}.{layer}"] = news[i][layer]
        return found

    def _store(
        self, shape: StepShape, given: Mapping[str, Tensor], news: tuple[Tensor, Tensor]
    ) -> None:
        """Put a step's new keys and values where they belong; a row behind the cache has none."""
        kept = (given["starts"] < self.cache.keys.shape[3]).nonzero()[:, 0]
        rows = kept.to(self.device)[:, None] + shape.first
        positions = given["positions"][kept].to(self.device)
        for whole, new in zip((self.cache.keys, self.cache.values), news, strict=True):
            stored = new[:, kept.to(self.device)]  # [n_layer, rows, n_kv_head, width, head_dim]
            whole[:, rows, :, positions] = stored.permute(1, 3, 0, 2, 4)
