"""Prompts of any number and length: cut into groups, sent to the GPU at once, run one by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from porttool.engines.torch.cuda_launch import Model, embed
from porttool.engines.torch.cuda_packed import Packed
from porttool.engines.torch.cuda_prefill import (
    Prompt,
    Together,
    make_buffers,
    prefill_layers,
    project,
    tokens_together,
)
from porttool.engines.torch.cuda_prefill_graph import (
    PrefillGraphs,
    Size,
    padded_size,
    suits_graph,
)


class Group(NamedTuple):
    """Rows that go through the layers together."""

    packed: Packed
    size: Size
    padded: bool

    @property
    def rows(self) -> slice:
        """Which of the step's rows these are."""
        return slice(self.packed.first_row, self.packed.first_row + self.packed.n_rows)


class Prompts:
    """Feeds the tokens of many positions at once.

    Buffers are as large for every group: of several sizes, torch's allocator would keep several.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.graphs = PrefillGraphs(model)
        cache = model.cache
        kept = cache.keys.nbytes + cache.values.nbytes
        kept += sum(linear.nbytes for linear in model.weights.linears())
        together = tokens_together(model.config, kept, model.dtype.itemsize)
        positions = cache.keys.shape[1] * cache.capacity
        self.together = together._replace(tokens=min(together.tokens, positions))

    def run(
        self, packed: Packed, table: Tensor | None, *, all_positions: bool, graphed: bool
    ) -> Tensor:
        """Return float32 logits: [rows, vocab_size], or [rows, width, vocab_size].

        `graphed` lets groups of few tokens run from graphs.
        """
        model, device = self._model, self._model.cache.keys.device
        groups = [self._sized(group) for group in packed.groups(self.together.tokens)]
        # all at once: the copy waits for what the GPU is at, and the GPU then for the host
        sent = torch.cat([g.packed.padded(g.size.tokens, g.size.columns) for g in groups])
        inputs = sent.to(device).split([g.size.elements for g in groups])
        if all_positions:
            shape = packed.n_rows, packed.width, model.config.vocab_size
            out = torch.zeros(shape, device=device)
            for group, given in zip(groups, inputs, strict=True):
                normed = self._normed(group, given, table, every=True, graphed=graphed)
                for row, (a, b) in zip(out[group.rows], group.packed.spans(), strict=True):
                    row[: b - a] = project(normed[a:b], model.weights.head.weight)
                del normed  # before the next group's buffers come
            return out
        states = []
        for group, given in zip(groups, inputs, strict=True):
            normed = self._normed(group, given, table, every=False, graphed=graphed)
            states.append(normed[: group.packed.n_rows].clone())
            del normed
        return project(torch.cat(states), model.weights.head.weight)

    def _sized(self, group: Packed) -> Group:
        model = self._model
        padded = suits_graph(model.config, group.n_tokens, model.dtype.itemsize)
        # kernels are compiled for lines that begin at whole 16 bytes
        plain = Size(-(-group.n_tokens // 4) * 4, group.n_rows)
        return Group(group, padded_size(group) if padded else plain, padded)

    def _normed(
        self, group: Group, given: Tensor, table: Tensor | None, *, every: bool, graphed: bool
    ) -> Tensor:
        """Return normalised states of every token of a group, or of its rows' last ones."""
        if group.padded:
            return self.graphs.run(group.size, given, table, every=every, graphed=graphed)
        prompt = group.size.prompt(given, group.packed.width)
        return run_launched(self._model, prompt, table, self.together, every=every)


def run_launched(
    model: Model, prompt: Prompt, table: Tensor | None, together: Together, *, every: bool
) -> Tensor:
    """Run a prompt kernel by kernel, in buffers for so many tokens or, if they are more, its own.

    Returns what `prefill_layers` does.
    """
    n = len(prompt.rows.tokens)
    buffers = make_buffers(model, together._replace(tokens=max(n, together.tokens)))
    embed(model, prompt.rows, buffers.x, n, table)
    return prefill_layers(model, n, prompt, buffers, every=every)
