"""Prompts to try the attention for Hopper GPUs with, on a CPU thread by thread or on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, emulated
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_prefill import Prompt
from porttool.engines.torch.cuda_prompt_attention import PromptAttention
from porttool.engines.torch.cuda_state import DeviceCache, rows_of

TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


class Case:
    """Prompts of several lengths, what they read, and what is right.

    rows: where each begins in its slot, and its tokens; none of them is padding. Of the cache only
    what they may read is a number, and so it is behind the queries.
    """

    def __init__(
        self, rows: Sequence[tuple[int, int]], dtype: torch.dtype, *, n_head: int,
        n_kv_head: int, head_dim: int, capacity: int = 300, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.config = c = cases.config(
            "learned",
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            d_model=64,
            inverse_layer_scale=True,
        )
        draw = torch.Generator().manual_seed(len(rows))
        self.starts, self.lengths = (list(column) for column in zip(*rows, strict=True))
        self.slots = torch.randperm(len(rows) + 1, generator=draw)[: len(rows)].tolist()
        shape = 2, c.n_layer, len(rows) + 1, n_kv_head, capacity, head_dim
        cached = torch.full(shape, torch.nan)
        for slot, start, length in zip(self.slots, self.starts, self.lengths, strict=True):
            place = cached[:, 1, slot, :, : start + length]
            place.copy_(torch.randn(place.shape, generator=draw))
        self.cache = DeviceCache(*cached.to(device, dtype))
        self.query = torch.randn(sum(self.lengths), c.qkv_dim, generator=draw).to(device, dtype)
        self.query[:, c.n_head * c.head_dim :] = torch.nan

    def prompt(self) -> Prompt:
        """Describe the rows as a prompt's kernels are told of them, with a padded row behind."""
        device = self.query.device
        first = torch.tensor([0, *self.lengths, 0]).cumsum(0)
        bounds = ([*self.slots, 0], [*self.starts, 0], first.tolist())
        slots, starts, first = (torch.tensor(b, dtype=torch.int32, device=device) for b in bounds)
        rows = rows_of(torch.zeros(3, len(self.query), dtype=torch.int32, device=device))
        return Prompt(rows, slots, starts, first, max(self.lengths))

    def wanted(self) -> Tensor:
        """Return what is right, [tokens, n_head, head_dim] in float64."""
        c, found, begin = self.config, [], 0
        for slot, start, length in zip(self.slots, self.starts, self.lengths, strict=True):
            own = slice(begin, begin + length)
            heads = self.query[own, : c.n_head * c.head_dim].double().view(length, -1, c.head_dim)
            k, v = (
                side[1, slot, :, : start + length].double().repeat_interleave(
                    c.n_head // c.n_kv_head, 0
                )
                for side in (self.cache.keys, self.cache.values)
            )  # fmt: skip
            scores = torch.einsum("qhd,hkd->hqk", heads, k) * c.layer_scale(1)
            seen = torch.arange(start + length)[None] <= start + torch.arange(length)[:, None]
            scores.masked_fill_(~seen.to(scores.device), -torch.inf)
            found.append(torch.einsum("hqk,hkd->qhd", scores.softmax(-1), v))
            begin += length
        return torch.cat(found)

    def run(self, attention: PromptAttention | None = None) -> Tensor:
        """Return the second layer's attention, [tokens, n_head, head_dim]."""
        c = self.config
        out = self.query.new_full((len(self.query), c.n_head, c.head_dim), torch.nan)
        attention = attention or PromptAttention(c, self.cache)
        prompt = self.prompt()
        attention.bind(self.query, prompt, out.flatten(1))(1)
        return out


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of a token's head."""
    difference = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(difference.nan_to_num(torch.inf).max())


class Hung(Exception):
    """The emulated kernel did not end."""


class Emulated:
    """In place of a kernel on a GPU; `programs` run together, in an order drawn from `seed`.

    `leaving`: statements of which a run leaves out the `left_out`-th, or none.
    """

    programs, seed, left_out = 2, 0, -1
    leaving: tuple[str, ...] = ()

    def __init__(
        self, name: str, defined: Mapping[str, object], *, threads: int, **_: object
    ) -> None:
        machine = "machine.hpp", "overlap.hpp", "warpgroup.hpp"
        kernel = (cuda_hopper.sources(name)[-1].name,)
        self.library = emulated(machine, kernel, "run_prompt.hpp", tuple(defined.items()),
                                NOT_BROKEN, self.leaving)  # fmt: skip
        assert self.library.threads() == threads

    def launch_clusters(
        self, grid: tuple[int, int], cluster: int, stream: int, argument: ctypes.Structure, *,
        chained: bool,
    ) -> None:  # fmt: skip
        """Run it; Hung if it does not end."""
        assert (grid[1], cluster, chained) == (1, 1, False)
        assert ctypes.sizeof(argument) == self.library.arguments_bytes()
        ctypes.c_int.in_dll(self.library, "left_out").value = self.left_out
        if self.library.run(ctypes.byref(argument), grid[0], self.seed):
            raise Hung
