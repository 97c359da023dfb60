"""The CUDA path on a GPU: the same numbers as the canonical decoder in float64, in any batch."""

from __future__ import annotations

import pytest
import torch

import cuda_cases as cases
from cuda_cases import GPU_SHAPES, TOLERANCE, prompts
from porttool.nn import KVCache, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def make(case: str, dtype: torch.dtype, n_slots: int = 40):  # type: ignore[no-untyped-def]
    """Return the decoder under test, the reference and its cache; unset memory is NaN."""
    from porttool.engines.torch.cuda import CudaDecoder

    shape = cases.config(case, **GPU_SHAPES[case])
    plain = cases.drawn(shape, dtype, "cuda")
    made = CudaDecoder(shape, plain.state_dict(), dtype=dtype,
                       limits=cases.limits(n_slots, 600))  # fmt: skip
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made, plain, KVCache(shape, n_slots, 600, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", list(GPU_SHAPES))
def test_logits(case: str, dtype: torch.dtype) -> None:
    made, plain, cache = make(case, dtype)
    lengths = [500, 37, 128, 1]
    steps = [
        Step.prefill(prompts(lengths), [4, 0, 2, 7]),
        cases.one_token([4, 0, 2, 7], torch.arange(4), lengths),
        cases.one_token([2], torch.tensor([5]), [129]),
        Step(torch.tensor([4, 2]), torch.arange(6).view(2, 3), torch.tensor([501, 130]),
             torch.tensor([3, 2])),
        Step.prefill(prompts([3 + i for i in range(40)], seed=2)),
        cases.one_token(list(range(40)), torch.arange(40), [3 + i for i in range(40)]),
    ]  # fmt: skip
    for step in steps:
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", list(GPU_SHAPES))
def test_a_row_is_the_same_bits_in_any_batch(case: str) -> None:
    made, _, _ = make(case, torch.float16)
    cases.assert_same_bits_in_any_batch(made)


@pytest.mark.parametrize("n", [1, 3, 33])
def test_greedy_tokens_repeat_and_equal_single_steps(n: int) -> None:
    made, _, _ = make("gated rotary", torch.float16)
    lengths = [20 + i for i in range(n)]
    made.step(Step.prefill(prompts(lengths)))
    begin = cases.one_token(list(range(n)), torch.arange(n), lengths)
    found = made.decode(begin, 19)
    assert torch.equal(found, made.decode(begin, 19))
    step, singles = begin, []
    for _ in range(19):
        best = made.step(step).argmax(-1).cpu()
        singles.append(best)
        step = cases.one_token(list(range(n)), best, (step.starts + 1).tolist())
    assert torch.equal(found.cpu(), torch.stack(singles, dim=1))


@pytest.mark.parametrize("case", ["learned", "multi-query"])
def test_heads_smaller_than_a_matrix_unit(case: str) -> None:
    """Tensor cores multiply 16 elements at least: narrower heads are padded, not refused."""
    from porttool.engines.torch.cuda import CudaDecoder

    shape = cases.config(case, head_dim=8, d_model=cases.config(case).n_head * 8)
    plain = cases.drawn(shape, torch.float16, "cuda")
    made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float16,
                       limits=cases.limits(4, 40))  # fmt: skip
    cache = KVCache(shape, 4, 40, dtype=torch.float64, device="cuda")
    for step in (Step.prefill([[3, 1, 2] * 7, [5]]), cases.one_token([1], torch.tensor([8]), [1])):
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < TOLERANCE[torch.float16]


def test_graphs_equal_plain_launches() -> None:
    made, _, _ = make("learned", torch.float16)
    made.step(Step.prefill(prompts([30, 9, 60])))
    step = cases.one_token([0, 1, 2], torch.arange(3), [30, 9, 60])
    graphed = made.step(step).clone()
    made.graphed = False
    assert torch.equal(made.step(step), graphed)


def test_tuning_travels_as_data() -> None:
    import json

    from porttool.engines.torch.cuda import CudaDecoder
    from porttool.engines.torch.cuda_tune import tune

    shape = cases.config("learned", **GPU_SHAPES["learned"])
    found = json.loads(json.dumps(tune(shape, dtype=torch.float16, batch_sizes=(1, 20))))
    plain = cases.drawn(shape, torch.float16, "cuda")
    made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float16,
                       limits=cases.limits(20, 600), tuning=found)  # fmt: skip
    cache = KVCache(shape, 20, 600, dtype=torch.float64, device="cuda")
    step = Step.prefill(prompts([33] * 20))
    assert cases.relative_error(made.step(step), cases.reference(plain, cache, step)) < 6e-3
    step = cases.one_token([3], torch.tensor([8]), [33])
    assert cases.relative_error(made.step(step), cases.reference(plain, cache, step)) < 6e-3
