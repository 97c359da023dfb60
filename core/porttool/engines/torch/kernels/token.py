"""The two ends of a step: embeddings in, the greedy token out (and its embedding in again)."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.chain import announce, await_predecessor


@triton.jit
def _embed(
    token, at, row, table, embedding, position, x, VOCAB, D: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PROMPT: tl.constexpr,
):  # fmt: skip
    """x[row] = embedding[token] (or the prompt table's row from VOCAB on) + position[at]."""
    column = tl.arange(0, BLOCK)
    live = column < D
    virtual = token >= VOCAB
    known = tl.minimum(token, VOCAB - 1).to(tl.int64)
    value = tl.load(embedding + known * D + column, mask=live, other=0.0).to(tl.float32)
    if PROMPT:
        line = tl.maximum(token - VOCAB, 0).to(tl.int64)
        other = tl.load(table + line * D + column, mask=live & virtual, other=0.0)
        value = tl.where(virtual, other.to(tl.float32), value)
    if LEARNED:
        offset = at.to(tl.int64) * D + column
        value += tl.load(position + offset, mask=live, other=0.0).to(tl.float32)
    tl.store(x + row.to(tl.int64) * D + column, value.to(x.dtype.element_ty), mask=live)


@triton.jit
def embed_kernel(
    tokens, positions, table, embedding, position, x, VOCAB, N_POSITIONS,
    D: tl.constexpr, BLOCK: tl.constexpr, LEARNED: tl.constexpr, PROMPT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the residual stream x [rows, D] of tokens [rows] at positions [rows]."""
    await_predecessor(PDL)
    announce(PDL)
    row = tl.program_id(0)
    at = tl.minimum(tl.load(positions + row), N_POSITIONS - 1)
    token = tl.load(tokens + row)
    _embed(token, at, row, table, embedding, position, x, VOCAB, D, BLOCK, LEARNED, PROMPT)


@triton.jit
def pick_kernel(
    best, where, n_best, tokens, positions, cursor, history, history_width,
    embedding, position, x, VOCAB, N_POSITIONS,
    D: tl.constexpr, BLOCK: tl.constexpr, LEARNED: tl.constexpr, SCAN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Take each row's greedy token, remember it and write the next step's residual stream.

    best [rows, n_best] are maxima of parts of the vocabulary and `where` their ids. The lowest id
    wins a tie, as torch.argmax does on a CPU.
    """
    await_predecessor(PDL)
    announce(PDL)
    row = tl.program_id(0)
    lane = tl.arange(0, SCAN)
    top = tl.full((SCAN,), float("-inf"), tl.float32)
    index = tl.full((SCAN,), 2147483647, tl.int32)
    for first in range(0, n_best, SCAN):
        at = first + lane
        part = row.to(tl.int64) * n_best + at
        value = tl.load(best + part, mask=at < n_best, other=float("-inf"))
        name = tl.load(where + part, mask=at < n_best, other=2147483647)
        better = value > top
        index = tl.where(better, name, index)
        top = tl.where(better, value, top)
    token = tl.min(tl.where(top == tl.max(top, 0), index, 2147483647), 0)
    token = tl.minimum(token, VOCAB - 1)  # only when every logit is NaN
    at = tl.load(positions + row) + 1
    column = tl.load(cursor + row)
    tl.debug_barrier()  # every warp has read before any writes
    tl.store(history + row.to(tl.int64) * history_width + column, token)
    tl.store(tokens + row, token)
    tl.store(positions + row, at)
    tl.store(cursor + row, column + 1)
    at = tl.minimum(at, N_POSITIONS - 1)
    _embed(token, at, row, embedding, embedding, position, x, VOCAB, D, BLOCK, LEARNED, False)
