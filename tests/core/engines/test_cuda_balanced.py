"""Balanced attention: CI compiles it for Hopper, and tests what offers, reads and refuses it.

`test_cuda_balanced_emulated.py` runs the kernel's source on a CPU, `test_cuda_balanced_gpu.py` runs
it on a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import cuda_cases as cases
from porttool.engines.torch import cuda_balanced, cuda_fallback, cuda_hopper
from porttool.engines.torch.cuda_balanced import (
    COPIED,
    kernel,
    macros,
    threads,
    unfit,
    unsuited,
)
from porttool.engines.torch.cuda_candidates import balanced_candidates
from porttool.engines.torch.cuda_cluster import NAMES
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_hopper import compile_kernel
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tune import balanced_for
from porttool.engines.torch.cuda_tuning import AttentionTile, ClusterTile, Tuning
from porttool.engines.torch.tile_cache import read_tuning

TILE = AttentionTile(1, 64, 4, 3, balanced=True)


def shape_of(head_dim: int = 64, *, n_head: int = 4, n_kv_head: int = 4):
    """Return a model whose heads have keys of their own, or share them."""
    return cases.config("gated rotary", head_dim=head_dim, n_head=n_head, n_kv_head=n_kv_head)


def tuned(shape) -> Tuning:
    """Return the rule's tuning with balanced attention of 17 rows and more."""
    plain = default_tuning(shape, "cpu")
    several = {rows: tile if rows == "16" else TILE for rows, tile in plain.wide_attention.items()}
    return replace(plain, wide_attention=several)


def programs(shape, tile: AttentionTile) -> int:
    """Return how many programs the shared memory of a multiprocessor holds."""
    return (228 << 10) // (macros(shape, torch.float16, tile)["SHARED"] + 1024)


@pytest.mark.parametrize(
    ("head_dim", "cut"),
    [(64, {(64, 4), (128, 8), (128, 4)}), (128, {(32, 2), (64, 4)}), (256, {(16, 1), (32, 2)})],
)
def test_candidates_for_heads_of_their_own(head_dim: int, cut, compiler) -> None:
    """The kernel itself asserts that it gets no less shared memory than it needs."""
    shape = shape_of(head_dim)
    found = list(balanced_candidates(shape, 32, 512))
    assert {(tile.block_t, tile.warps) for tile in found} == cut
    assert len(set(found)) == len(found) == 2 * len(cut)
    assert [programs(shape, tile) for tile in found] == [2, 1] * len(cut)
    for tile in (found[0], found[-1]):
        assert_it_compiles(shape, tile)


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "head_dim"), [(16, 1, 128), (48, 1, 128), (32, 8, 64), (8, 2, 256)]
)
def test_candidates_for_heads_that_share_keys(n_head, n_kv_head, head_dim, compiler) -> None:
    shape = shape_of(head_dim, n_head=n_head, n_kv_head=n_kv_head)
    for n, context in ((17, 512), (32, 100), (32, 512), (128, 3000)):
        found = list(balanced_candidates(shape, n, context))
        assert len(set(found)) == len(found) > 0
        assert all(programs(shape, tile) >= 1 for tile in found)
        assert all(n * n_kv_head * tile.splits >= 90 for tile in found)
        for tile in found:
            part = -(-(context + 128) // 16 // tile.splits) * 16
            room = macros(shape, torch.float16, replace(tile, block_t=part, stages=part // 16))
            at_once = part <= 208 and room["SHARED"] <= 220 << 10
            assert (tile.block_t == part) == at_once, "a part is taken at once where that fits"
            assert tile.block_t // COPIED <= tile.stages
    for tile in (found[0], found[-1]):
        assert_it_compiles(shape, tile)


def assert_it_compiles(shape, tile: AttentionTile) -> None:
    """Compile a tile for both types, whole and in sums with a bias."""
    for dtype, given in ((torch.float16, {}), (torch.bfloat16, {"parts": 4, "has_bias": True})):
        name = kernel(shape)
        assert name.encode() in compile_kernel(name, macros(shape, dtype, tile, **given))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"DIM": 96}, "share a key evenly"),
        ({"SLOT": 40}, "take blocks of a slot"),
        ({"SLOTS": 1}, "take blocks of a slot"),
        ({"SHARED": 40 << 10}, "more shared memory than there is"),
        ({"KV": 2}, "keys of its own"),
    ],
)
def test_what_would_hang_or_go_wrong_is_refused(changes, reason, compiler) -> None:
    with pytest.raises(CompilerUnavailable, match=reason):
        compile_kernel("balanced_attention", {**macros(shape_of(), torch.float16, TILE), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"WIDE": 3}, "share evenly"),
        ({"DIM": 96}, "share evenly"),
        ({"SPLIT": 9}, "up to eight programs"),
        ({"RING": 3}, "taken as a whole"),
        ({"SLOT": 72}, "made of copies"),
        ({"SLOT": 33 * COPIED, "RING": 33}, "gives back each copy"),
        ({"SHARED": 16 << 10}, "more shared memory than there is"),
    ],
)
def test_clusters_that_would_go_wrong_are_refused(changes, reason, compiler) -> None:
    shape, tile = shape_of(n_kv_head=1), AttentionTile(4, 4 * COPIED, 4, 5, balanced=True)
    with pytest.raises(CompilerUnavailable, match=reason):
        compile_kernel("cluster_attention", {**macros(shape, torch.float16, tile), **changes})


def test_unfit_shapes_have_a_reason() -> None:
    assert unfit(shape_of()) is None
    assert "have 80 elements" in str(unfit(shape_of(80)))
    assert "more than 64" in str(unfit(shape_of(n_head=65, n_kv_head=1)))
    assert "16-bit" in str(unsuited(shape_of(), torch.float32, "cuda"))


def test_without_a_hopper_gpu_other_attention_runs_and_says_so(monkeypatch) -> None:
    shape = shape_of()
    given, plain = tuned(shape), default_tuning(shape, "cpu")
    assert cuda_fallback.usable(plain, shape, torch.float16, "cpu") == (plain, "")
    found, said = cuda_fallback.usable(given, shape, torch.float16, "cpu")
    assert found == plain
    assert said == ", no balanced attention: a Hopper GPU is needed"

    tried = []

    def refuses(name, defined, *, threads, device):
        tried.append((name, defined["SLOT"], defined["PARTS"], defined["HAS_BIAS"], threads))
        return "the driver is too old"

    monkeypatch.setattr(cuda_balanced, "unsuited", lambda *a: None)
    monkeypatch.setattr(cuda_hopper, "refusal", refuses)
    found, said = cuda_fallback.usable(given, shape, torch.float16, "cpu")
    assert found == plain
    assert "no balanced attention: the driver is too old" in said
    parts = given.wide["32"]["qkv"].split  # as its steps will find them
    assert tried == [("balanced_attention", 64, parts, 0, threads(shape, TILE))]

    monkeypatch.setattr(cuda_hopper, "refusal", lambda *a, **k: None)
    found, said = cuda_fallback.usable(given, shape, torch.float16, "cpu")
    assert found == given
    assert said == ", balanced attention of several rows"


@pytest.mark.parametrize("damage", [{"splits": 0}, {"stages": 0}, {"warps": -1}])
def test_a_tile_of_nothing_is_refused_when_it_is_read(damage: dict[str, int]) -> None:
    data = tuned(shape_of()).as_dict()
    data["wide_attention"]["32"] |= damage
    with pytest.raises(ValidationError, match="no attention runs"):
        Tuning.from_dict(data)


def test_a_tile_travels_with_the_tuning() -> None:
    given = tuned(shape_of())
    assert Tuning.from_dict(given.as_dict()) == given
    assert given.described(20).startswith("attention balanced 1 x 64, ")


def test_tiles_of_the_time_when_slots_had_one_size_are_measured_again() -> None:
    shape = shape_of(n_kv_head=1)
    data = tuned(shape).as_dict()
    assert read_tuning(data, shape)
    data["wide_attention"]["32"]["block_t"] = COPIED
    assert read_tuning(data, shape) is None


def test_tiles_of_the_time_when_warps_took_other_positions_are_measured_again() -> None:
    shape = shape_of()
    data = tuned(shape).as_dict()
    tile = data["wide_attention"]["32"]
    assert (tile["block_t"], tile["warps"]) == (64, 4)
    assert read_tuning(data, shape)
    tile["warps"] = 8
    assert read_tuning(data, shape) is None


@pytest.mark.parametrize("place", ["attention", "wide_attention"])
def test_few_rows_are_refused_when_a_tuning_is_read(place: str) -> None:
    data = tuned(shape_of()).as_dict()
    few = data[place] if place == "attention" else data[place]["16"]
    few["balanced"] = True
    with pytest.raises(ValidationError, match="tokens of one sequence"):
        Tuning.from_dict(data)


def test_the_tuner_offers_it_to_more_than_sixteen_rows(monkeypatch) -> None:
    decoder = cases.TunedDecoder(shape_of())
    monkeypatch.setattr("porttool.engines.torch.cuda_tune.balanced_unsuited", lambda *a: None)
    assert not balanced_for(decoder, 16, 512)
    assert balanced_for(decoder, 17, 512) == list(balanced_candidates(shape_of(), 17, 512))
    sharing = shape_of(n_head=48, n_kv_head=1)
    found = balanced_for(cases.TunedDecoder(sharing), 32, 700)
    assert found == list(balanced_candidates(sharing, 32, 700))
    assert found != list(balanced_candidates(sharing, 32, 512))
    monkeypatch.setattr("porttool.engines.torch.cuda_tune.balanced_unsuited", lambda *a: "no")
    assert not balanced_for(decoder, 17, 512)


class Decoder(cases.TunedDecoder):
    """Balanced attention alone is slower, beside products in clusters it is faster."""

    def refuses(self, tuning: Tuning) -> bool:
        return tuning.wide_attention["32"] == replace(TILE, stages=2)

    def milliseconds(self) -> float:
        tile = self.tuning.wide_attention["32"]
        if not self.tuning.cluster:
            return 1.1 if tile.balanced else 1.0
        return {3: 0.7, 6: 0.6}[tile.stages] if tile.balanced else 0.8


def test_the_tuner_measures_it_beside_products_in_clusters(monkeypatch) -> None:
    from porttool.engines.torch import cuda_tune

    monkeypatch.setattr(cuda_tune, "stageable", lambda *a: False)
    monkeypatch.setattr(cuda_tune, "step_milliseconds", lambda d, n, context: d.milliseconds())
    monkeypatch.setattr(cuda_tune, "compile_tiles", lambda *a: None)
    offered = [replace(TILE, stages=stages) for stages in (3, 2, 6)]
    decoder = Decoder(shape_of())
    assert cuda_tune.refine(decoder, {}, 32, 512, None, offered) == pytest.approx(1.0)
    assert not decoder.tuning.wide_attention["32"].balanced
    clusters = {name: [ClusterTile(64, 1, 3, 3)] for name in NAMES}
    assert cuda_tune.refine(decoder, {}, 32, 512, clusters, offered) == pytest.approx(0.6)
    assert decoder.tuning.wide_attention["32"] == offered[2]
    assert not decoder.tuning.wide_attention["64"].balanced


def test_the_arguments_are_as_the_kernel_reads_them() -> None:
    step, heads, group = cuda_balanced._Step, cuda_balanced._Own, cuda_balanced._Group
    assert [step.capacity.offset, step.rows.offset, step.scale.offset] == [72, 80, 84]
    assert (heads.drawn.offset, group.step.offset) == (88, 256)
    assert ctypes.sizeof(group) % 64 == 0
