"""The decoder: embeddings, layers, final norm and head, configured by ModelConfig alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from porttool.config import ModelConfig
from porttool.errors import EngineError
from porttool.nn.attention import Attention
from porttool.nn.cache import KVCache
from porttool.nn.mlp import MLP
from porttool.nn.norm import Norm
from porttool.weights import listing


@dataclass(frozen=True)
class Step:
    """What one step of a running batch feeds: some tokens for some rows.

    slots    [n] int64: the cache slot of each row, no slot twice
    tokens   [n, width] int64, padded on the right with any valid id; ids from vocab_size on are
             rows of the prompt table
    starts   [n] int64: tokens of the row that the cache holds already
    lengths  [n] int64: how many of the row's tokens are real, 1 to width

    Prefill is many tokens a row, plain decode one, verification of drafted tokens a few.
    """

    slots: Tensor
    tokens: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def prefill(cls, prompts: list[list[int]], slots: list[int] | None = None) -> Step:
        """Build the first step of prompts of any lengths.

        A shorter one is padded with its own last token: a graph that computes padding then meets
        no number, infinity above all, that the row itself has not.
        """
        lengths = [len(p) for p in prompts]
        width = max(lengths)
        tokens = torch.tensor([[*p, *p[-1:] * (width - len(p))] for p in prompts])
        where = list(range(len(prompts))) if slots is None else slots
        return cls(torch.tensor(where), tokens, torch.zeros(len(prompts), dtype=torch.int64),
                   torch.tensor(lengths))  # fmt: skip

    @classmethod
    def decode(cls, tokens: list[int], slots: list[int], starts: list[int]) -> Step:
        """Build a step of one token a row."""
        ones = torch.ones(len(tokens), dtype=torch.int64)
        return cls(torch.tensor(slots), torch.tensor(tokens)[:, None], torch.tensor(starts), ones)

    @property
    def positions(self) -> Tensor:
        """Position of every token, padding included: [n, width]."""
        return self.starts[:, None] + torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def real(self) -> tuple[Tensor, Tensor]:
        """Row and column of every token that is no padding, row after row: [n_real] each."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        rows, columns = (columns < self.lengths[:, None]).nonzero(as_tuple=True)
        return rows, columns

    def to(self, device: torch.device | str) -> Step:
        """Return the same step on a device."""
        fields = (self.slots, self.tokens, self.starts, self.lengths)
        return Step(*(tensor.to(device) for tensor in fields))


class Layer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm1 = Norm(config)
        self.attention = Attention(config, index)
        self.norm2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache | None, step: Step) -> Tensor:
        """Map [n, width, d_model] to the same shape."""
        x = x + self.attention(self.norm1(x), positions, cache, step)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Decoder(nn.Module):
    """The whole model. Its parameter names and shapes are the canonical checkpoint's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = blank_table(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position = blank_table(config.n_positions, config.d_model)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = Norm(config)
        if not config.tied_head:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.prompt_table: Tensor | None = None

    def forward(self, step: Step, cache: KVCache | None = None) -> Tensor:
        """Return logits [n, width, vocab_size]; rows past their length hold nothing of use."""
        positions = step.positions
        if cache is not None:
            cache.begin(step)
        x = self.embed(step.tokens, positions)
        for layer in self.layers:
            x = layer(x, positions, cache, step)
        return self.logits(self.norm(x))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings, or prompt-table rows, plus learned positions: [n, width, d_model].

        Only padding may lie beyond the learned positions.
        """
        x: Tensor = self.embedding(tokens.clamp(max=self.config.vocab_size - 1))
        if self.prompt_table is not None:
            row = (tokens - self.config.vocab_size).clamp(min=0)
            virtual = (tokens >= self.config.vocab_size)[..., None]
            x = torch.where(virtual, F.embedding(row, self.prompt_table), x)
        if self.config.position == "learned":
            x = x + self.position(positions.clamp(max=self.config.n_positions - 1))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Project normalised hidden states [..., d_model] on the vocabulary."""
        weight = self.embedding.weight if self.config.tied_head else self.head.weight
        return F.linear(x, weight)


def blank_table(n_rows: int, d_model: int) -> nn.Embedding:
    """Return an embedding that is not initialised; its rows are loaded from a checkpoint.

    Drawing them on the meta device would import a compiler of 150 MB, for nothing.
    """
    return nn.Embedding(n_rows, d_model, _weight=torch.empty(n_rows, d_model))


def meta_decoder(config: ModelConfig) -> Decoder:
    """Build a decoder without memory: its state dict names and shapes what a checkpoint holds."""
    with torch.device("meta"):
        return Decoder(config)


@lru_cache(8)
def canonical_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of everything that a canonical checkpoint holds, in its order."""
    state = meta_decoder(config).state_dict()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in state.items()})


def n_parameters(config: ModelConfig) -> int:
    """Count a canonical checkpoint's numbers."""
    return sum(math.prod(shape) for shape in canonical_shapes(config).values())


def randomise(
    tensor: Tensor, name: str, config: ModelConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a canonical tensor with random numbers and return it; the scales of norms are about 1.

    Their deviation is less where a sum has many terms: activations stay finite in 16 bits.
    """
    deviation = 0.02 if tensor.ndim == 1 else min(0.02, tensor.shape[-1] ** -0.5)
    tensor.normal_(0, deviation, generator=generator)
    scales = "norm" in name and name.endswith("weight") and config.norm != "layernorm1p"
    return tensor.add_(1) if scales else tensor


def require_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an engine's weights that are not those of its config, in name or shape."""
    wanted = canonical_shapes(config)
    names = wanted.keys() | shapes.keys()
    if wrong := sorted(name for name in names if wanted.get(name) != shapes.get(name)):
        raise EngineError(
            f"the config and the weights disagree about {listing(wrong)}; build the engine again"
        )
