"""Prompts of few tokens: padded to one of a few sizes, each a CUDA graph from its second time on.

The host needs longer to launch eight or nine kernels a layer than a GPU to run them on few tokens,
and a busy host several times as long. A graph is launched at once, but runs on what lies at the
addresses it was captured with: so what a prompt brings is copied to buffers that stay, and its
length is padded. Padding has a negative slot, which keeps it out of the cache, and belongs to no
row, which keeps it out of attention.

The library chooses its products by the number of tokens. Therefore sizes are padded whether a graph
runs or not: the same launches on the same buffers give the same bits, first and later, with graphs
and without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_launch import Model, embed
from porttool.engines.torch.cuda_packed import Packed
from porttool.engines.torch.cuda_prefill import (
    PRODUCTS,
    Prompt,
    Together,
    make_buffers,
    prefill_layers,
)
from porttool.engines.torch.cuda_state import rows_of
from porttool.engines.torch.cuda_tuning import power_of_two

GRAPH_TOKENS = 1024
"""Prompt tokens that are padded, at most: the buffers stay."""

LAUNCHING = 140e-6
"""Seconds that a host takes to launch a layer's kernels, as measured: 136 to 149 us."""

MEMORY = 4.3e12
"""What a GPU reads in a second: an H200."""

KEPT = 24
"""Sizes that are remembered: more than the 18 that a prompt alone can have."""

CHEAP = 1 / 32
"""Of a prompt's tokens, what may be padded for a graph that is not needed."""


def suits_graph(config: ModelConfig, n: int, itemsize: int) -> bool:
    """True where a GPU is done with a layer of n tokens before the next one is launched.

    Elsewhere only where padding costs little (it is 9 % for StarCoder's 530 tokens): a graph leaves
    1.7 us less between kernels (3 % of StarCoder's 512 tokens) and needs no host that keeps up.
    """
    c = config
    weights = c.d_model * (c.qkv_dim + c.n_head * c.head_dim + c.up_dim + c.d_ff)
    seconds = max(2 * weights * n / PRODUCTS, weights * itemsize / MEMORY)
    cheap = padded_tokens(n) - n <= CHEAP * n
    return n <= GRAPH_TOKENS and (cheap or seconds < LAUNCHING)


def padded_tokens(n: int) -> int:
    """Tokens that n are padded to: a product's last tile is as large, and as slow, without them."""
    step = 16 if n <= 64 else 64
    return -(-n // step) * step


class Size(NamedTuple):
    """Tokens and rows that a prompt's kernels are launched for, padding included."""

    tokens: int
    rows: int

    @property
    def columns(self) -> int:
        """For the bounds of so many rows, in whole 16 bytes: kernels compile for addresses."""
        return -(-(self.rows + 1) // 4) * 4

    @property
    def elements(self) -> int:
        """Of what `Packed.padded` makes for this size."""
        return 3 * (self.tokens + self.columns)

    def prompt(self, given: Tensor, longest: int) -> Prompt:
        """View what `Packed.padded` has made as a prompt."""
        tokens = given[: 3 * self.tokens].view(3, -1)
        slots, starts, first = given[3 * self.tokens : self.elements].view(3, -1)
        return Prompt(rows_of(tokens), slots[: self.rows], starts, first, longest)


class Captured(NamedTuple):
    """What a graph runs: a size, and whether it leaves every token's state."""

    size: Size
    every: bool


def padded_size(group: Packed) -> Size:
    """Return the size whose graph runs a group: no more rows than tokens, as buffers hold."""
    tokens = padded_tokens(group.n_tokens)
    return Size(tokens, min(power_of_two(group.n_rows), tokens))


class PrefillGraphs:
    """Runs prompts that would wait for the host, in buffers as large as any needed yet.

    Capturing costs the host what launching does, and a synchronisation. Hence a size's first prompt
    is launched plainly, which compiles what a capture must find compiled. The second pays for the
    capture, if it comes before KEPT other sizes, and those after it gain. The size that was used
    longest ago is forgotten, graph and all.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        device = model.cache.keys.device
        room = Size(GRAPH_TOKENS, power_of_two(GRAPH_TOKENS)).elements
        self._inputs = torch.zeros(room, dtype=torch.int32, device=device)
        self._graphs: OrderedDict[Captured, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._make_room(0)

    def run(
        self, size: Size, given: Tensor, table: Tensor | None, *, every: bool, graphed: bool
    ) -> Tensor:
        """Return normalised states of `every` padded token, or of the last one of each padded row.

        `given` is on the device what `Packed.padded` made. The next call overwrites the result.
        """
        n, width = size.tokens, self._model.config.d_model
        if n * width > len(self._buffers.x):
            self._make_room(n)
        self._inputs[: size.elements] = given
        prompt = size.prompt(self._inputs, n)  # any of its rows may be as long as all
        buffers = self._buffers
        embed(self._model, prompt.rows, buffers.x, n, table)  # not in the graph: tables come and go

        def work() -> None:
            prefill_layers(self._model, n, prompt, buffers, every=every)

        run = self._recall(Captured(size, every), work) if graphed else work
        run()
        states = n if every else size.rows
        return buffers.first[: states * width].view(states, width)

    def _recall(self, which: Captured, work: Callable[[], None]) -> Callable[[], None]:
        """Return what runs a size: `work` the first time, its graph from the second on."""
        if which not in self._graphs:
            self._graphs[which] = None
            if len(self._graphs) > KEPT:
                self._graphs.popitem(last=False)
            return work
        self._graphs.move_to_end(which)
        graph = self._graphs[which]
        if graph is None:
            others = [other for other in self._graphs.values() if other is not None]
            graph = self._graphs[which] = capture(work, others[:1])
        return graph.replay

    def _make_room(self, n: int) -> None:
        """Make buffers for n tokens; the graphs go with the old ones, their sizes stay known."""
        self._graphs = OrderedDict.fromkeys(self._graphs)
        for tokens in (0, n):  # the old ones go before the new ones come
            self._buffers = make_buffers(self._model, Together(tokens, tokens))


def capture(
    work: Callable[[], None], beside: Sequence[torch.cuda.CUDAGraph]
) -> torch.cuda.CUDAGraph:
    """Record launches that have been made before, and so need no compiler.

    The library's temporary memory is that of a graph `beside` it, one being enough: a pool lives
    as long as a graph that has it, and never are two of them running.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside[0].pool() if beside else None):
        work()
    return graph
