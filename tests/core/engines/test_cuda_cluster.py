"""Products in clusters: CI compiles them for Hopper and tests what is told to them, GPUs run them.

Programs of a cluster write each other's shared memory, for which there is no interpreter: on a CPU
a double takes the kernel's place, which computes from the addresses that the kernel would get.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cuda_cases as cases
from cuda_cases import TOLERANCE, prompts
from porttool.config import ModelConfig
from porttool.engines.torch import cuda, cuda_cluster, cuda_compile
from porttool.engines.torch.cuda_candidates import cluster_candidates
from porttool.engines.torch.cuda_cluster import (
    NAMES,
    compile_product,
    macros,
    residual,
    unfit,
    unsuited,
    usable,
)
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_tuning import (
    AttentionTile,
    ClusterTile,
    Tuning,
    default_tuning,
    shapes,
    tile_rows,
)
from porttool.errors import EngineError
from porttool.nn import KVCache, Step

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
HOPPER = 132  # multiprocessors of an H200
_LONG = {"n_positions": 640, "vocab_size": 1003}
SHAPES = {
    "learned": {"head_dim": 64, "d_model": 192, "d_ff": 832, **_LONG},
    "multi-query": {"head_dim": 128, "d_model": 768, "d_ff": 3072, **_LONG},
    "gated rotary": {"head_dim": 80, "d_model": 320, "d_ff": 704, **_LONG},
    "grouped rms": {"head_dim": 160, "d_model": 960, "d_ff": 640, **_LONG},
}
TILES = [ClusterTile(64, 1, 3, 3), ClusterTile(64, 3, 4, 2), ClusterTile(128, 5, 2, 1)]


def shape_of(case: str, **changes: object) -> ModelConfig:
    return cases.config(case, **{**SHAPES[case], **changes})


def with_clusters(shape: ModelConfig, device: str, tile: ClusterTile) -> Tuning:
    """Return the rule's tuning, with one tile for every product of every number of rows."""
    products = {str(rows): dict.fromkeys(NAMES, tile) for rows in (16, 32, 64, 128)}
    return replace(default_tuning(shape, device), cluster=products)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cuda_compile._nvrtc()
    except CompilerUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", list(SHAPES))
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 32), (torch.bfloat16, 128)])
def test_it_compiles_for_every_kind_of_matrix(case, dtype, rows, compiler) -> None:
    shape, tile = shape_of(case), TILES[1]
    every = [macros(shape, dtype, name, tile, rows) for name in NAMES]
    for defined in (*every, macros(shape, dtype, "qkv", tile, rows, first=True)):
        assert b"cluster_linear" in compile_product(defined)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_candidates_fit_the_shared_memory_that_they_are_given(rows: int, compiler) -> None:
    """The kernel itself asserts that it gets no less than it needs."""
    shape = cases.config("gated rotary", head_dim=128, n_head=16, n_kv_head=16, d_model=2048,
                         d_ff=5440)  # fmt: skip
    for name in NAMES:
        n, k = shapes(shape)[name]
        given = {"gated": name == "up", "residual": residual(name)}
        found = list(cluster_candidates(n, k, rows, HOPPER, **given))
        assert 1 <= len(found) <= 16
        assert len(set(found)) == len(found)
        for tile in found:
            assert tile.shared(rows, **given) <= 227 << 10
            assert -(-n // tile.block_n) * tile.split >= HOPPER // 2
        for tile in found[:2]:
            compile_product(macros(shape, torch.float16, name, tile, rows))


@pytest.mark.parametrize(
    ("tile", "name", "reason"),
    [
        (ClusterTile(192, 1, 2, 2), "down", "whole rows"),
        (ClusterTile(64, 9, 2, 2), "up", "up to eight programs"),
        (ClusterTile(96, 2, 2, 2), "up", "64 columns"),
    ],
)
def test_tiles_that_the_kernel_cannot_run_are_refused(tile, name, reason, compiler) -> None:
    with pytest.raises(CompilerUnavailable, match=reason):
        compile_product(macros(shape_of("learned"), torch.float16, name, tile, 32))


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
    assert "no products in clusters: they are written for Hopper" in said

    def refuses(*_):
        raise CompilerUnavailable("the driver is too old")

    monkeypatch.setattr(cuda_cluster, "unsuited", lambda *a: None)
    monkeypatch.setattr(cuda_cluster, "_kernel", refuses)
    plain, said = usable(tuned, shape, torch.float16, "cpu")
    assert not plain.cluster
    assert "the driver is too old" in said


def test_a_tile_travels_with_the_tuning() -> None:
    tuned = with_clusters(shape_of("learned"), "cpu", TILES[1])
    assert Tuning.from_dict(tuned.as_dict()) == tuned
    assert "up 64 by a cluster of 3" in tuned.described(20)
    assert "head" in tuned.described(20)
    assert "cluster" not in tuned.described(1)


class Kernel:
    """In the kernel's place: computes on a CPU from the addresses that it is given.

    `known` are all tensors by their addresses. What products tell of the residual stream is kept
    by tiles, as the kernel leaves it, so that a reader with other tiles would go wrong.
    """

    def __init__(self, defined, known) -> None:
        self.defined, self.known = dict(defined), known

    def at(self, address: int | None) -> torch.Tensor | None:
        return None if address is None else self.known[address]

    def launch_clusters(self, grid, cluster, stream, a, *, chained) -> None:
        d, kind = self.defined, type("Kind", (), self.defined)
        assert cluster == d["SPLIT"]
        assert grid[0] == -(-a.columns // d["BLOCK_N"]) * cluster
        assert grid[1] == -(-a.rows // d["BLOCK_M"])
        weights = self.at(a.weights[0]).double()
        inputs = self.at(a.inputs[0])[: a.rows, : a.chunks * 64].double()
        bias, tile = self.at(a.bias), d["BLOCK_N"]
        value = inputs @ weights.T
        if kind.NORM:
            told = self.at(a.heard).reshape(-1)[: a.heard_tiles * a.rows * 2]
            first, second = told.view(a.heard_tiles, a.rows, 2).sum(0).double().unbind(-1)
            mean = torch.zeros_like(first) if kind.RMS else first / a.width
            scale = (second / a.width - mean**2 + float(d["EPS"][:-1])).rsqrt()
            column = self.at(a.column_sum).double()
            value = scale[:, None] * (value * 16 - mean[:, None] * column)
        value = value if bias is None else value + bias.double()
        if kind.GATED:
            value, gate = value[:, : a.columns], value[:, a.columns :]
        if kind.ACTIVATED:
            value = activated(value, next(k for k in d if k.startswith("ACT_"))[4:])
        value = value * gate if kind.GATED else value
        if not kind.RESIDUAL:
            self.at(a.out)[: a.rows] = value
            return
        x = self.at(a.x)[: a.rows]
        x += value
        self.at(a.out)[: a.rows] = x * self.at(a.gamma) / 16
        parts = [torch.stack((p.sum(1), (p**2).sum(1)), -1) for p in x.split(tile, 1)]
        told = torch.stack(parts)
        self.at(a.told).reshape(-1)[: told.numel()] = told.reshape(-1)


def activated(value: torch.Tensor, kind: str) -> torch.Tensor:
    f = torch.nn.functional
    return {"gelu_tanh": lambda v: f.gelu(v, approximate="tanh"), "gelu": f.gelu,
            "silu": f.silu}[kind](value)  # fmt: skip


def tensors_of(*objects: object) -> dict[int, torch.Tensor]:
    """Return every tensor in (nested) dataclasses and tuples by its address."""
    found: dict[int, torch.Tensor] = {}
    for thing in objects:
        if isinstance(thing, torch.Tensor):
            found[thing.data_ptr()] = thing
        elif isinstance(thing, tuple):
            found |= tensors_of(*thing)
        elif hasattr(thing, "__dataclass_fields__"):
            found |= tensors_of(*(getattr(thing, f) for f in thing.__dataclass_fields__))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
@pytest.mark.parametrize("case", list(SHAPES))
def test_the_chain_tells_the_kernel_what_the_model_is(case: str, monkeypatch) -> None:
    heads = {"multi-query": (4, 1), "grouped rms": (4, 2)}
    n_head, n_kv_head = heads.get(case, (2, 2))
    shape = cases.config(case, head_dim=128 // n_head, d_model=128, d_ff=128, n_head=n_head,
                         n_kv_head=n_kv_head)  # fmt: skip
    plain = cases.drawn(shape, torch.float32)
    made = cuda.CudaDecoder(shape, plain.state_dict(), dtype=torch.float32,
                            limits=cases.limits(17, 16), device="cpu")  # fmt: skip
    cache = KVCache(shape, 17, 16, dtype=torch.float64)
    tiles = dict(zip(NAMES, (TILES[1], TILES[2], TILES[0], TILES[1]), strict=True))
    whole = dict.fromkeys(("16", "32"), AttentionTile(1, 16, 1))
    made.tuning = replace(made.tuning, cluster={"16": tiles, "32": tiles}, wide_attention=whole)
    made.model = replace(made.model, tuning=made.tuning)
    known: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(cuda_cluster, "_kernel", lambda defined, device: Kernel(defined, known))
    monkeypatch.setattr(cuda_cluster, "tensor_map", lambda t, box: (t.data_ptr(),) + (0,) * 15)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    n = 17 if n_kv_head < n_head else 3  # many heads take the interpreter long
    first = Step.prefill([[(7 * i + j) % 101 for j in range(2)] for i in range(n)])
    known |= tensors_of(made.model.weights, made._scratch_of(n))
    made.step(first), cases.reference(plain, cache, first)
    step = cases.one_token(list(range(n)), torch.arange(n), [2] * n)
    assert cases.relative_error(made.step(step), cases.reference(plain, cache, step)) < 1e-4


def test_what_does_not_run_after_all_is_an_error_with_a_way_out(monkeypatch) -> None:
    shape = shape_of("learned")
    model = SimpleNamespace(config=shape, tuning=with_clusters(shape, "cpu", TILES[0]))

    def refuses(*_):
        raise CompilerUnavailable("CUDA says no")

    monkeypatch.setattr(cuda_cluster, "ClusterProduct", refuses)
    with pytest.raises(EngineError, match=r"CUDA says no.*--set tune false"):
        cuda_cluster.layer_products(model, None, 20)


def test_the_arguments_are_as_long_as_the_kernel_reads() -> None:
    assert ctypes.sizeof(cuda_cluster._Arguments) % 64 == 0
    assert cuda_cluster._Arguments.bias.offset == 3 * 128
    assert cuda_cluster._Arguments.rows.offset == 3 * 128 + 7 * 8


class Decoder:
    """In place of a decoder on a GPU: what it is told to use, and how long that would take."""

    dtype, device = torch.float16, "cuda"

    def __init__(self, shape: ModelConfig) -> None:
        self.config, self.used = shape, [default_tuning(shape, "cpu")]

    @property
    def tuning(self) -> Tuning:
        return self.used[-1]

    def use(self, tuning: Tuning) -> None:
        if any(tile.split == 4 for tile in tuning.cluster.get("32", {}).values()):
            raise CompilerUnavailable("four do not compile")
        self.used.append(tuning)

    def milliseconds(self) -> float:
        tiles = self.tuning.cluster.get("32")
        if tiles is None:
            return 1.0
        return 0.8 + 0.1 * sum(tile.split == 1 for tile in tiles.values())


@pytest.fixture
def measured(monkeypatch):
    from porttool.engines.torch import cuda_tune

    monkeypatch.setattr(cuda_tune, "stageable", lambda *a: False)
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


def made_with(case: str, dtype: torch.dtype, tile: ClusterTile, slots: int):  # type: ignore[no-untyped-def]
    """Return the decoder under test, the reference and its cache; unset memory is NaN."""
    shape = shape_of(case)
    plain = cases.drawn(shape, dtype, "cuda")
    tuning = with_clusters(shape, "cuda", tile).as_dict()
    made = cuda.CudaDecoder(shape, plain.state_dict(), dtype=dtype,
                            limits=cases.limits(slots, 200), tuning=tuning)  # fmt: skip
    assert "products of several rows in clusters" in made.description
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    for n in (16, 32, 48, 64, 128, slots):
        if n <= max(slots, 16):
            for tensor in tensors_of(made._scratch_of(n)).values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return made, plain, KVCache(shape, slots, 200, dtype=torch.float64, device="cuda")


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("n", [3, 16, 27, 64, 150])
    @pytest.mark.parametrize("tile", TILES, ids=str)
    @pytest.mark.parametrize("case", list(SHAPES))
    def test_logits(self, case: str, tile: ClusterTile, n: int) -> None:
        dtype = torch.bfloat16 if n == 27 else torch.float16
        if shape_of(case).gated:  # two halves need twice the room
            tile = replace(tile, block_n=64)
        made, plain, cache = made_with(case, dtype, tile, n)
        lengths = [1 + 7 * i % 23 for i in range(n)]
        first = Step.prefill(prompts(lengths))
        made.step(first), cases.reference(plain, cache, first)
        for i in range(2):
            starts = [length + i for length in lengths]
            step = cases.one_token(list(range(n)), torch.arange(n) + i, starts)
            wanted = cases.reference(plain, cache, step)
            assert cases.relative_error(made.step(step), wanted) < TOLERANCE[dtype]

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_a_row_has_the_same_bits_in_any_small_batch(self, tile: ClusterTile) -> None:
        made, _, _ = made_with("multi-query", torch.float16, tile, 16)
        cases.assert_same_bits_in_any_batch(made)

    @pytest.mark.parametrize("n", [5, 40, 128])
    def test_tokens_repeat_and_equal_single_steps(self, n: int) -> None:
        made, _, _ = made_with("gated rotary", torch.float16, TILES[1], n)
        lengths = [20 + i % 5 for i in range(n)]
        made.step(Step.prefill(prompts(lengths)))
        begin = cases.one_token(list(range(n)), torch.arange(n), lengths)
        tokens = made.decode(begin, 40).cpu()
        assert torch.equal(made.decode(begin, 40).cpu(), tokens)
        fed = torch.arange(n)
        for i in range(40):
            step = cases.one_token(list(range(n)), fed, [length + i for length in lengths])
            fed = made.step(step).argmax(-1).cpu()
            assert torch.equal(fed, tokens[:, i])

    def test_tiles_are_measured(self) -> None:
        from porttool.engines.torch.cuda_tune_cluster import cluster_leaders

        found = cluster_leaders(shape_of("multi-query", d_model=2048, d_ff=8192, n_head=16),
                                dtype=torch.float16, rows=32, device="cuda")  # fmt: skip
        assert all(1 <= len(tiles) <= 3 for tiles in found.values())

    def test_without_a_graph_it_is_the_same(self) -> None:
        made, _, _ = made_with("learned", torch.float16, TILES[2], 20)
        made.step(Step.prefill(prompts([9] * 20)))
        step = cases.one_token(list(range(20)), torch.arange(20), [9] * 20)
        wanted = made.step(step)
        made.graphed = False
        assert torch.equal(made.step(step), wanted)


def test_rows_of_a_tile_cover_every_batch() -> None:
    assert {tile_rows(n) for n in range(2, 300)} == {16, 32, 64, 128}
