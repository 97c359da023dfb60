"""Attention of prompts for Hopper GPUs: its source run on a CPU thread by thread, and on a GPU.

`tests/hopper/` stands in place of the machine's instructions: rings, queries that come ahead,
products of a warpgroup and the drawing of items run as they are written, in an order drawn at
random.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import cuda_cases as cases
from cuda_prompt_cases import TOLERANCE, Case, Emulated, Hung, error
from hopper_emulation import described, needs_compiler
from porttool.engines.torch import cuda_fallback, cuda_hopper
from porttool.engines.torch import cuda_prompt_attention as attention
from porttool.engines.torch.cuda_prompt_attention import PromptAttention, items_together
from porttool.nn import Step

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
HEADS = [(2, 2, 64), (2, 2, 128), (6, 2, 64), (16, 1, 128), (48, 1, 64), (12, 3, 128)]
ROWS = [(0, 5), (7, 200), (90, 1), (0, 64)]
SHORT = [(0, 5), (90, 30), (0, 1)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the emulation in place of a GPU of two multiprocessors."""
    monkeypatch.setattr(cuda_hopper, "load", Emulated)
    monkeypatch.setattr(attention, "tensor_map", described)
    monkeypatch.setattr(attention, "programs_of", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("heads", "dtype"), list(zip(HEADS, [torch.float16, torch.bfloat16] * 3, strict=True))
)
def test_every_kind_of_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Right, in the second layer; nothing is left behind, and a row alone has the same bits."""
    n_head, n_kv_head, head_dim = heads
    case = Case(
        SHORT if n_head > 2 else ROWS, dtype, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim
    )
    made = PromptAttention(case.config, case.cache)
    found = case.run(made)
    assert error(found, case.wanted()) < TOLERANCE[dtype]
    assert torch.equal(case.run(made), found)  # numbers are drawn from the beginning again
    part = slice(5, 5 + case.lengths[1])
    case.query, case.slots = case.query[part], case.slots[1:2]
    case.starts, case.lengths = case.starts[1:2], case.lengths[1:2]
    assert torch.equal(case.run(made), found[part])


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
def test_rows_that_see_no_key_are_left_alone() -> None:
    """As a single token's padding is: it would come before the first position."""
    case = Case([(5, 1), (-1, 1), (9, 1), (-1, 1)], torch.float16, n_head=2, n_kv_head=2,
                head_dim=64)  # fmt: skip
    made = PromptAttention(case.config, case.cache)
    for _ in range(2):
        found = case.run(made)
        assert error(found[::2], case.wanted()[::2]) < TOLERANCE[torch.float16]
        assert bool(found[1::2].isnan().all())


BROKEN = {
    "keys and values are read before they came":
        "«barrier_wait(shared_address(&s.full[copy % RING]), copy / RING & 1);»",
    "a full slot is filled again":
        "«barrier_wait(shared_address(&s.empty[i]), (copy / RING & 1) ^ 1);»",
    "queries are read before they came":
        "«barrier_wait(shared_address(&s.asked[items % 2]), items / 2 & 1);»",
    "queries are replaced while they are read":
        "«barrier_wait(shared_address(&s.taken[items % 2]), (items / 2 & 1) ^ 1);»",
    "queries are never given back":
        "«if (lane == 0) barrier_arrive(shared_address(&s.taken[items % 2]), 1);»",
    "a slot is given back by a lane ahead of the others": "«__syncwarp();»\n        if (lane == 0)",
    "values behind the end count": "«if (first + BLOCK_T > item.end)\n                "
        "clear_rest(s.ring[(copies + 1) % RING], item.end - first, team);»",
    "queries see what follows":
        "«if (first + BLOCK_T - 1 > plain) mask(scores, first, item.begin);»",
    "sums are not shrunk": "«run.sum[j] *= shrink, run.sum[j + 1] *= shrink;»",
    "the last draw does not reset the count": "«if (draw == draws + gridDim.x - 1) *a.drawn = 0;»",
    "products are not awaited":
        "«await_products<0>();»\n            pinned(run.sum), pinned(scores);",
    "a slot that a team needs not is kept":
        "«for (; copies < end; ++copies) await(copies), give_back(copies);»",
}  # fmt: skip
SEEDS = range(6)


@pytest.fixture(scope="module")
def case() -> Case:
    """Rows that need a ring of eight slots once and a half, and teams without queries."""
    return Case([(0, 5), (500, 100), (3, 70)], torch.float16, n_head=2, n_kv_head=1, head_dim=64,
                capacity=604)  # fmt: skip


@pytest.fixture
def breaking(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the emulation leave statements out."""
    monkeypatch.setattr(Emulated, "leaving", tuple(BROKEN.values()))
    return monkeypatch


def wrong(case: Case, breaking: pytest.MonkeyPatch, seed: int, left_out: int = -1) -> bool:
    """Whether one of two runs hangs or gives wrong numbers."""
    breaking.setattr(Emulated, "seed", seed)
    breaking.setattr(Emulated, "left_out", left_out)
    made = PromptAttention(case.config, case.cache)
    try:
        found = [case.run(made) for _ in range(2)]
    except Hung:
        return True
    return not all(error(out, case.wanted()) < TOLERANCE[torch.float16] for out in found)


@needs_compiler
def test_the_emulation_finds_nothing_in_what_is_right(case, breaking) -> None:
    assert not any(wrong(case, breaking, seed) for seed in SEEDS)


@needs_compiler
@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str, case, breaking) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    assert any(wrong(case, breaking, seed, list(BROKEN).index(what)) for seed in SEEDS)


def test_draws_stay_few() -> None:
    """Where most items have no queries, as in a graph, a draw has several."""
    assert items_together(rows=16, blocks=8, filled=16 * 7) == 1
    assert items_together(rows=1, blocks=3, filled=2) == 1
    assert items_together(rows=64, blocks=8, filled=8) == 7
    assert items_together(rows=1024, blocks=128, filled=128) == 32


def test_keys_that_are_read_together() -> None:
    assert [attention.evenly(n, 51) for n in (1, 51, 52, 352)] == [1, 51, 26, 51]


def test_few_tokens_are_left_to_smaller_programs() -> None:
    """Two items for each of 132 multiprocessors; 128 queries an item."""
    made = PromptAttention.__new__(PromptAttention)
    made._config = cases.config("learned", n_head=32, n_kv_head=32, head_dim=128)
    made._shape, made._multiprocessors = attention._SHAPES[128], 132
    assert [made.suits(n) for n in (512, 9 * 128 - 1, 9 * 128)] == [False, False, True]
    made._config = cases.config("learned", n_head=48, n_kv_head=1, head_dim=128)
    assert [made.suits(n) for n in (512, 704)] == [False, True]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"head_dim": 80}, "80 elements, not 64 or 128"), ({"d_model": 100}, "no multiple of 8")],
)
def test_what_it_does_not_run(changed: dict[str, int], reason: str) -> None:
    found = attention.unfit(cases.config("learned", **({"head_dim": 64} | changed)))
    assert reason in (found or "")


def test_an_engine_says_why_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the GPU would suit, and the kernel cannot be compiled."""
    config = cases.config("learned", head_dim=64)
    cache = SimpleNamespace(keys=torch.zeros(0, dtype=torch.float16))
    monkeypatch.setattr(cuda_hopper, "unsuited", lambda *_: None)
    monkeypatch.setattr(cuda_hopper, "refusal", lambda *_, **__: "no compiler")
    found = cuda_fallback.prompt_attention(config, cache, "cuda")
    assert found == (None, ", no Hopper attention of prompts: no compiler")
    monkeypatch.undo()
    assert cuda_fallback.prompt_attention(config, cache, "cpu") == (None, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [*HEADS, (25, 25, 64), (48, 1, 128)])
@pytest.mark.parametrize(
    "rows", [ROWS, [(i * 53 % 400, i * 389 % 900 + 1) for i in range(17)], [(0, 924)] * 4]
)
class TestOnAGpu:
    pytestmark = on_gpu

    def test_right_and_the_same_bits_alone(self, rows, heads, dtype) -> None:
        n_head, n_kv_head, head_dim = heads
        case = Case(rows, dtype, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim,
                    capacity=1320, device="cuda")  # fmt: skip
        made = PromptAttention(case.config, case.cache)
        found = case.run(made)
        assert error(found, case.wanted()) < TOLERANCE[dtype]
        end = sum(case.lengths[:2])
        part = slice(end - case.lengths[1], end)
        case.query, case.slots = case.query[part].contiguous(), case.slots[1:2]
        case.starts, case.lengths = case.starts[1:2], case.lengths[1:2]
        assert torch.equal(case.run(made), found[part])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["learned", "multi-query"])
class TestInADecoder:
    pytestmark = on_gpu

    def test_logits_beside_the_other_attention(self, name, dtype, monkeypatch) -> None:
        """Prompts of several lengths, and more behind them, from graphs and without."""
        from porttool.engines.torch.cuda import CudaDecoder

        shape = cases.config(name, **cases.GPU_SHAPES[name])
        weights = cases.drawn(shape, dtype, "cuda").state_dict()
        found = []
        for rounds in (0, 1 << 30):
            monkeypatch.setattr(attention, "ROUNDS", rounds)
            made = CudaDecoder(shape, weights, dtype=dtype, limits=cases.limits(6, 500))
            assert "Hopper attention of prompts" in made.description
            steps = [Step.prefill(cases.prompts([300, 7, 1, 190, 64, 411]))] * 3
            later = Step.prefill(cases.prompts([80, 33]))
            steps.append(Step(torch.tensor([3, 1]), later.tokens, torch.tensor([190, 7]),
                              later.lengths))  # fmt: skip
            found.append([
                made.step(step, all_positions=every).clone() for every in (True, False)
                for step in steps
            ])  # fmt: skip
        for ours, other in zip(*found, strict=True):
            assert cases.relative_error(ours, other.double().cpu()) < cases.TOLERANCE[dtype]
