"""A single row's decoding in one launch: the persistent kernel of `hopper/step.cu`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_compile import (
    INTEGER,
    POINTER,
    CompiledKernel,
    CompilerUnavailable,
)
from porttool.engines.torch.cuda_hopper import compile_kernel, programs_of
from porttool.engines.torch.cuda_launch import Model
from porttool.engines.torch.cuda_state import Rows
from porttool.engines.torch.cuda_tuning import PersistentTile
from porttool.engines.torch.cuda_weights import LayerWeights, Linear

KERNEL = "decode_row"
SHARED = 227 << 10
"""Shared memory of a multiprocessor's only program: all that Hopper gives it."""

_COMPUTING = 256  # threads of a program in the narrowest tile that is tried; others fill its ring
_MOST_FLAGS = 1 << 31


def unsuited(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why the persistent kernel cannot run a model on a device, or None."""
    return cuda_hopper.unsuited(dtype, device) or unfit(config, programs_of(device))


def unfit(config: ModelConfig, programs: int) -> str | None:
    """Say why a model's shape does not suit the kernel on so many multiprocessors, or None."""
    c, attended = config, config.n_head * config.head_dim
    if c.head_dim not in (8, 16, 32, 64, 128):
        return f"heads of {c.head_dim} elements do not divide a warp evenly"
    if c.n_head > programs:
        return f"{c.n_head} heads are more than the GPU's {programs} multiprocessors"
    if c.d_model % 64 or attended % 64 or c.d_ff % 64:
        return "rows of its matrices are no multiples of 64 elements"
    # a program without words of its own could fall behind and hear a later stage's
    if min(c.qkv_dim, c.d_ff // 2, c.d_model, c.vocab_size) < programs:
        return "not every multiprocessor would have rows of its matrices"
    if max(c.qkv_dim, c.up_dim, c.d_model) > (_COMPUTING - 4) * programs:
        return "a program's rows are more than its threads"
    if max(4 * c.d_model, 4 * attended, 2 * c.d_ff) > 96 << 10 or c.n_layer > 128:
        return "its activations or its layers' addresses leave no shared memory for weights"
    return None


def macros(
    config: ModelConfig, dtype: torch.dtype, tile: PersistentTile, programs: int
) -> dict[str, object]:
    """Return what the kernel's source finds defined for a model on so many multiprocessors."""
    c = config
    rotary = c.rotary_dim if c.position == "rotary" else 0
    return {
        "D": c.d_model, "HEADS": c.n_head, "KV": c.n_kv_head, "DIM": c.head_dim, "FF": c.d_ff,
        "VOCAB": c.vocab_size, "LAYERS": c.n_layer, "ROTARY": rotary, "GATED": int(c.gated),
        "RMS": int(c.norm == "rmsnorm"), f"ACT_{c.activation}": 1, "EPS": f"{c.norm_eps!r}f",
        "BF16": int(dtype == torch.bfloat16), "GRID": programs, "SHARED": SHARED,
        "PLAN_WORDS": 21 + 15 * c.n_layer, "MOST_STEPS": tile.steps, "FLYING": tile.flying,
        "SPLITS": tile.splits, "FILLERS": tile.fillers, "THREADS": 32 * tile.warps,
        "TEAM": tile.sharing,
    }  # fmt: skip


def compile_row(
    config: ModelConfig, dtype: torch.dtype, tile: PersistentTile, programs: int
) -> bytes:
    """Compile the kernel for a model; CompilerUnavailable says why that cannot be."""
    return compile_kernel(KERNEL, macros(config, dtype, tile, programs))


class PersistentRow:
    """Decodes row 0 of `rows` in one cooperative launch for any number of tokens.

    `x` [d_model] float32 is the residual stream of the next token to be fed: `embed` writes it for
    the first, the kernel for the one after its last.
    Raises CompilerUnavailable where the kernel cannot run, with the reason.
    """

    def __init__(self, model: Model, rows: Rows, x: Tensor, tile: PersistentTile) -> None:
        c, self._device = model.config, x.device
        reason = unsuited(c, model.dtype, str(x.device))
        if reason is None and any(w.weight.data_ptr() % 16 for w in model.weights.linears()):
            reason = "a matrix does not begin at a multiple of 16 bytes"
        if reason:
            raise CompilerUnavailable(reason)
        self.programs = programs_of(x.device)
        parts = c.n_head * tile.splits
        sizes = (c.d_model, c.qkv_dim, parts * c.head_dim // 2, parts, c.d_ff // 2,
                 2 * self.programs)  # fmt: skip
        self._words = [torch.zeros(n, dtype=torch.int64, device=x.device) for n in sizes]
        self._kept = model, rows, x  # what the plan's addresses point into
        plan = plan_words(model, rows, (x, *self._words))
        self._plan = torch.tensor(plan, device=x.device)
        self._flags, self._told = 2 * c.n_layer, 0
        threads = 32 * (tile.warps + tile.fillers)
        with torch.cuda.device(x.device):
            cubin = compile_row(c, model.dtype, tile, self.programs)
            self._kernel = CompiledKernel(cubin, KERNEL, threads=threads, shared=SHARED)

    def run(self, tokens: int, logits: Tensor | None = None) -> None:
        """Enqueue greedy tokens; with `logits` [vocab_size] float32 one step that fills them.

        The row's slot is a real one, and its history has room for the tokens, one at least.
        """
        if self._told + self._flags * tokens >= _MOST_FLAGS:
            for words in self._words:
                words.zero_()
            self._told = 0
        with torch.cuda.device(self._device):
            self._kernel.launch_together(
                self.programs, torch.cuda.current_stream().cuda_stream,
                (self._plan.data_ptr(), tokens, self._told, _address(logits)),
                (POINTER, INTEGER, INTEGER, POINTER),
            )  # fmt: skip
        self._told += self._flags * tokens


def plan_words(model: Model, rows: Rows, buffers: tuple[Tensor, ...]) -> list[int]:
    """Return the kernel's `Plan` as 64-bit words: addresses, and a few numbers."""
    c, w = model.config, model.weights
    tensors = [
        w.head.weight, *_norm(w.head), w.embedding, w.position, model.cosine, model.sine,
        rows.tokens, rows.positions, rows.slots, rows.cursor, rows.history, *buffers,
    ]  # fmt: skip
    words = [_address(t) for t in tensors] + [model.cache.capacity, c.n_positions - 1]
    for index, layer in enumerate(w.layers):
        words += _layer_words(layer)
        words += [_address(model.cache.keys[index]), _address(model.cache.values[index])]
        words += struct.unpack("q", struct.pack("d", c.layer_scale(index)))
    return words


def _layer_words(layer: LayerWeights) -> list[int]:
    qkv, up = layer.qkv, layer.up
    tensors = [
        qkv.weight, layer.out.weight, up.weight, layer.down.weight,
        *_norm(qkv), qkv.bias, layer.out.bias, *_norm(up), up.bias, layer.down.bias,
    ]  # fmt: skip
    return [_address(t) for t in tensors]


def _norm(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of the norm in front of a matrix."""
    if linear.norm is None:
        raise AssertionError("a projection of the residual stream has a norm")
    return linear.norm.gamma, linear.norm.beta


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
