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
    """Feeds the tokens of many positions at once; `graphed` lets few of them run from graphs."""

    def __init__(self, model: Model, *, graphed: bool) -> None:
        self._model, self.graphed = model, graphed
        self.graphs = PrefillGraphs(model)
        cache = model.cache
        kept = cache.keys.nbytes + cache.values.nbytes
        kept += sum(linear.nbytes for linear in model.weights.linears())
        self.together = tokens_together(model.config, kept, model.dtype.itemsize)

    def run(self, packed: Packed, table: Tensor | None, *, all_positions: bool) -> Tensor:
        """Return float32 logits: [rows, vocab_size], or [rows, width, vocab_size]."""
        model, device = self._model, self._model.cache.keys.device
        groups = [self._sized(group) for group in packed.groups(self.together.tokens)]
        # all at once: the copy waits for what the GPU is at, and the GPU then for the host
        sent = torch.cat([g.packed.padded(g.size.tokens, g.size.columns) for g in groups])
        inputs = sent.to(device).split([g.size.elements for g in groups])
        if all_positions:
            shape = packed.n_rows, packed.width, model.config.vocab_size
            out = torch.zeros(shape, device=device)
            for group, given in zip(groups, inputs, strict=True):
                self._every(group, given, table, out[group.rows])
            return out
        states = [
            self._last(group, given, table) for group, given in zip(groups, inputs, strict=True)
        ]
        return project(torch.cat(states), model.weights.head.weight)

    # what a group leaves goes when each of these two ends

    def _last(self, group: Group, given: Tensor, table: Tensor | None) -> Tensor:
        """Return normalised states of a group's last tokens: [its rows, d_model]."""
        normed, first = self._normed(group, given, table)
        last: Tensor = normed[first[1 : group.packed.n_rows + 1].long() - 1]
        return last

    def _every(self, group: Group, given: Tensor, table: Tensor | None, out: Tensor) -> None:
        """Write logits of all tokens of a group to its rows of the step's logits."""
        normed, _ = self._normed(group, given, table)
        for row, (a, b) in zip(out, group.packed.spans(), strict=True):
            row[: b - a] = project(normed[a:b], self._model.weights.head.weight)

    def _sized(self, group: Packed) -> Group:
        model = self._model
        padded = suits_graph(model.config, group.n_tokens, model.dtype.itemsize)
        # kernels are compiled for lines that begin at whole 16 bytes
        plain = Size(-(-group.n_tokens // 4) * 4, group.n_rows)
        return Group(group, padded_size(group) if padded else plain, padded)

    def _normed(self, group: Group, given: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return normalised states of a group's tokens and first tokens of its rows."""
        if group.padded:
            return self.graphs.run(group.size, given, table, graphed=self.graphed)
        prompt = group.size.prompt(given, group.packed.width)
        return launch(self._model, prompt, table, self.together.mlp)


def launch(
    model: Model, prompt: Prompt, table: Tensor | None, mlp_tokens: int
) -> tuple[Tensor, Tensor]:
    """Run a prompt in buffers of its own: normalised states, and first tokens of its rows."""
    n = len(prompt.rows.tokens)
    buffers = make_buffers(model, Together(n, mlp_tokens))
    embed(model, prompt.rows, buffers.x, n, table)
    return prefill_layers(model, n, prompt, buffers), prompt.first
