"""Prompts of few tokens: padded, and replayed from graphs, with the bits of plain launches.

On a CPU the kernels run under Triton's interpreter, and what a graph would replay runs again: that
covers what may not change between capture and replay. On a GPU the graphs are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import cuda_cases as cases
from cuda_cases import GPU_SHAPES, TOLERANCE, prompts
from porttool.engines.torch import cuda_prefill, cuda_prefill_graph, cuda_prompts
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_packed import Packed
from porttool.engines.torch.cuda_prefill import (
    Prompt,
    Together,
    _mlp_width,
    _parts,
    make_buffers,
    prefill_bytes,
    tokens_together,
)
from porttool.engines.torch.cuda_prefill_graph import (
    GRAPH_TOKENS,
    KEPT,
    Size,
    padded_size,
    padded_tokens,
    suits_graph,
)
from porttool.engines.torch.cuda_prompts import run_launched
from porttool.nn import KVCache, Step

on_cpu = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's tests cover these there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class Again:
    """In place of a graph: replaying runs the captured launches once more."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put the double in place of capturing; how many graphs each capture found beside it."""
    seen: list[int] = []

    def capture(work: Callable[[], None], beside: Sequence[Again]) -> Again:
        seen.append(len(beside))
        return Again(work)

    monkeypatch.setattr(cuda_prefill_graph, "capture", capture)
    return seen


def make(
    case: str, *, graphs: bool, dtype: torch.dtype = torch.float32, **changes: int
) -> CudaDecoder:
    """Return a decoder whose unset memory is NaN; on a CPU it can only pretend to have graphs."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    shape = cases.config(case, **((GPU_SHAPES[case] if gpu else {"n_layer": 1}) | changes))
    weights = cases.drawn(shape, dtype, device).state_dict()
    size = cases.limits(8, 600) if gpu else cases.limits(4, 60)
    made = CudaDecoder(shape, weights, dtype=dtype, limits=size, device=device, graphs=graphs)
    made.graphed = graphs
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made


@torch.inference_mode()
def poison(made: CudaDecoder) -> None:
    """Leave nothing in the buffers that a former prompt wrote."""
    held = made._prompts.graphs
    for tensor in held._buffers:
        tensor.fill_(float("nan"))
    held._inputs.fill_(-1)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits, for NaN equals itself in them."""
    return tensor.view(torch.uint8).cpu()


def continued(slot: int, tokens: list[int], start: int) -> Step:
    """Return the step that feeds more tokens to one slot."""
    return Step(torch.tensor([slot]), torch.tensor([tokens]), torch.tensor([start]),
                torch.tensor([len(tokens)]))  # fmt: skip


def run(made: CudaDecoder, steps: list[tuple[Step, bool]]) -> list[Tensor]:
    """Return each step's logits, of all positions where it says so; buffers poisoned before."""
    out = []
    for step, every in steps:
        poison(made)
        out.append(made.step(step, all_positions=every))
    return out


def assert_same(one: CudaDecoder, other: CudaDecoder, steps: list[tuple[Step, bool]]) -> None:
    """Both decoders give the same bits and leave the same cache, poison included.

    The second has no graphs and captures none.
    """
    for found, wanted in zip(run(one, steps), run(other, steps), strict=True):
        assert torch.isfinite(found).all()
        assert torch.equal(found, wanted)
    for mine, theirs in zip(vars(one.model.cache).values(), vars(other.model.cache).values(),
                            strict=True):  # fmt: skip
        assert torch.equal(bits(mine), bits(theirs))
    assert not other._prompts.graphs._graphs


def test_padding_is_bounded() -> None:
    sizes = {n: padded_tokens(n) for n in range(17, GRAPH_TOKENS + 1)}
    assert all(n <= size < n + (16 if n <= 64 else 64) for n, size in sizes.items())
    assert max(sizes.values()) == GRAPH_TOKENS
    assert len(set(sizes.values())) < KEPT  # prompts alone forget no size of theirs


def test_what_waits_for_the_gpu_is_not_padded() -> None:
    """Widths of GPT-2 XL, camel-5b and StarCoder: a layer of 31, 201 and 378 million weights."""
    xl, camel, star = (
        cases.config("learned", n_head=1, n_kv_head=1, head_dim=wide, d_model=wide, d_ff=4 * wide)
        for wide in (1600, 4096, 5616)
    )
    assert suits_graph(xl, GRAPH_TOKENS, 2)
    assert not suits_graph(xl, GRAPH_TOKENS + 1, 2)
    assert suits_graph(camel, 128, 2)
    assert not suits_graph(camel, 530, 2)
    assert not suits_graph(star, 17, 2)


def test_what_need_not_be_padded_runs_from_a_graph() -> None:
    wide = cases.config(
        "learned", n_head=1, n_kv_head=1, head_dim=4096, d_model=4096, d_ff=4 * 4096
    )
    assert [n for n in range(400, 600) if suits_graph(wide, n, 2)] == [
        *range(435, 449), *range(497, 513), *range(559, 577)
    ]  # fmt: skip
    assert suits_graph(wide, 1024, 2) and not suits_graph(wide, 1025, 2)


def test_padding_belongs_to_no_slot_and_no_row() -> None:
    group = Packed(Step.prefill([[5, 6, 7], [8]], [4, 2]))
    found = group.padded(8, 4)
    tokens, positions, slots = found[:24].view(3, 8)
    assert tokens.tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert slots.tolist() == [4, 4, 4, 2, -1, -1, -1, -1]
    row_slots, starts, first = found[24:].view(3, 4)
    assert row_slots.tolist() == [4, 2, 0, 0] and starts.tolist() == [0] * 4
    assert first.tolist() == [0, 3, 4, 4]  # rows after the second are empty


@pytest.mark.parametrize("kept", [1e7, 1e9, 1e10, 1e11])
@pytest.mark.parametrize("case", list(cases.CASES))
def test_activations_take_their_share(case: str, kept: float) -> None:
    """Of memory where 4096 tokens need less; MLPs are whole where those fit, too."""
    c = cases.config(case, d_model=1600, n_head=20, head_dim=80, d_ff=6400,
                     n_kv_head={"multi-query": 1, "grouped rms": 4}.get(case, 20))  # fmt: skip
    tokens, mlp = tokens_together(c, int(kept), 2)
    taken = 2 * (tokens * 3200 + max(tokens * c.qkv_dim, mlp * _mlp_width(c)))
    assert 4096 <= tokens <= 16384 and 2048 <= mlp <= tokens
    if tokens > 4096:
        assert taken <= (0.025 if mlp == tokens else 0.02) * kept
    if kept == 1e11:
        assert tokens == mlp == 16384
    if kept == 1e7:
        assert tokens == 4096 and mlp == max(2048, 4096 * c.qkv_dim // _mlp_width(c))


def test_small_mlps_are_whole() -> None:
    """The host would take longer to launch another part of it than the GPU to run it."""
    small = cases.config("learned", d_model=768, n_head=12, n_kv_head=12, head_dim=64, d_ff=3072)
    assert tokens_together(small, 10**7, 2) == (4096, 4096)


@pytest.mark.parametrize(("n", "most"), [(1, 1), (7, 3), (16384, 12288), (5000, 2048), (513, 600)])
def test_parts_of_an_mlp(n: int, most: int) -> None:
    parts = [range(n)[part] for part in _parts(n, most)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) <= most and len(parts) <= -(-n // most)


def assert_groups_agree(
    made: CudaDecoder, lengths: list[int], bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in groups as long as the first three, their MLPs in parts; then continued.

    Both begin with rows of a prompt table.
    """

    def unset(like: Tensor, *shape: int, **options: Any) -> Tensor:
        return empty(like, *shape, **options).fill_(float("nan") if like.is_floating_point() else 7)

    def counted(*arguments: Any) -> None:
        parts.append(len(arguments[1]))
        whole(*arguments)

    empty, whole, parts = torch.Tensor.new_empty, cuda_prefill.activated_product, list[int]()
    monkeypatch.setattr(torch.Tensor, "new_empty", unset)
    monkeypatch.setattr(cuda_prefill, "activated_product", counted)
    monkeypatch.setattr(cuda_prompts, "suits_graph", lambda *_: False)
    shape = made.config
    together = made._prompts.together = Together(sum(lengths[:3]), 8)
    device = str(made.device)
    plain = cases.drawn(shape, made.dtype, device)
    cache = KVCache(shape, made.n_slots, made.max_len, dtype=torch.float64, device=device)
    table = torch.randn(3, shape.d_model, device=device) * 0.2
    plain.prompt_table = table.to(made.dtype).double()
    made.load_prompt_table(table)
    drawn = [[(7 * i + n) % 101 for i in range(n)] for n in lengths]
    for prompt in drawn:
        prompt[0] = shape.vocab_size + len(prompt) % 3
    slots = list(range(len(lengths)))[::-1]
    first = Step.prefill(drawn, slots)
    for step in (first, Step(first.slots, first.tokens, first.lengths, first.lengths)):
        wanted = plain(step.to(device), cache).cpu()
        seen = len(parts)
        found = made.step(step).cpu()
        groups = Packed(step).groups(together.tokens)
        whole_layer = sum(-(-group.n_tokens // 4) * 4 for group in groups)
        assert sum(parts[seen:]) == (shape.n_layer - 1) * whole_layer + len(lengths)
        every = made.step(step, all_positions=True).cpu()
        for i, n in enumerate(lengths):
            # of single positions bfloat16's own error in the canonical decoder is up to 0.066
            assert cases.relative_error(found[i], wanted[i, n - 1]) < 2 * bound
            assert cases.relative_error(every[i, :n], wanted[i, :n]) < bound
            assert not every[i, n:].any()
    assert not made._prompts.graphs._graphs
    room = make_buffers(made.model, together).wide.numel() // _mlp_width(shape)
    assert max(parts) <= room < together.tokens and len(parts) > 8 * shape.n_layer


class TestUnderTheInterpreter:
    """What runs before and around graphs, on a CPU."""

    pytestmark = on_cpu

    @pytest.mark.parametrize("case", list(cases.CASES))
    def test_groups_of_rows(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made = make(case, graphs=False, d_ff=640)
        assert_groups_agree(made, [9, 4, 11, 1], 2e-5, monkeypatch)

    @pytest.mark.parametrize(("case", "heads"), [("grouped rms", 8), ("multi-query", 32)])
    def test_heads_that_share_keys_share_a_program(
        self, case: str, heads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Four of them, or, of thirty-two, sixteen."""
        made = make(case, graphs=False, n_head=heads, head_dim=16, d_ff=640)
        assert_groups_agree(made, [9, 4, 11, 1], 2e-5, monkeypatch)

    def test_what_has_enough_to_do_has_an_attention_of_its_own(self) -> None:
        """Every layer of a prompt, but for its last tokens alone."""
        plain, made = (make("learned", graphs=False, n_layer=3) for _ in range(2))
        bound: list[tuple[int, int]] = []

        class Attention:
            def suits(self, n: int) -> bool:
                return n >= 40

            def bind(self, query: Tensor, prompt: Prompt, out: Tensor) -> Callable[[int], None]:
                def attend(layer: int) -> None:
                    bound.append((layer, len(query)))
                    cuda_prefill._attend(made.model, layer, query, prompt, out)

                return attend

        made._prompts = cuda_prompts.Prompts(replace(made.model, prompts=Attention()))
        for lengths in ([30, 13], [7, 11]):
            step = Step.prefill([list(range(n)) for n in lengths])
            for every in (False, True):
                assert torch.equal(made.step(step, all_positions=every),
                                   plain.step(step, all_positions=every))  # fmt: skip
        n = padded_tokens(43)
        assert bound == [(0, n), (1, n), (0, n), (1, n), (2, n)]

    @pytest.mark.parametrize("case", list(cases.CASES))
    def test_padded_equals_unpadded(self, case: str) -> None:
        padded, plain = make(case, graphs=False), make(case, graphs=False)
        step = Step.prefill([[i % 101 for i in range(3, 20)], [7, 1], [9]], [2, 0, 3])
        padded.step(continued(1, [5] * 33, 0))  # larger buffers than these need
        poison(padded)
        packed, size = Packed(step), Size(20, 3)
        wider = padded_size(packed)
        with torch.inference_mode():
            prompt = size.prompt(packed.padded(size.tokens, size.columns), packed.width)
            given = packed.padded(wider.tokens, wider.columns)
            for every, n in ((True, 20), (False, 3)):
                normed = run_launched(plain.model, prompt, None, Together(20, 20), every=every)
                graphs = padded._prompts.graphs
                found = graphs.run(wider, given, None, every=every, graphed=False)
                assert len(normed) == n and len(found) == (wider.tokens if every else wider.rows)
                torch.testing.assert_close(found[:n], normed, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(vars(padded.model.cache).values(),
                                vars(plain.model.cache).values(), strict=True):  # fmt: skip
            for slot, n in ((2, 17), (0, 2), (3, 1)):
                torch.testing.assert_close(
                    mine[:, slot, :, :n], theirs[:, slot, :, :n], rtol=1e-5, atol=1e-5
                )
                assert mine[:, slot, :, n:].isnan().all()

    def test_what_is_captured_is_read_again(self, captures: list[int]) -> None:
        """Other tokens, lengths, slots, starts and tables than when a size was captured."""
        long = [(7 * i) % 101 for i in range(60)]
        steps = [
            (Step.prefill([long[:30]], [3]), False),
            (Step.prefill([long[:17]], [1]), True),
            (continued(3, long[:29], 30), True),
        ]
        graphed, plain = make("grouped rms", graphs=True), make("grouped rms", graphs=False)
        assert_same(graphed, plain, steps)
        assert captures == [0]  # at the second of one size
        table = torch.randn(4, graphed.config.d_model) * 0.2
        virtual = [(Step.prefill([[104, 101, *long[:20]]], [2]), False)]
        for made in (graphed, plain):
            made.load_prompt_table(table)
        assert_same(graphed, plain, virtual)
        for made in (graphed, plain):
            made.load_prompt_table(None)
        assert_same(graphed, plain, steps[-1:])
        assert captures == [0, 1]  # the second leaves the last tokens' states alone

    def test_rows_share_the_sizes_of_powers_of_two(self, captures: list[int]) -> None:
        graphed, plain = make("multi-query", graphs=True), make("multi-query", graphs=False)
        steps = [
            (Step.prefill([[1, 2, 3] * 3, [4] * 9, [5] * 3], [2, 0, 3]), False),
            (Step.prefill([[9] * 5, [3] * 6, [2] * 7, [8] * 8], [1, 2, 3, 0]), False),
            (Step.prefill([[6] * 11, [1] * 11], [1, 2]), False),
        ]
        assert_same(graphed, plain, steps)
        assert captures == [0] and len(graphed._prompts.graphs._graphs) == 2

    def test_rows_of_one_token_are_no_more_than_tokens(self) -> None:
        """34 tokens are padded to 48, and 33 rows would be to 64."""
        shape = cases.config("grouped rms")
        plain = cases.drawn(shape, torch.float32)
        made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float32,
                           limits=cases.limits(33, 4), device="cpu", graphs=False)  # fmt: skip
        cache = KVCache(shape, 33, 4, dtype=torch.float64)
        step = Step.prefill([[i] for i in range(32)] + [[5, 6]])
        assert padded_size(Packed(step)) == (48, 48)
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < 2e-5

    def test_what_prompts_take_is_known_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Room for all that the cache holds, and for each row's last token."""
        made, taken, empty = make("gated rotary", graphs=False), list[int](), Tensor.new_empty

        def counted(like: Tensor, *shape: int, **options: Any) -> Tensor:
            taken.append(like.element_size() * math.prod(shape))
            return empty(like, *shape, **options)

        monkeypatch.setattr(Tensor, "new_empty", counted)
        monkeypatch.setattr(cuda_prompts, "suits_graph", lambda *_: False)
        made.step(Step.prefill([[1] * 60] * 4))
        kept = sum(part.nbytes for part in made.model.weights.linears())
        kept += made.model.cache.keys.nbytes + made.model.cache.values.nbytes
        assert sum(taken) == prefill_bytes(made.config, kept, 4, 4, 4 * 60)

    def test_several_padded_groups_of_a_step(self, captures: list[int]) -> None:
        """Each takes the buffers of the one before."""
        made = make("learned", graphs=True)
        plain = cases.drawn(made.config, torch.float32)
        made._prompts.together = Together(20, 20)
        cache = KVCache(made.config, 4, 60, dtype=torch.float64)
        step = Step.prefill([[3] * 18, [5] * 20, [7] * 17], [2, 0, 1])
        for _ in range(3):
            assert cases.relative_error(made.step(step), cases.reference(plain, cache, step)) < 2e-5
        assert len(captures) == 1

    def test_larger_prompts_take_larger_buffers(self, captures: list[int]) -> None:
        """Graphs of the old ones are captured anew, at the size's next prompt."""
        graphed, plain = make("learned", graphs=True), make("learned", graphs=False)
        short, long = Step.prefill([[4] * 20], [1]), Step.prefill([[6] * 40], [2])
        steps = [(step, False) for step in (short, short, long, short)]
        assert_same(graphed, plain, steps)
        assert captures == [0, 0]
        assert len(graphed._prompts.graphs._buffers.x) == 48 * graphed.config.d_model

    def test_sizes_used_longest_ago_are_forgotten(
        self, captures: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda_prefill_graph, "KEPT", 2)
        monkeypatch.setattr(cuda_prefill_graph, "prefill_layers", lambda *_, every: None)
        made = make("learned", graphs=True)
        short, two, three = (
            Step.prefill([[1] * 20]), Step.prefill([[1] * 10] * 2), Step.prefill([[1] * 7] * 3)
        )  # fmt: skip
        for step in (short, two, short, two):
            made.step(step)
        assert len(captures) == 2
        for step in (short, three, short):  # three takes the place of two
            made.step(step)
        assert len(captures) == 2
        made.step(two)
        assert len(captures) == 2 and len(made._prompts.graphs._graphs) == 2
        made.step(two)
        assert len(captures) == 3


@pytest.mark.parametrize("case", list(GPU_SHAPES))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
class TestGroups:
    """Prompts that run without graphs."""

    pytestmark = on_gpu

    def test_groups_of_rows(
        self, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {  # four and sixteen heads share a program
            "grouped rms": {"n_head": 8, "d_ff": 1000}, "multi-query": {"n_head": 32, "d_ff": 5000},
        }.get(case, {})  # fmt: skip
        made = make(case, graphs=True, dtype=dtype, **changes)
        assert_groups_agree(made, [120, 56, 280, 1, 66, 300], TOLERANCE[dtype], monkeypatch)


@pytest.mark.parametrize("case", list(GPU_SHAPES))
class TestGraphs:
    """Real graphs beside plain launches, bit for bit."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    def test_every_use_of_a_size(self, case: str, dtype: torch.dtype) -> None:
        """First, captured, replayed; several lengths of a size; then sizes in any order."""
        graphed, plain = (make(case, graphs=g, dtype=dtype) for g in (True, False))
        lengths = [128, 65, 100, 500, 512, 449, 17, 30, 32, 66, 128, 500, 17, 590, 590, 590, 128]
        lengths += [449, 449, 60]
        drawn = prompts(lengths)
        steps = [(Step.prefill([p], [i % 8]), i % 5 == 4) for i, p in enumerate(drawn)]
        assert_same(graphed, plain, steps)
        assert any(graph is not None for graph in graphed._prompts.graphs._graphs.values())

    def test_continued_prompts_and_others_between(self, case: str) -> None:
        graphed, plain = (make(case, graphs=g, dtype=torch.float16) for g in (True, False))
        parts = prompts([100, 120, 90, 120, 110, 60, 33])
        steps = []
        for _ in range(3):
            steps += [
                (Step.prefill([parts[0]], [3]), False),
                (Step.prefill([parts[1]], [5]), False),
                (continued(3, parts[2], 100), True),
                (continued(5, parts[3], 120), False),
                (continued(3, parts[4], 190), False),
                (Step.prefill([parts[5], parts[6], parts[2]], [0, 7, 2]), True),
                (cases.one_token([3], torch.tensor([9]), [300]), False),
            ]
        assert_same(graphed, plain, steps)

    def test_prompt_tables_come_and_go(self, case: str) -> None:
        graphed, plain = (make(case, graphs=g, dtype=torch.float16) for g in (True, False))
        virtual = list(range(1003, 1020))
        for i in range(4):
            table = torch.randn(17, graphed.config.d_model, device="cuda") * 0.2
            for made in (graphed, plain):
                made.load_prompt_table(table)
            assert_same(graphed, plain, [(Step.prefill([virtual + prompts([60])[0]], [i]), False)])
            for made in (graphed, plain):
                made.load_prompt_table(None)
            assert_same(graphed, plain, [(Step.prefill(prompts([77]), [i]), False)])

    def test_decoding_goes_on_between(self, case: str) -> None:
        """Graphs of decoded steps and of prompts share one capture stream, not their memory."""
        graphed, plain = (make(case, graphs=g, dtype=torch.float16) for g in (True, False))
        for i, prompt in enumerate(prompts([90, 70, 110, 128])):
            found: list[Any] = []
            for made in (graphed, plain):
                first = made.step(Step.prefill([prompt], [i])).argmax(-1).cpu()
                begin = cases.one_token([i], first, [len(prompt)])
                found.append(torch.cat((made.decode(begin, 20).cpu()[0], first)))
            assert torch.equal(*found)

    def test_logits(self, case: str) -> None:
        """Against the canonical decoder in float64, from the graph."""
        made = make(case, graphs=True, dtype=torch.float16)
        plain = cases.drawn(made.config, torch.float16, "cuda")
        cache = KVCache(made.config, 8, 600, dtype=torch.float64, device="cuda")
        for slot, prompt in enumerate(prompts([500, 470, 460, 512])):
            step = Step.prefill([prompt], [slot])
            wanted = cases.reference(plain, cache, step)
            assert cases.relative_error(made.step(step), wanted) < TOLERANCE[torch.float16]
