"""Weights that a tensor- or pipeline-parallel training left in one file for each rank, made whole.

Folders are called `mp_rank_<tp>`, `mp_rank_<tp>_<pp>` or `tp_rank_<tp>_pp_rank_<pp>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from porttool.errors import SourceError
from porttool.memory import digest
from porttool.weights import TensorInfo, TensorSource, listing

if TYPE_CHECKING:
    from torch import Tensor

RANK = re.compile(r"^(?:mp_rank_(\d+)(?:_(\d+))?|tp_rank_(\d+)_pp_rank_(\d+))$")
STACKED = ("metadata.json", "common.pt", ".metadata")
"""Files of Megatron's distributed checkpoints, whose tensors each hold a whole stack of layers."""

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")

Grid = Mapping[tuple[int, int], str]
"""(tensor-parallel rank, pipeline stage) → name of the folder."""


@dataclass(frozen=True)
class Split:
    """How ranks divide a tensor: along `axis`, each of `blocks` fused parts on its own."""

    axis: int
    blocks: int = 1


def find_ranks(names: Iterable[str], where: str) -> Grid:
    """Return the rank folders among names; a gap between them is a SourceError naming it."""
    grid: dict[tuple[int, int], str] = {}
    for name in sorted(names):
        if match := RANK.match(name):
            tp, pp = (int(n or 0) for n in (match.groups()[:2] if match[1] else match.groups()[2:]))
            if (tp, pp) in grid:
                raise SourceError(f"{where}: {grid[tp, pp]} and {name} are the same rank")
            grid[tp, pp] = name
    if grid:
        tp, pp = (max(place) + 1 for place in zip(*grid, strict=True))
        require_ranks(grid, tp, pp, where)
    return grid


def require_ranks(grid: Grid, tp: int, pp: int, where: str) -> None:
    """Refuse a set of rank folders that is not the whole grid of tp by pp."""
    wanted = {(t, p) for t in range(tp) for p in range(pp)}
    if missing := sorted(wanted - grid.keys()):
        named = listing([f"tensor rank {t} of stage {p}" for t, p in missing])
        raise SourceError(
            f"{where}: trained on {tp} tensor-parallel ranks in {pp} pipeline stages, but the "
            f"files of {named} are missing; fetch them all"
        )
    if extra := sorted(grid[place] for place in grid.keys() - wanted):
        raise SourceError(
            f"{where}: {listing(extra)} exceed the {tp} tensor-parallel ranks in {pp} pipeline "
            "stages that it was trained on; two checkpoints are mixed here"
        )


class JoinedRanks(TensorSource):
    """The tensors of one pipeline stage, joined over its tensor-parallel ranks, in their order.

    `split_of` tells how a name is divided; None means that every rank holds the same copy, which
    is checked. That two ranks hold the same of all that is divided is refused.
    """

    def __init__(
        self, ranks: Mapping[str, TensorSource], split_of: Callable[[str], Split | None]
    ) -> None:
        self._ranks = dict(ranks)
        self._split_of = split_of
        where, first = next(iter(ranks.items()))
        for other, rank in self._ranks.items():
            if differing := sorted(first.infos().keys() ^ rank.infos().keys()):
                raise SourceError(
                    f"{where} and {other} do not hold the same tensors: {listing(differing)}"
                )
        self._infos = {name: self._joined(name) for name in first.infos()}
        self._require_own_parts()

    def _require_own_parts(self) -> None:
        """Refuse a rank's file that is a copy of another's; the smallest tensors tell first."""
        if len(self._ranks) == 1:
            return
        divided = [n for n in self._infos if self._split_of(n) is not None]
        alike = [list(self._ranks.values())]
        for name in sorted(divided, key=lambda n: self._infos[n].nbytes):
            alike = [same for ranks in alike for same in equals(ranks, name)]
        for one, other, *_ in alike if divided else ():
            raise SourceError(
                f"{one.infos()[name].file} and {other.infos()[name].file} hold the same part of "
                "everything that ranks divide: one is a copy of the other; fetch them again"
            )

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor as it will be when joined."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Join one tensor, holding no more of it than the result and one rank's part."""
        split = self._split_of(name)
        if split is None:
            return self._replicated(name)
        if len(self._ranks) == 1:
            return next(iter(self._ranks.values())).load(name)
        return self._fill(name, split)

    def _fill(self, name: str, split: Split) -> Tensor:
        import torch

        info = self._infos[name]
        result = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        target = in_blocks(result, split)
        start = 0
        for rank in self._ranks.values():
            part = in_blocks(rank.load(name), split)
            width = part.shape[split.axis + 1]
            target.narrow(split.axis + 1, start, width).copy_(part)
            start += width
        return result

    def _replicated(self, name: str) -> Tensor:
        where, *others = self._ranks
        tensor = self._ranks[where].load(name)
        for other in others:
            if not self._ranks[other].load(name).equal(tensor):
                raise SourceError(
                    f"{name} should be the same on every rank, but {where} and {other} differ; "
                    "their files are of different checkpoints"
                )
        return tensor

    def _joined(self, name: str) -> TensorInfo:
        parts = {where: rank.infos()[name] for where, rank in self._ranks.items()}
        where, first = next(iter(parts.items()))
        split = self._split_of(name)
        axis = len(first.shape) if split is None else split.axis
        rest = (*first.shape[:axis], *first.shape[axis + 1 :])
        for other, part in parts.items():
            if (*part.shape[:axis], *part.shape[axis + 1 :], part.dtype) != (*rest, first.dtype):
                raise SourceError(
                    f"{name} is {first.dtype} {list(first.shape)} in {where} but "
                    f"{part.dtype} {list(part.shape)} in {other}"
                )
        if split is None:
            return first
        if len(first.shape) <= axis or any(p.shape[axis] % split.blocks for p in parts.values()):
            raise SourceError(f"{name} in {where} cannot be divided: {list(first.shape)}")
        total = sum(part.shape[axis] for part in parts.values())
        shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
        return replace(first, shape=shape, nbytes=sum(part.nbytes for part in parts.values()))


def equals(ranks: Iterable[TensorSource], name: str) -> list[list[TensorSource]]:
    """Return the groups of two or more ranks whose parts of a tensor are the same, bit by bit."""
    groups: dict[bytes, list[TensorSource]] = {}
    for rank in ranks:
        groups.setdefault(digest(rank.load(name)), []).append(rank)
    return [group for group in groups.values() if len(group) > 1]


def in_blocks(tensor: Tensor, split: Split) -> Tensor:
    """View a tensor with the blocks of its divided axis as a dimension of their own."""
    shape = tensor.shape
    return tensor.view(*shape[: split.axis], split.blocks, -1, *shape[split.axis + 1 :])


class Renamed(TensorSource):
    """The same tensors under other names: new name → old name. What is not named is left out."""

    def __init__(self, inner: TensorSource, names: Mapping[str, str]) -> None:
        self._inner = inner
        self._names = dict(names)
        self._infos = {new: inner.infos()[old] for new, old in names.items()}

    @classmethod
    def by(cls, inner: TensorSource, new_name: Callable[[str], str]) -> Self:
        """Rename every tensor; two that would share a name are a SourceError naming both."""
        names: dict[str, str] = {}
        for name, info in inner.infos().items():
            new = new_name(name)
            if new in names:
                raise SourceError(f"{info.file}: {names[new]} and {name} are both {new}")
            names[new] = name
        return cls(inner, names)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor under its new name."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read one tensor by its new name."""
        return self._inner.load(self._names[name])


class ShardedTensors(TensorSource):
    """Tensors spread over several files; a name in two of them is refused."""

    def __init__(self, parts: Mapping[str, TensorSource]) -> None:
        self._where: dict[str, TensorSource] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file, part in parts.items():
            for name, info in part.infos().items():
                if name in self._where:
                    raise SourceError(f"{name} is in {self._infos[name].file} and again in {file}")
                self._where[name] = part
                self._infos[name] = info

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor of every file."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read one tensor from its file."""
        return self._where[name].load(name)


def number_stages(stages: Iterable[TensorSource]) -> list[TensorSource]:
    """Return pipeline stages, each counting its layers from 0, with layers counted through."""
    result: list[TensorSource] = []
    offset = 0
    for stage in stages:
        layers = {int(m[0]) for name in stage.infos() if (m := LAYER.search(name))}
        if layers and layers != set(range(len(layers))):
            raise SourceError(f"the layers of a pipeline stage have gaps: {sorted(layers)}")
        names = {LAYER.sub(lambda m: str(int(m[0]) + offset), n, count=1): n for n in stage.infos()}  # noqa: B023
        result.append(Renamed(stage, names))
        offset += len(layers)
    return result
