"""Which files hold a canonical tensor, and which part of it each rank's file has.

Matrices are stored [in, out], the transpose of ours; embeddings and head as they are. A rank's
query_key_value has its heads' queries, keys and values; with one key head for all, that head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from porttool.config import ModelConfig
from porttool.errors import UsageError
from porttool.weights import template_of

WHOLE = {
    "embedding": "wte",
    "position": "wpe",
    "head": "lm_head.weight",
    "norm": "final_layernorm.{part}",
    "norm1": "layers.{i}.input_layernorm.{part}",
    "norm2": "layers.{i}.post_attention_layernorm.{part}",
}
"""Modules that every rank holds whole, and their files' stems."""


@dataclass(frozen=True)
class Block:
    """Rows of a canonical tensor that lie together in a file; `divided` over the ranks or not."""

    rows: int
    divided: bool = False


@dataclass(frozen=True)
class Region:
    """A part of a rank's file: its rows there, its rows in the canonical tensor.

    A `shared` part is the same in every rank's file.
    """

    local: slice
    canonical: slice
    shared: bool


@dataclass(frozen=True)
class BinFile:
    """A file, or one file a rank, with rows of a canonical tensor from `first` on.

    `columns` is None for a vector. Ranks divide the blocks' rows, or the columns, or nothing.
    """

    stem: str
    blocks: tuple[Block, ...]
    columns: int | None = None
    first: int = 0
    columns_divided: bool = False
    transposed: bool = False

    @property
    def per_rank(self) -> bool:
        """True when every rank has a file of its own."""
        return self.columns_divided or any(block.divided for block in self.blocks)

    def name(self, rank: int) -> str:
        """Return the file's name for a rank."""
        return f"model.{self.stem}.{rank}.bin" if self.per_rank else f"model.{self.stem}.bin"

    def shape(self, tp: int) -> tuple[int, ...]:
        """Return the shape of one rank's part, in canonical orientation."""
        rows = sum(block.rows // (tp if block.divided else 1) for block in self.blocks)
        return (rows,) if self.columns is None else (rows, self.span(0, tp).stop)

    def span(self, rank: int, tp: int) -> slice:
        """Return a rank's columns of the canonical tensor."""
        width = (self.columns or 0) // (tp if self.columns_divided else 1)
        start = rank * width if self.columns_divided else 0
        return slice(start, start + width)

    def regions(self, rank: int, tp: int) -> Iterator[Region]:
        """Yield the parts of a rank's file."""
        local, canonical = 0, self.first
        for block in self.blocks:
            rows = block.rows // tp if block.divided else block.rows
            start = canonical + (rank * rows if block.divided else 0)
            shared = not block.divided and not self.columns_divided
            yield Region(slice(local, local + rows), slice(start, start + rows), shared)
            local, canonical = local + rows, canonical + block.rows

    def parts(self, tp: int) -> int:
        """Return how many files there are."""
        return tp if self.per_rank else 1


def bin_files(name: str, config: ModelConfig) -> tuple[BinFile, ...]:
    """Return the files that hold a canonical tensor."""
    template, layer = template_of(name)
    files = templates(template, config)
    return tuple(replace(file, stem=file.stem.replace("{i}", layer)) for file in files)


def templates(name: str, config: ModelConfig) -> tuple[BinFile, ...]:
    """Return the files of a canonical template, `{i}` standing for the layer."""
    c = config
    module, _, part = name.rpartition(".")
    module = module.removeprefix("layers.{i}.")
    if module in WHOLE:
        rows = {"embedding": c.vocab_size, "head": c.vocab_size, "position": c.n_positions}
        stem = WHOLE[module].replace("{part}", part)
        width = c.d_model if module in rows else None
        return (BinFile(stem, (Block(rows.get(module, c.d_model)),), width),)
    match module:
        case "attention.qkv":
            kv = Block(c.n_kv_head * c.head_dim, divided=c.n_kv_head == c.n_head)
            blocks = (Block(c.n_head * c.head_dim, divided=True), kv, kv)
            return (projection_in("attention.query_key_value", part, blocks, c),)
        case "attention.out":
            return (projection_out("attention.dense", part, c.n_head * c.head_dim, c),)
        case "mlp.up":
            up = projection_in("mlp.dense_h_to_4h", part, (Block(c.d_ff, divided=True),), c)
            gate = projection_in("mlp.dense_h_to_4h.gate", part, up.blocks, c)
            return (up, replace(gate, first=c.d_ff)) if c.gated else (up,)
        case "mlp.down":
            return (projection_out("mlp.dense_4h_to_h", part, c.d_ff, c),)
    raise UsageError(f"FasterTransformer's layout has no place for {name}")


def projection_in(stem: str, part: str, blocks: tuple[Block, ...], config: ModelConfig) -> BinFile:
    """Return the file of a projection from the model's width: ranks divide its outputs."""
    width = config.d_model if part == "weight" else None
    return BinFile(f"layers.{{i}}.{stem}.{part}", blocks, width, transposed=part == "weight")


def projection_out(stem: str, part: str, n_in: int, config: ModelConfig) -> BinFile:
    """Return the file of a projection back to the model's width: ranks divide its inputs."""
    rows = (Block(config.d_model),)
    if part == "bias":
        return BinFile(f"layers.{{i}}.{stem}.bias", rows)
    return BinFile(f"layers.{{i}}.{stem}.weight", rows, n_in, columns_divided=True, transposed=True)


def check_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a number of ranks that heads or MLP columns cannot be divided by."""
    for what, size in (("heads", config.n_head), ("columns of the MLP", config.d_ff)):
        if size % tp:
            raise UsageError(
                f"{size} {what} cannot be divided over {tp} ranks: choose another --tp"
            )
