"""Products in clusters on a GPU: logits, bits, tokens, and where no work was given to it before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import cuda_cases as cases
from cuda_cases import TOLERANCE, prompts
from cuda_cluster_cases import SHAPES, TILES, shape_of, tensors_of, with_clusters
from porttool.engines.torch import cuda
from porttool.engines.torch.cuda_tuning import ClusterTile
from porttool.nn import KVCache, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def made_with(  # type: ignore[no-untyped-def]
    case: str, dtype: torch.dtype, tile: ClusterTile, slots: int, *, tiny: bool = False
):
    """Return the decoder under test, the reference and its cache; unset memory is NaN.

    With `tiny` the residual stream is a thousandth, and norms scale by a hundredth.
    """
    shape = shape_of(case)
    plain = cases.drawn(shape, dtype, "cuda")
    if tiny:
        for name, parameter in plain.named_parameters():
            if "norm" in name or "embedding" in name or "position" in name:
                parameter.mul_(2.0**-7 if "norm" in name else 2.0**-10)
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


@pytest.mark.parametrize("n", [3, 16, 27, 64, 150])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", list(SHAPES))
def test_logits(case: str, tile: ClusterTile, n: int) -> None:
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
def test_a_row_has_the_same_bits_in_any_small_batch(tile: ClusterTile) -> None:
    made, _, _ = made_with("multi-query", torch.float16, tile, 16)
    cases.assert_same_bits_in_any_batch(made)


@pytest.mark.parametrize("n", [5, 40, 128])
def test_tokens_repeat_and_equal_single_steps(n: int) -> None:
    made, _, _ = made_with("gated rotary", torch.float16, TILES[1], n)
    cases.assert_tokens_repeat_and_equal_single_steps(made, [20 + i % 5 for i in range(n)])


def test_it_runs_where_no_work_was_given_to_the_gpu_before() -> None:
    """The runner's weights come from other threads: this one has no context of CUDA yet."""
    source = f"""
import sys, threading
sys.path[:0] = {sys.path!r}
import torch
import cuda_cases as cases
import cuda_cluster_cases as t
from porttool.engines.torch.cuda import CudaDecoder
shape = t.shape_of("learned")
weights = cases.drawn(shape, torch.float16).half().state_dict()
def move():
    for name in list(weights):
        weights[name] = weights[name].cuda()
thread = threading.Thread(target=move)
thread.start(), thread.join()
tuning = t.with_clusters(shape, "cuda", t.TILES[1]).as_dict()
made = CudaDecoder(shape, weights, dtype=torch.float16, limits=cases.limits(20, 64), tuning=tuning)
print(made.description)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert "products of several rows in clusters" in done.stdout, done.stdout + done.stderr


def test_tiny_scales_and_rows_keep_their_precision() -> None:
    made, plain, cache = made_with("learned", torch.float16, TILES[1], 20, tiny=True)
    first = Step.prefill(prompts([9] * 20))
    made.step(first), cases.reference(plain, cache, first)
    step = cases.one_token(list(range(20)), torch.arange(20), [9] * 20)
    wanted = cases.reference(plain, cache, step)
    assert cases.relative_error(made.step(step), wanted) < TOLERANCE[torch.float16]


def test_tiles_are_measured() -> None:
    from porttool.engines.torch.cuda_tune_cluster import cluster_leaders

    found = cluster_leaders(shape_of("multi-query", d_model=2048, d_ff=8192, n_head=16),
                            dtype=torch.float16, rows=32, device="cuda")  # fmt: skip
    assert all(1 <= len(tiles) <= 3 for tiles in found.values())


def test_without_a_graph_it_is_the_same() -> None:
    made, _, _ = made_with("learned", torch.float16, TILES[2], 20)
    made.step(Step.prefill(prompts([9] * 20)))
    step = cases.one_token(list(range(20)), torch.arange(20), [9] * 20)
    wanted = made.step(step)
    made.graphed = False
    assert torch.equal(made.step(step), wanted)
