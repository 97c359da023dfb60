"""Attention of prompts by the kernel for Hopper GPUs: `hopper/attend_prompt.cu`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_compile import tensor_map
from porttool.engines.torch.cuda_hopper import programs_of
from porttool.engines.torch.cuda_state import DeviceCache

if TYPE_CHECKING:
    from porttool.engines.torch.cuda_prefill import Prompt

KERNEL = "prompt_attention"

BLOCK_T = 128
"""Keys of a tile."""

ROUNDS = 2
"""Items that each multiprocessor shall have, or programs of fewer queries are faster."""

KEPT_BYTES = 24 << 20
"""Keys and values that are read together, of what an L2 cache holds."""


class _Shape(NamedTuple):
    """Warpgroups that compute, and tiles of keys or values that the ring holds."""

    teams: int
    ring: int

    @property
    def rows(self) -> int:
        """Queries of an item."""
        return 64 * self.teams

    @property
    def threads(self) -> int:
        """Threads of a program: one warpgroup more fills the ring."""
        return 128 * (self.teams + 1)


_SHAPES = {64: _Shape(3, 8), 128: _Shape(2, 5)}
"""By elements of a head: what registers and shared memory hold."""


def unsuited(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why this attention cannot run a model on a device, or None."""
    return cuda_hopper.unsuited(dtype, device) or unfit(config)


def unfit(config: ModelConfig) -> str | None:
    """Say why a model's heads do not suit this attention, or None."""
    if config.head_dim not in _SHAPES:
        return f"its heads have {config.head_dim} elements, not 64 or 128"
    return "its width is no multiple of 8 elements" if config.d_model % 8 else None


def refusal(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why the kernel of a model that suits it cannot be made ready, or None."""
    threads = _SHAPES[config.head_dim].threads
    return cuda_hopper.refusal(KERNEL, macros(config, dtype), threads=threads, device=device)


def together(config: ModelConfig) -> int:
    """Heads of an item, which share their keys: a power of two, so that a team has whole tokens."""
    group = config.n_head // config.n_kv_head
    return min(group & -group, 16)


def macros(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """Return what the kernel's source finds defined."""
    c, shape = config, _SHAPES[config.head_dim]
    tiles = 2 * c.head_dim * (shape.ring * BLOCK_T + 2 * shape.rows)
    return {
        "HEADS": c.n_head, "KV": c.n_kv_head, "DIM": c.head_dim, "GROUP": together(c),
        "TEAMS": shape.teams, "BLOCK_T": BLOCK_T, "RING": shape.ring,
        "BF16": int(dtype == torch.bfloat16), "SHARED": tiles + 2048,
    }  # fmt: skip


_Map = ctypes.c_uint64 * 16


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`."""

    _fields_ = (
        *((name, _Map) for name in ("queries", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("out", "slots", "starts", "first", "drawn")),
        *((name, ctypes.c_int) for name in ("capacity", "rows", "blocks", "section", "batch")),
        ("factor", ctypes.c_float),
    )  # fmt: skip


class PromptAttention:
    """Attention of prompts over the cache of one model, which holds their keys already."""

    def __init__(self, config: ModelConfig, cache: DeviceCache) -> None:
        device, halves = cache.keys.device, config.head_dim // 64
        self._config, self._shape = config, _SHAPES[config.head_dim]
        self._capacity = cache.capacity
        self._kernel = cuda_hopper.load(
            KERNEL, macros(config, cache.keys.dtype), threads=self._shape.threads, device=device
        )
        self._multiprocessors = programs_of(device)
        self._drawn = torch.zeros(1, dtype=torch.int32, device=device)
        self._cached = [
            [_Map(*tensor_map(side.view(-1, halves, 64).transpose(0, 1), (64, BLOCK_T, halves)))
             for side in layer]
            for layer in zip(cache.keys, cache.values, strict=True)
        ]  # fmt: skip

    def suits(self, n: int) -> bool:
        """Whether prompts of n tokens in all give every multiprocessor enough to do."""
        c, group = self._config, together(self._config)
        items = n * group // self._shape.rows * (c.n_head // group)
        return items >= ROUNDS * self._multiprocessors

    def bind(self, query: Tensor, prompt: Prompt, out: Tensor) -> Callable[[int], None]:
        """Return what enqueues a layer's attention, by its number, on the current stream.

        query [tokens, n_head * head_dim or more]; out [tokens, n_head * head_dim], contiguous. All
        of them are to stay where they are until then.
        """
        c, group, rows, n = self._config, together(self._config), len(prompt.slots), len(query)
        tokens = self._shape.rows // group
        blocks, tiles = -(-prompt.longest // tokens), c.n_head // group
        batch = items_together(rows, blocks, n // tokens)
        draws = -(-blocks // batch)
        kept = KEPT_BYTES // (4 * c.head_dim * prompt.longest) * (tiles // c.n_kv_head)
        section = evenly(rows * tiles, max(kept, ROUNDS * self._multiprocessors // draws, 1))
        tensors = out, prompt.slots, prompt.starts, prompt.first, self._drawn
        arguments = _Arguments(
            _Map(*tensor_map(query.view(n, -1, c.head_dim), (64, group, tokens))), _Map(), _Map(),
            *(t.data_ptr() for t in tensors), self._capacity, rows, blocks,
            section, batch,
        )  # fmt: skip
        grid = min(self._multiprocessors, rows * tiles * draws), 1

        def attend(layer: int) -> None:
            arguments.keys, arguments.values = self._cached[layer]
            arguments.factor = c.layer_scale(layer) * math.log2(math.e)
            stream = torch.cuda.current_stream().cuda_stream
            self._kernel.launch_clusters(grid, 1, stream, arguments, chained=False)

        return attend


def evenly(n: int, most: int) -> int:
    """Return the size of parts of n that are about as large as each other, and at most `most`."""
    return -(-n // -(-n // most))


def items_together(rows: int, blocks: int, filled: int) -> int:
    """Return how many items one draw shall have: one, or more where most have no queries.

    rows of up to `blocks` blocks each, of which so many are `filled` if none is in part.
    """
    return min(max(rows * blocks // (filled + rows), 1), 32)
