"""Products in clusters: CI compiles them for Hopper, and tests what chooses tiles and refuses.

`test_cuda_cluster_emulated.py` runs the kernel's source on a CPU, `test_cuda_cluster_gpu.py` runs
it on a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import cuda_cases as cases
from cuda_cluster_cases import (
    HOPPER,
    SHAPES,
    TILES,
    shape_of,
    with_clusters,
)
from porttool.engines.torch import cuda_cluster, cuda_hopper
from porttool.engines.torch.cuda_candidates import cluster_candidates
from porttool.engines.torch.cuda_cluster import KERNEL, NAMES, macros, residual, unfit, unsuited
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_fallback import usable
from porttool.engines.torch.cuda_hopper import compile_kernel
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import ClusterTile, Tuning, shapes, tile_rows
from porttool.engines.torch.cuda_weights import NormWeights, pack_weights
from porttool.errors import EngineError


@pytest.mark.parametrize("case", list(SHAPES))
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 32), (torch.bfloat16, 128)])
def test_it_compiles_for_every_kind_of_matrix(case, dtype, rows, compiler) -> None:
    shape, tile = shape_of(case), TILES[1]
    every = [macros(shape, dtype, name, tile, rows) for name in NAMES]
    for defined in (*every, macros(shape, dtype, "qkv", tile, rows, first=True)):
        assert b"cluster_linear" in compile_kernel(KERNEL, defined)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_candidates_fit_the_shared_memory_that_they_are_given(rows: int, compiler) -> None:
    """The kernel itself asserts that it gets no less than it needs."""
    shape = cases.config("gated rotary", head_dim=128, n_head=16, n_kv_head=16, d_model=2048,
                         d_ff=5440)  # fmt: skip
    for name in NAMES:
        n, k = shapes(shape)[name]
        given = {"gated": name == "up", "residual": residual(name)}
        found = list(cluster_candidates(n, k, rows, HOPPER, **given))
        assert 1 <= len(found) <= 28
        assert len(set(found)) == len(found)
        for tile in found:
            assert tile.shared(rows, **given) <= 227 << 10
            assert not tile.by_memory or -(-n // tile.block_n) * tile.split <= 2 * HOPPER
            assert -(-n // tile.block_n) * tile.split >= HOPPER // 2
        for tile in found[:2]:
            compile_kernel(KERNEL, macros(shape, torch.float16, name, tile, rows))


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"SPLIT": 9}, "up", "up to eight programs"),
        ({"BLOCK_N": 96}, "up", "64 columns"),
        ({"STAGES": 1}, "up", "while another is multiplied"),
        ({"AHEAD": 5}, "up", "before there is a slot"),
        ({"SHARED": 40 << 10}, "up", "more shared memory than there is"),
    ],
)
def test_tiles_that_would_hang_or_go_wrong_are_refused(changes, name, reason, compiler) -> None:
    defined = macros(shape_of("learned"), torch.float16, name, TILES[1], 32)
    with pytest.raises(CompilerUnavailable, match=reason):
        compile_kernel(KERNEL, {**defined, **changes})


@pytest.mark.parametrize(
    "tile",
    [
        (64, 0, 3, 3),
        (64, 9, 3, 3),
        (96, 2, 3, 3),
        (64, 2, 1, 1),
        (64, 2, 3, 0),
        (64, 1, 3, 1, True),
    ],
)
def test_a_manifest_s_tiles_are_refused_when_they_are_read(tile: tuple[int, ...]) -> None:
    data = with_clusters(shape_of("learned"), "cpu", TILES[0]).as_dict()
    names = ("block_n", "split", "stages", "ahead", "by_memory")
    data["cluster"]["32"]["up"] = dict(zip(names, tile, strict=False))
    with pytest.raises(ValidationError, match="no product runs"):
        Tuning.from_dict(data)


@pytest.mark.parametrize(
    "damage", [lambda c: c["32"].pop("out"), lambda c: c.update({"7": c["32"]})]
)
def test_clusters_for_a_part_of_the_matrices_are_refused(damage) -> None:
    data = with_clusters(shape_of("learned"), "cpu", TILES[0]).as_dict()
    damage(data["cluster"])
    with pytest.raises(ValidationError, match="not whole"):
        Tuning.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"d_ff": 800}, "multiples of 64"), ({"d_model": 200}, "multiples of 64"),
     ({"head_dim": 7, "n_head": 64, "n_kv_head": 1}, "multiples of 4")],
)  # fmt: skip
def test_unfit_shapes_have_a_reason(changes: dict[str, object], reason: str) -> None:
    assert unfit(shape_of("learned")) is None
    assert reason in str(unfit(shape_of("learned", **changes)))


def test_what_is_unsuited_runs_without_and_says_so(monkeypatch) -> None:
    shape = shape_of("learned")
    assert "16-bit" in str(unsuited(shape, torch.float32, "cuda"))
    tuned = with_clusters(shape, "cpu", TILES[0])
    assert usable(default_tuning(shape, "cpu"), shape, torch.float16, "cpu")[1] == ""
    plain, said = usable(tuned, shape, torch.float16, "cpu")
    assert plain == replace(tuned, cluster={})
    assert "no products in clusters: a Hopper GPU is needed" in said

    monkeypatch.setattr(cuda_cluster, "unsuited", lambda *a: None)
    monkeypatch.setattr(cuda_hopper, "refusal", lambda *a, **k: "the driver is too old")
    plain, said = usable(tuned, shape, torch.float16, "cpu")
    assert not plain.cluster
    assert "the driver is too old" in said


def test_a_tile_travels_with_the_tuning() -> None:
    tuned = with_clusters(shape_of("learned"), "cpu", TILES[1])
    assert Tuning.from_dict(tuned.as_dict()) == tuned
    assert "up 64 by a cluster of 3" in tuned.described(20)
    assert "head" in tuned.described(20)
    assert "cluster" not in tuned.described(1)


def test_what_does_not_run_after_all_is_an_error_with_a_way_out(monkeypatch) -> None:
    def refuses(*_):
        raise CompilerUnavailable("CUDA says no")

    monkeypatch.setattr(cuda_hopper, "_loaded", refuses)
    assert cuda_hopper.refusal(KERNEL, {}, threads=32, device="cpu") == "CUDA says no"
    with pytest.raises(EngineError, match=rf"{KERNEL} does not run.*says no.*--set tune false"):
        cuda_hopper.load(KERNEL, {}, threads=32, device="cpu")


def test_the_arguments_are_as_long_as_the_kernel_reads() -> None:
    assert ctypes.sizeof(cuda_cluster._Arguments) % 64 == 0
    assert cuda_cluster._Arguments.bias.offset == 3 * 128
    assert cuda_cluster._Arguments.rows.offset == 3 * 128 + 9 * 8


@pytest.mark.parametrize(
    ("largest", "scale"), [(1.0, 1.0), (0.03, 32.0), (2.5, 0.25), (0.0, 1.0), (float("inf"), 1.0)]
)
def test_the_largest_scale_of_a_norm_is_brought_near_one(largest: float, scale: float) -> None:
    gamma = torch.tensor([0.0, -largest])
    assert NormWeights(gamma, None).scale == scale


def test_weights_that_begin_anywhere_are_copied() -> None:
    shape = cases.config("learned")
    state = dict(cases.drawn(shape, torch.float16).half().state_dict())
    name = "layers.0.mlp.up.weight"
    odd = torch.empty(state[name].numel() + 1, dtype=torch.float16)[1:]
    state[name] = odd.view(state[name].shape).copy_(state[name])
    assert state[name].data_ptr() % 16
    packed = pack_weights(shape, state, torch.float16, "cpu")
    assert packed.layers[0].up.weight.data_ptr() % 16 == 0
    assert torch.equal(packed.layers[0].up.weight, state[name])


class Decoder(cases.TunedDecoder):
    def refuses(self, tuning: Tuning) -> bool:
        return any(tile.split == 4 for tile in tuning.cluster.get("32", {}).values())

    def milliseconds(self) -> float:
        tiles = self.tuning.cluster.get("32")
        if tiles is None:
            return 1.0
        return 0.8 + 0.1 * sum(tile.split == 1 for tile in tiles.values())


@pytest.fixture
def compiled(monkeypatch):
    """What was put in the cache."""
    from porttool.engines.torch import cuda_tune_cluster

    found = []
    monkeypatch.setattr(cuda_tune_cluster, "compile_kernel", lambda _, one: found.append(one))
    return found


@pytest.fixture
def measured(monkeypatch, compiled):
    from porttool.engines.torch import cuda_tune

    monkeypatch.setattr(cuda_tune, "stageable", lambda *a: False)
    monkeypatch.setattr(cuda_tune, "unsuited", lambda *a: "no persistent kernel here")
    monkeypatch.setattr(cuda_tune, "step_milliseconds", lambda d, n, context: d.milliseconds())
    return cuda_tune


def test_the_tuner_takes_clusters_where_the_whole_step_is_faster(measured) -> None:
    decoder = Decoder(shape_of("multi-query"))
    other = {"16": dict.fromkeys(NAMES, TILES[2])}
    decoder.use(replace(decoder.tuning, cluster=other))
    offered = [ClusterTile(64, 1, 3, 3), ClusterTile(64, 4, 3, 3), ClusterTile(64, 2, 3, 3)]
    found = dict.fromkeys(NAMES, offered)
    assert measured.refine(decoder, {}, 32, 512, found) == pytest.approx(0.8)
    assert decoder.tuning.cluster == {**other, "32": dict.fromkeys(NAMES, offered[2])}
    alone = dict.fromkeys(NAMES, offered[:1])  # 1.2: slower than without
    assert measured.refine(decoder, {}, 32, 512, alone) == pytest.approx(1.0)
    assert decoder.tuning.cluster == other
    assert measured.refine(decoder, {}, 32, 512, {**found, "up": []}) == pytest.approx(1.0)
    measured.refine(decoder, {}, 1, 512)
    assert decoder.tuning.cluster == other  # a single row has no business with them


def test_the_tuner_tries_more_slots_ahead_in_whole_steps(measured, compiled) -> None:
    class Eager(Decoder):
        def milliseconds(self) -> float:
            tiles = self.tuning.cluster.get("32")
            if tiles is None:
                return 1.0
            return 0.9 - sum(0.1 * (tiles[name].ahead == n) for name, n in fastest.items())

    decoder = Eager(shape_of("multi-query"))
    offered = ClusterTile(64, 2, 8, 4)
    found = {name: [offered] for name in NAMES}
    fastest = {"qkv": 4, "out": 8, "up": 6, "down": 5}
    assert measured.refine(decoder, {}, 32, 512, found) == pytest.approx(0.5)
    chosen = {name: replace(offered, ahead=n) for name, n in fastest.items()}
    assert decoder.tuning.cluster["32"] == chosen
    tried = {pair for used in decoder.used for pair in used.cluster.get("32", {}).items()}
    sooner = [(name, tile) for name, tile in tried if tile != offered]
    assert len(sooner) == 12  # side by side, before they are measured
    assert all(macros(decoder.config, decoder.dtype, *one, 32) in compiled for one in sooner)


def test_no_tile_is_asked_for_twice() -> None:
    from porttool.engines.torch.cuda_tune_cluster import asked_sooner

    for stages, ahead, more in ((8, 4, [5, 6, 8]), (8, 6, [5, 8]), (2, 1, [2]), (2, 2, [])):
        tile = ClusterTile(64, 2, stages, ahead)
        assert asked_sooner(tile) == [replace(tile, ahead=n) for n in more]


def test_the_tuner_chooses_products_again_beside_what_they_brought_about(measured) -> None:
    """One that is slower at first is faster beside the attention that the others made faster."""
    wide, tall = ClusterTile(64, 1, 8, 4), ClusterTile(64, 2, 8, 4)
    together = replace(default_tuning(shape_of("multi-query"), "cpu").attention, balanced=True)

    class Mutual(Decoder):
        def milliseconds(self) -> float:
            tiles = self.tuning.cluster.get("32")
            if tiles is None:
                return 1.0
            balanced = self.tuning.wide_attention["32"].balanced
            split = any(tile.split == 2 for tile in tiles.values())
            return 0.9 - 0.1 * balanced - 0.1 * split if balanced else 0.9 + 0.1 * split

    decoder = Mutual(shape_of("multi-query"))
    found = {name: [wide, tall] if name == "up" else [wide] for name in NAMES}
    assert measured.refine(decoder, {}, 32, 512, found, [together]) == pytest.approx(0.7)
    assert decoder.tuning.cluster["32"] == {**dict.fromkeys(NAMES, wide), "up": tall}


def test_rows_of_a_tile_cover_every_batch() -> None:
    assert {tile_rows(n) for n in range(2, 300)} == {16, 32, 64, 128}
