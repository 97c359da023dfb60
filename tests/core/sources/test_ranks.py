from __future__ import annotations

import pytest
import torch

from porttool.errors import SourceError
from porttool.sources.ranks import (
    JoinedRanks,
    Split,
    find_ranks,
    number_stages,
    require_ranks,
)
from porttool.sources.torch_file import TensorTree

torch.manual_seed(0)
COLUMN = torch.randn(12, 5)
ROW = torch.randn(5, 8)
NORM = torch.randn(5)
SPLITS = {"column": Split(0), "fused": Split(0, blocks=3), "row": Split(1), "norm": None}


def tree(**tensors: torch.Tensor) -> TensorTree:
    return TensorTree(tensors, "file", mapped=False)


def rank(n: int, size: int) -> TensorTree:
    fused = torch.cat([block.chunk(size)[n] for block in COLUMN.chunk(3)])
    return tree(
        column=COLUMN.chunk(size)[n], fused=fused, row=ROW.chunk(size, 1)[n], norm=NORM.clone()
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_are_joined(size):
    joined = JoinedRanks({f"mp_rank_{n:02}": rank(n, size) for n in range(size)}, SPLITS.get)
    whole = {"column": COLUMN, "fused": COLUMN, "row": ROW, "norm": NORM}
    for name, tensor in whole.items():
        assert joined.infos()[name].shape == tuple(tensor.shape)
        assert joined.infos()[name].nbytes == tensor.nbytes
        assert joined.load(name).equal(tensor)


def test_differing_ranks_are_refused():
    with pytest.raises(SourceError, match="a and b do not hold the same tensors: column, extra"):
        JoinedRanks({"a": rank(0, 2), "b": tree(extra=NORM)}, SPLITS.get)
    with pytest.raises(SourceError, match=r"norm is float32 \[5\] in a but float32 \[4\] in b"):
        JoinedRanks({"a": tree(norm=NORM), "b": tree(norm=NORM[:4])}, SPLITS.get)
    joined = JoinedRanks({"a": tree(norm=NORM), "b": tree(norm=NORM + 1)}, SPLITS.get)
    assert joined.infos()["norm"].shape == (5,)
    with pytest.raises(SourceError, match="a and b differ"):
        joined.load("norm")


def test_a_rank_that_is_a_copy_of_another():
    """Its file was fetched twice, or copied over the other's; biases may well be the same."""
    parts = [rank(n, 4) for n in (0, 1, 1, 3)]
    with pytest.raises(SourceError, match="file and file hold the same part of everything"):
        JoinedRanks(dict(zip("abcd", parts, strict=True)), SPLITS.get)
    bias = torch.zeros(3)
    some = {n: tree(fused=bias, column=COLUMN[n : n + 3], norm=NORM) for n in range(3)}
    assert JoinedRanks({str(n): t for n, t in some.items()}, SPLITS.get).load("fused").shape == (9,)
    JoinedRanks({"a": tree(norm=NORM), "b": tree(norm=NORM)}, SPLITS.get)


@pytest.mark.parametrize(
    ("names", "grid"),
    [
        (["mp_rank_00", "mp_rank_01"], {(0, 0): "mp_rank_00", (1, 0): "mp_rank_01"}),
        (["mp_rank_01_000", "x", "mp_rank_00_000"],
         {(0, 0): "mp_rank_00_000", (1, 0): "mp_rank_01_000"}),
        (["tp_rank_00_pp_rank_000"], {(0, 0): "tp_rank_00_pp_rank_000"}),
        (["model.pt"], {}),
    ],
)  # fmt: skip
def test_rank_folders_are_recognised(names, grid):
    assert find_ranks(names, "here") == grid


def test_missing_ranks_are_named():
    with pytest.raises(SourceError, match="tensor rank 1 of stage 0 are missing"):
        find_ranks(["mp_rank_00", "mp_rank_02"], "here")
    grid = find_ranks(["mp_rank_00"], "here")
    with pytest.raises(SourceError, match="trained on 2 tensor-parallel ranks"):
        require_ranks(grid, 2, 1, "here")
    with pytest.raises(SourceError, match="mp_rank_00 and mp_rank_00_000 are the same rank"):
        find_ranks(["mp_rank_00", "mp_rank_00_000"], "here")


def test_stages_are_counted_through():
    first = tree(**{"layers.0.a": NORM, "layers.1.a": NORM, "embedding": NORM})
    second = tree(**{"layers.0.a": NORM + 1, "norm": NORM})
    stages = number_stages([first, second])
    assert [sorted(s.infos()) for s in stages] == [
        ["embedding", "layers.0.a", "layers.1.a"],
        ["layers.2.a", "norm"],
    ]
    assert stages[1].load("layers.2.a").equal(NORM + 1)
    with pytest.raises(SourceError, match="gaps"):
        number_stages([tree(**{"layers.1.a": NORM})])
