"""Greedy tokens of ONNX engines on a CPU: those of the highest logits, without all logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import drawn
from drawn import prompts, step_of
from porttool.config import Limits, Sampling
from porttool.engines.native import head, library
from porttool.generate import generate
from porttool.plugins import load_registry
from porttool.runner import load_runner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMITS = Limits(max_batch_size=5, max_input_len=30, max_output_len=18, max_prompt_rows=4)
compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")


def varied(shape):
    """Drawn weights without biases, which prefer the same few tokens everywhere."""
    weights = drawn.weights(drawn.shape(shape))
    return {name: 0 * w if name.endswith("bias") else w for name, w in weights.items()}


def runners(folder, tensors, shape="gpt2", *, options=None, **settings):
    """An ONNX engine's runner and the torch engine's, of the same weights."""
    checkpoint = drawn.checkpoint(folder / "checkpoint", drawn.shape(shape), tensors)
    found = []
    for kind, built, loaded in (("onnx", options, settings), ("torch", None, {})):
        engine = drawn.engine(
            checkpoint, folder / kind, kind=kind, options=built, limits=LIMITS, dtype="float32"
        )
        found.append(load_runner(engine, load_registry(), {"device": "cpu", **loaded}))
    return found


def follow(runner, rows, slots, n, *, greedy):
    """Feed prompts, then n tokens: as `decode` chooses them, or by the highest logits.

    Each is moved on by a few ids before it is fed: drawn models repeat themselves.
    """
    first = step_of(rows, slots, [0] * len(rows))
    tokens = runner.step(first).argmax(-1)[:, None]
    for i in range(n):
        starts = [len(row) + i for row in rows]
        step = step_of(((tokens[:, -1:] + 31 * i) % 211).tolist(), slots, starts)
        found = runner.decode(step, 1) if greedy else runner.step(step).argmax(-1)[:, None]
        tokens = torch.cat((tokens, found), 1)
    return tokens.tolist()


@compiled
@pytest.mark.parametrize("cache", ["scatter", "concat"])
@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_the_tokens_of_the_highest_logits_and_of_torch(tmp_path, shape, cache):
    weights = varied(shape)
    onnx, native = runners(tmp_path, weights, shape, options={"cache": cache}, threads=2)
    assert onnx.description.endswith("compiled greedy choice")
    rows, slots = prompts(4, 9, 2, 14), [3, 0, 4, 1]  # not side by side: rows are moved
    chosen = follow(onnx, rows, slots, 8, greedy=True)
    assert chosen == follow(onnx, rows, slots, 8, greedy=False)
    assert chosen == follow(native, rows, slots, 8, greedy=True)
    assert len({token for row in chosen for token in row}) > 9


@compiled
def test_prompt_table(tmp_path):
    onnx, native = runners(tmp_path, varied("gpt2"))
    table = torch.randn(3, 56, generator=torch.Generator().manual_seed(1))
    for runner in (onnx, native):
        runner.load_prompt_table(table)
    rows = [[211, 212, 213, 5], [7, 213]]
    chosen = follow(onnx, rows, [0, 1], 6, greedy=True)
    assert chosen == follow(native, rows, [0, 1], 6, greedy=True)
    onnx.load_prompt_table(None)
    without = follow(onnx, [[0, 0, 0, 5], [7, 0]], [0, 1], 6, greedy=True)
    assert without != chosen


@compiled
def test_equal_logits_go_to_the_lowest_id(tmp_path):
    weights = varied("gpt2")
    likely = weights["embedding.weight"][7].clone()
    weights["embedding.weight"][7:] = likely
    weights["norm.bias"] = 5 * likely
    onnx, _ = runners(tmp_path, weights)
    for token in range(0, 211, 30):
        step = step_of([[token]], [0], [0])
        logits = onnx.step(step)[0]
        assert (logits == logits.max()).sum() == 204
        assert onnx.decode(step, 1).item() == 7


@compiled
@pytest.mark.parametrize("optimization", ["none", "basic"])
def test_any_optimization(tmp_path, optimization):
    weights = varied("gpt-next")
    onnx, native = runners(tmp_path, weights, "gpt-next", options={"optimization": optimization})
    rows = prompts(5, 3)
    chosen = follow(onnx, rows, [0, 1], 5, greedy=True)
    assert chosen == follow(native, rows, [0, 1], 5, greedy=True)


@compiled
def test_log_probabilities_come_with_the_same_tokens(tmp_path):
    """Whoever asks for more than tokens gets all logits, and the same tokens."""
    onnx, _ = runners(tmp_path, varied("gpt2"))
    ids, found = prompts(3, 9, 1, 14, 6, 2, 5), []
    for more in ({}, {"logprobs": True}, {"keep_logits": True}):
        rows = generate(onnx, ids, Sampling(max_new_tokens=9, **more), eos=(7, 40))
        found.append([row[0].tokens for row in rows])
        assert [bool(row[0].logprobs) for row in rows] == ["logprobs" in more] * len(ids)
    assert found[0] == found[1] == found[2]


def mapped_from(address):
    """The file that memory is mapped from, by the kernel's table."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split(maxsplit=5)[5:]
    return []


@compiled
@pytest.mark.parametrize("shape", ["gpt2", "gpt-next"])
def test_no_weight_is_held_twice(tmp_path, monkeypatch, shape):
    """One session has every weight of the graph, and the rows of the head are the file's."""
    from porttool.engines.onnx import runner as module

    made = []

    def make_session(model, settings, folder):
        made.append((model, settings))
        return usual(model, settings, folder)

    usual = module.make_session
    monkeypatch.setattr(module, "make_session", make_session)
    onnx, _ = runners(tmp_path, varied(shape), shape)
    assert len(made) == 1 and isinstance(made[0][0], bytes) and not made[0][1].spins
    assert len(made[0][0]) < 100_000  # its weights stay in their file
    file = onnx.engine.rank_path() / "model.safetensors"
    assert mapped_from(onnx._head.kept[0].data_ptr()) == [str(file)]


def test_float16_has_all_logits(tmp_path):
    config = drawn.shape("gpt2")
    checkpoint = drawn.checkpoint(tmp_path / "checkpoint", config, varied("gpt2"))
    engine = drawn.engine(checkpoint, tmp_path / "onnx", kind="onnx", dtype="float16")
    onnx = load_runner(engine, load_registry(), {"device": "cpu"})
    assert onnx.description.endswith("float16, scatter cache")
    rows = prompts(4, 2)
    chosen = follow(onnx, rows, [0, 1], 4, greedy=True)
    assert chosen == follow(onnx, rows, [0, 1], 4, greedy=False)


@pytest.mark.parametrize("asked", [True, False])
def test_without_compiled_code_it_is_said_why(tmp_path, monkeypatch, asked):
    library.load_library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "false")
    onnx, native = runners(tmp_path, varied("gpt2"), compiled=asked)
    library.load_library.cache_clear()
    reason = "false failed" if asked else "as asked"
    assert onnx.description.endswith(f"scatter cache, greedy from all logits ({reason})")
    rows = prompts(4, 9)
    chosen = follow(onnx, rows, [0, 1], 6, greedy=True)
    assert chosen == follow(native, rows, [0, 1], 6, greedy=False)


@compiled
def test_threads_change_nothing():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator) for n in (1000, 7))
    screened = head.ScreenedHead(weight)
    found = {tuple(screened.likeliest(x, threads).tolist()) for threads in (1, 2, 3, 50)}
    assert found == {tuple((x @ weight.T).argmax(-1).tolist())}


@pytest.mark.parametrize("value", [1.005, 1.2406, 1.8396])
def test_the_bound_holds_for_sums_in_any_order(value):
    """One after the other, all rounded to the same side; int8 loses nothing of such rows."""
    weight, x = torch.full((1, 4000), value), np.ones(4000, np.float32)
    coarse, scale, error = head.round_rows(weight)
    exact = float(weight.double().sum())
    summed = float(np.cumsum(weight[0].numpy() * x)[-1])
    assert abs(summed - exact) > 2e-5 * abs(exact)
    near = float(scale) * float(coarse.sum())
    assert abs(near - exact) < 1e-6 * abs(exact)
    assert abs(summed - near) <= float(error) * np.linalg.norm(x)
