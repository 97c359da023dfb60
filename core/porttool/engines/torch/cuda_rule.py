"""Tile shapes by rule, for a model that was not measured."""

from __future__ import annotations

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_tuning import (
    AttentionTile,
    StreamTile,
    Tuning,
    WideTile,
    gpu_name,
    multiprocessors,
    power_of_two,
    shapes,
)


def default_stream(k: int, *, gated: bool, residual: bool) -> StreamTile:
    """Cut rows of k elements: long pieces of few rows where k is long, else short ones of more."""
    if residual and k > 512:
        block_k = 1024 if k >= 1024 else 512
        return StreamTile(2 if k >= 1024 else 4, block_k, 4, held=min(3, -(-k // block_k)))
    block_k = min(256, max(power_of_two(k), 16))
    return StreamTile(4 if gated else 8, block_k, 4, held=min(4, -(-k // block_k)))


def default_wide(n: int, k: int, rows: int, name: str, *, gated: bool) -> WideTile:
    """Cut [n, k] as most models' measurements do, with programs for every multiprocessor."""
    head, many = name == "head", rows >= 64
    block_n, block_k = (128, 64) if head else (64, 64 if many and name == "up" else 128)
    stages, warps = 4 if head or (many and block_k == 128) else 6, 4
    if many and block_k == 128:
        warps = 8
    split = 1
    while name in ("qkv", "out", "down") and split < 8 and n // block_n * split < 96:
        split *= 2
    while not head and split == 1 and block_n > 16 and n // block_n < 96:
        block_n //= 2
    if gated:
        block_n = max(block_n // 2, 16)
    return WideTile(min(block_n, max(power_of_two(n), 16)), min(block_k, max(power_of_two(k), 16)),
                    warps, stages, split)  # fmt: skip


def default_tuning(config: ModelConfig, device: str) -> Tuning:
    """Return the rule's choice for a model that was not measured."""
    c = config
    gated = {name: c.gated and name == "up" for name in shapes(c)}
    stream = {
        name: default_stream(k, gated=gated[name], residual=name in ("out", "down"))
        for name, (_, k) in shapes(c).items()
    }
    wide = {
        str(rows): {
            name: default_wide(n, k, rows, name, gated=gated[name])
            for name, (n, k) in shapes(c).items()
        }
        for rows in (16, 32, 64, 128)
    }
    splits = min(max(power_of_two(-(-64 // c.n_kv_head)), 4), 16)
    block_t = 128 if c.head_dim <= 64 else 64 if c.head_dim <= 128 else 32
    if c.n_kv_head < c.n_head:
        block_t = min(block_t, 64)
    several = {
        rows: AttentionTile(min(power_of_two(-(-256 // (int(rows) * c.n_kv_head))), 16), 16, 2)
        for rows in wide
    }
    return Tuning(gpu_name(device), stream, wide, AttentionTile(splits, block_t, 8), several,
                  multiprocessors=multiprocessors(device))  # fmt: skip
