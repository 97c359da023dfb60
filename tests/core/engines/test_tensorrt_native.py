"""For whoever has TensorRT and a GPU: `pytest -m tensorrt`. Never run by the authors.

The real library against the canonical decoder: every flag, ragged batches, a cache that is partly
filled with what another row left behind, and one token a row (where fused attention with cache
lengths has been wrong in TensorRT 11.1 and 11.2, which is why the graph has a mask).
"""

from __future__ import annotations

import pytest
import torch

import drawn
from drawn import prompts, step_of
from porttool.config import Limits, Sampling
from porttool.generate import generate
from porttool.nn import KVCache
from porttool.plugins import load_registry
from porttool.runner import load_runner

pytestmark = pytest.mark.tensorrt

LIMITS = Limits(max_batch_size=3, max_input_len=30, max_output_len=18, max_prompt_rows=4)
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}


def engine_of(folder, shape, dtype, **options):
    config = drawn.shape(shape)
    checkpoint = drawn.checkpoint(folder / "checkpoint", config, drawn.weights(config))
    engine = drawn.engine(
        checkpoint, folder / "engine", kind="tensorrt", limits=LIMITS, dtype=dtype,
        options=options,
    )  # fmt: skip
    return config, engine


@pytest.mark.parametrize("options", [{}, {"cache": "concat"}, {"static_batch": False}])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_logits(tmp_path, shape, dtype, options):
    config, engine = engine_of(tmp_path, shape, dtype, **options)
    runner = load_runner(engine, load_registry())
    reference = drawn.decoder(config, drawn.weights(config))
    cache = KVCache(config, 3, 50, dtype=torch.float64)
    for step in (
        step_of(prompts(30, 30, 30), [0, 1, 2], [0, 0, 0]),  # fills the cache with leftovers
        step_of(prompts(3, 8), [2, 0], [0, 0]),
        step_of([[5], [6]], [2, 0], [3, 8]),
        step_of([[5], [7], [6]], [2, 1, 0], [4, 30, 9]),
        step_of([[5, 1, 2], [6]], [2, 0], [5, 10]),
    ):
        wanted = reference(step, cache)
        got = runner.step(step, all_positions=True).cpu().double()
        real = torch.arange(step.tokens.shape[1]) < step.lengths[:, None]
        scale = max(1.0, float(wanted[real].std()))
        atol = TOLERANCE[dtype] * scale
        torch.testing.assert_close(got[real], wanted[real], rtol=0, atol=atol)


def test_same_tokens_as_torch(tmp_path):
    _, engine = engine_of(tmp_path, "gpt2", "float32")
    registry = load_registry()
    from porttool.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    plain = drawn.engine(checkpoint, tmp_path / "torch", limits=LIMITS)
    ids = prompts(3, 9, 1, 14)
    sampling = Sampling(max_new_tokens=9)
    mine, theirs = (
        [[c.tokens for c in row] for row in generate(r, ids, sampling, eos=(7,))]
        for r in (load_runner(engine, registry), load_runner(plain, registry, {"device": "cpu"}))
    )
    assert mine == theirs
