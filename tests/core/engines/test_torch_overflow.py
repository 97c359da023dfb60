"""What a row of a half-precision engine leaves in its slot when it overflows is nobody else's."""

from __future__ import annotations

import pytest
import torch

import drawn
from drawn import prompts, step_of
from porttool.config import Limits, Sampling
from porttool.generate import generate
from porttool.plugins import load_registry
from porttool.runner import load_runner

LIMITS = Limits(max_batch_size=5, max_input_len=30, max_output_len=18)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflow")
    made = drawn.overflowing(folder / "checkpoint")
    return drawn.engine(made, folder / "engine", limits=LIMITS, dtype="float16")


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"canonical": True}], ids=str)
def test_what_overflowed_in_a_row_stays_with_it(engine, options):
    """Token 205 has a value beyond float16: a later row in its slot does not see it.

    A shorter row is masked up to the longest one's reach, and 0 times infinity is no number.
    """
    runner = load_runner(engine, load_registry(), {"device": "cpu", **options})
    steps = [
        step_of(prompts(3, 9), [2, 4], [0, 0]),
        step_of([[5], [6]], [2, 4], [3, 9]),
        step_of(prompts(20, 18), [2, 4], [4, 10]),  # more than compiled code takes
    ]
    expected = [runner.step(step) for step in steps]
    assert all(logits.isfinite().all() for logits in expected)
    assert not runner.step(step_of([[205] * 30, [1]], [2, 3], [0, 0])).isfinite().all()
    runner.copy_slots([2], [4])
    runner.step(step_of([[5]], [4], [30]))
    for step, logits in zip(steps, expected, strict=True):
        torch.testing.assert_close(runner.step(step), logits)


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"canonical": True}], ids=str)
def test_what_overflowed_in_decoding_stays_with_its_row(engine, options):
    """Tokens that compiled code chose by itself lie in the cache, too."""
    steps = [
        step_of(prompts(3, 9), [2, 4], [0, 0]),
        step_of(prompts(2, 16), [2, 4], [3, 9]),  # more than compiled code takes
    ]
    runner, fresh = (
        load_runner(engine, load_registry(), {"device": "cpu", **options}) for _ in range(2)
    )
    runner.step(step_of([[1, 2]], [2], [0]))
    runner.decode(step_of([[205]], [2], [2]), 16)
    for step in steps:
        torch.testing.assert_close(runner.step(step), fresh.step(step))


@pytest.mark.parametrize("options", [{}, {"compiled": False}], ids=str)
def test_padding_that_overflows_is_not_seen(engine, options):
    """Which id stands for padding is nobody's business."""
    runner = load_runner(engine, load_registry(), {"device": "cpu", **options})
    step = step_of(prompts(3, 20), [2, 4], [0, 0])
    expected = runner.step(step)
    step.tokens[0, 3:] = 205
    torch.testing.assert_close(runner.step(step), expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_from_no_numbers_is_told_once(engine, caplog, beams):
    runner = load_runner(engine, load_registry(), {"device": "cpu"})
    sampling = Sampling(max_new_tokens=2, num_beams=beams)
    generate(runner, [[1, 2, 3]], sampling, eos=())
    assert not caplog.messages
    for _ in range(2):
        generate(runner, [[205] * 30, [1]], sampling, eos=())
    (message,) = caplog.messages
    assert message.startswith(f"{runner.engine.path}: logits are NaN or infinite")
    assert "beyond what float16 holds" in message
