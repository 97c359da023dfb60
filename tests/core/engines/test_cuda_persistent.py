"""The persistent kernel of single rows: CI compiles it for Hopper, GPUs run it.

`test_cuda_persistent_emulated.py` runs its source on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

import cuda_cases as cases
from cuda_cases import TOLERANCE, prompts
from porttool.config import ModelConfig
from porttool.engines.torch import cuda_compile
from porttool.engines.torch.cuda_candidates import persistent_candidates
from porttool.engines.torch.cuda_compile import CompilerUnavailable, compile_cubin
from porttool.engines.torch.cuda_persistent import compile_row, macros, plan_words, unfit, unsuited
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import PersistentTile, Tuning
from porttool.nn import KVCache, Step

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
_LONG = {"n_positions": 1024, "vocab_size": 1003}
SHAPES = {
    "learned": {"head_dim": 64, "d_model": 192, "d_ff": 1088, **_LONG},
    "multi-query": {"head_dim": 128, "d_model": 1600, "d_ff": 6400, **_LONG},
    "gated rotary": {"head_dim": 32, "d_model": 256, "d_ff": 704, **_LONG},
    "grouped rms": {"head_dim": 64, "d_model": 768, "d_ff": 3072, **_LONG},
}
TILES = [
    PersistentTile(24, 3, 4),
    PersistentTile(50, 2, 1, 2, 2),
    PersistentTile(7, 4, 8, 4, 4, 12),
]
HOPPER = 132  # multiprocessors of an H200


def shape_of(case: str, **changes: object) -> ModelConfig:
    return cases.config(case, **{**SHAPES[case], **changes})


@pytest.mark.parametrize("case", list(SHAPES))
def test_it_compiles_for_every_kind_of_model(case: str, compiler) -> None:
    for dtype, tile in zip((torch.float16, torch.bfloat16, torch.float16), TILES, strict=True):
        cubin = compile_row(shape_of(case), dtype, tile, HOPPER)
        assert cubin[:4] == b"\x7fELF"
        assert b"decode_row" in cubin


def test_compiled_code_is_kept_and_checked(compiler, monkeypatch) -> None:
    source = 'extern "C" __global__ void f(int* x) { *x = N; }'
    made = [compile_cubin(source, name="f", arch="sm_90a", macros={"N": 3})]
    monkeypatch.setattr(cuda_compile, "_compiled", lambda *a: made[0] + b"again")
    assert compile_cubin(source, name="f", arch="sm_90a", macros={"N": 3}) == made[0]
    (kept,) = compiler.rglob("f-*.cubin")
    for damaged in (b"", kept.read_bytes()[:-1]):
        kept.write_bytes(damaged)
        again = compile_cubin(source, name="f", arch="sm_90a", macros={"N": 3})
        assert again == made[0] + b"again"


def test_a_refused_source_says_why(compiler) -> None:
    with pytest.raises(CompilerUnavailable, match="nowhere"):
        compile_cubin("__device__ int f() { return nowhere; }", name="f", arch="sm_90a", macros={})


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (PersistentTile(400, 2, 1), "too little shared memory"),
        (PersistentTile(24, 40, 1), "that it has asked for"),
        (PersistentTile(24, 3, 67), "one part of a head"),
        (PersistentTile(24, 3, 1, 1), "keys, another for the values"),
        (PersistentTile(50, 2, 1, 4, 1), "which turn its next slot is in"),
        (PersistentTile(1, 2, 1, 2, 1, 1), "sets up the barriers"),
    ],
)
def test_tiles_that_would_hang_are_refused(compiler, tile: PersistentTile, reason: str) -> None:
    with pytest.raises(CompilerUnavailable, match=reason):
        compile_row(shape_of("learned", d_ff=12800), torch.float16, tile, HOPPER)


def test_a_warp_alone_is_refused_wide_heads(compiler) -> None:
    shape = shape_of("learned", n_head=4, n_kv_head=4, head_dim=128)
    with pytest.raises(CompilerUnavailable, match="two elements of a head"):
        compile_row(shape, torch.float16, PersistentTile(24, 2, 1, 4, 1, 1), HOPPER)
    assert compile_row(shape, torch.float16, PersistentTile(24, 2, 1, 4, 2, 2), HOPPER)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 20, "d_model": 192}, "divide a warp"),
        ({"d_ff": 1056}, "multiples of 64"),
        ({"d_model": 128}, "not every multiprocessor"),
        ({"vocab_size": 101}, "not every multiprocessor"),
        ({"n_head": 144, "n_kv_head": 1}, "144 heads"),
        ({"d_ff": 65536}, "more than its threads|no shared memory"),
    ],
)
def test_unfit_shapes_have_a_reason(changes: dict[str, object], reason: str) -> None:
    import re

    found = unfit(shape_of("learned", **changes), HOPPER)
    assert found is not None
    assert re.search(reason, found)


def test_what_is_unsuited() -> None:
    assert unfit(shape_of("learned"), HOPPER) is None
    assert "16-bit" in str(unsuited(shape_of("learned"), torch.float32, "cuda"))
    assert "Hopper" in str(unsuited(shape_of("learned"), torch.float16, "cpu"))


def test_the_plan_has_as_many_words_as_the_kernel_is_told() -> None:
    from porttool.engines.torch.cuda import CudaDecoder

    shape = cases.config("learned")
    plain = cases.drawn(shape, torch.float32)
    made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float32,
                       limits=cases.limits(2, 32), device="cpu")  # fmt: skip
    words = plan_words(made.model, made.rows, tuple(torch.zeros(7, 1, dtype=torch.int64)))
    assert len(words) == macros(shape, torch.float16, TILES[0], HOPPER)["PLAN_WORDS"]


@pytest.mark.parametrize(
    "numbers",
    [(0, 3, 4), (24, 3, 4, 0), (24, 3, 4, 4, 3), (24, 3, 4, 4, 16), (24, 3, 4, 4, 8, 12),
     (24, 3, 4, 4, 8, 0), (24, 3, 4, 4, 8, 1000), (24, 3, 4, 25, 8, 8), (24, 3, 1 << 40)],
)  # fmt: skip
def test_a_tile_that_no_kernel_is_made_for_is_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no row is decoded in PersistentTile"):
        PersistentTile(*numbers)


def test_a_tile_travels_with_the_tuning() -> None:
    plain = default_tuning(shape_of("learned"), "cpu")
    tuned = replace(plain, persistent=TILES[0])
    assert plain.persistent is None
    assert Tuning.from_dict(tuned.as_dict()) == tuned
    assert "one persistent kernel" in tuned.described(1)
    assert "shared by 8 of 8 warps" in tuned.described(1)
    assert "persistent" not in tuned.described(2)


def test_candidates_vary_what_was_fastest() -> None:
    shape = shape_of("multi-query")
    lists = list(persistent_candidates(shape, HOPPER))
    assert {tile["splits"] for tile in lists[0]} == {1, 2, 3, 4, 5, 6, 8}
    assert lists[1] == [{"sharing": 4}, {"sharing": 2}]
    assert lists[2] == [{"steps": 26, "flying": flying} for flying in (2, 4, 6)]
    assert lists[3] == [{"steps": 52, "flying": flying} for flying in (2, 3)]
    assert all(tile["splits"] <= 2 for tile in next(persistent_candidates(shape, 17)))
    assert not any("warps" in tile for tiles in lists for tile in tiles)
    wide = shape_of("multi-query", d_model=6144)
    assert list(persistent_candidates(wide, HOPPER))[-1] == [{"warps": 12, "sharing": 4}]


def test_a_row_alone_goes_to_the_kernel_in_one_launch(monkeypatch) -> None:
    from porttool.engines.torch import cuda

    runs: list[tuple[int, bool]] = []

    class Row:
        def __init__(self, model, rows, x, tile) -> None:
            assert x.shape == (48,) and tile == TILES[0]

        def run(self, tokens, logits) -> None:
            runs.append((tokens, logits is not None))

    shape = cases.config("learned", n_positions=640)
    plain = cases.drawn(shape, torch.float32)
    made = cuda.CudaDecoder(shape, plain.state_dict(), dtype=torch.float32,
                            limits=cases.limits(2, 600), device="cpu")  # fmt: skip
    monkeypatch.setattr(cuda, "PersistentRow", Row)
    chosen = replace(made.tuning, persistent=TILES[0])
    made.use(chosen)
    assert made._alone is None  # plain launches are the chain's
    cases.graphed_without_gpu(made)
    made.use(chosen)
    begin = cases.one_token([1], torch.tensor([7]), [3])
    made.step(begin)
    made.decode(begin, 300)
    assert runs == [(1, True), (256, False), (44, False)]
    assert list(made._graphs) == [("embed", 1, 1)]
    made.load_prompt_table(torch.ones(2, 48))
    assert not made._graphs  # a graph knows the table by its address


class Decoder(cases.TunedDecoder):
    def refuses(self, tuning: Tuning) -> bool:
        return tuning.persistent is not None and tuning.persistent.splits == 5

    def milliseconds(self) -> float:
        tile = self.tuning.persistent
        if tile is None:
            return 1.0
        off = abs(tile.splits - 5), abs(tile.flying - 2), tile.steps > 32, tile.fillers != 2
        slow = 0.03 * (tile.sharing != 4)
        return 0.5 + 0.1 * off[0] + 0.05 * off[1] + 0.2 * off[2] + 0.01 * off[3] + slow


@pytest.fixture
def measured(monkeypatch):
    from porttool.engines.torch import cuda_tune

    monkeypatch.setattr(cuda_tune, "unsuited", lambda *a: None)
    monkeypatch.setattr(cuda_tune, "programs_of", lambda device: HOPPER)
    monkeypatch.setattr(cuda_tune, "stageable", lambda *a: False)
    monkeypatch.setattr(cuda_tune, "step_milliseconds", lambda d, n, context: d.milliseconds())
    return cuda_tune


def test_the_tuner_varies_one_number_after_the_other(measured) -> None:
    decoder = Decoder(shape_of("multi-query"))
    assert measured.refine(decoder, {}, 1, 512) == pytest.approx(0.6)
    best = decoder.tuning.persistent
    assert best.splits in (4, 6)  # 5 is faster, and does not compile
    assert (best.flying, best.steps, best.fillers, best.sharing) == (2, 26, 2, 4)


def test_several_rows_keep_the_single_row_s_tile_and_never_build_it(measured) -> None:
    decoder = Decoder(shape_of("multi-query"))
    decoder.use(replace(decoder.tuning, persistent=TILES[0]))
    begin = len(decoder.used)
    measured.refine(decoder, {}, 20, 512)
    assert decoder.tuning.persistent == TILES[0]
    assert all(tuning.persistent is None for tuning in decoder.used[begin:-1])


def tuned(case: str, dtype: torch.dtype, tile: PersistentTile, **changes: object):  # type: ignore[no-untyped-def]
    """Return the decoder under test, the reference and its cache; unset memory is NaN."""
    from porttool.engines.torch.cuda import CudaDecoder

    shape = shape_of(case, **changes)
    plain = cases.drawn(shape, dtype, "cuda")
    tuning = {**default_tuning(shape, "cuda").as_dict(), "persistent": asdict(tile)}
    made = CudaDecoder(shape, plain.state_dict(), dtype=dtype, limits=cases.limits(3, 600),
                       tuning=tuning)  # fmt: skip
    assert "one row in a persistent kernel" in made.description
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made, plain, KVCache(shape, 3, 600, dtype=torch.float64, device="cuda")


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("tile", TILES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", list(SHAPES))
    def test_logits(self, case: str, dtype: torch.dtype, tile: PersistentTile) -> None:
        made, plain, cache = tuned(case, dtype, tile)
        for slot, length in ((2, 1), (0, 7), (1, 300)):
            first = Step.prefill(prompts([length]), [slot])
            made.step(first), cases.reference(plain, cache, first)
            for i in range(3):
                step = cases.one_token([slot], torch.tensor([5 + i]), [length + i])
                wanted = cases.reference(plain, cache, step)
                assert cases.relative_error(made.step(step), wanted) < TOLERANCE[dtype]

    @pytest.mark.parametrize("case", list(SHAPES))
    def test_tokens_repeat_and_equal_single_steps(self, case: str) -> None:
        made, _, _ = tuned(case, torch.float16, TILES[0])
        made.step(Step.prefill(prompts([20]), [1]))
        begin = cases.one_token([1], torch.tensor([7]), [20])
        found = made.decode(begin, 37)
        assert torch.equal(found, made.decode(begin, 37))
        step, singles = begin, []
        for _ in range(37):
            best = made.step(step).argmax(-1).cpu()
            singles.append(best)
            step = cases.one_token([1], best, (step.starts + 1).tolist())
        assert torch.equal(found.cpu(), torch.stack(singles, dim=1))

    def test_more_tokens_than_the_history_holds(self) -> None:
        made, _, _ = tuned("learned", torch.float16, TILES[0])
        made.step(Step.prefill(prompts([3]), [0]))
        begin = cases.one_token([0], torch.tensor([7]), [3])
        whole = made.decode(begin, 570)
        pieces, step = [], begin
        for n in (1, 255, 300, 14):
            pieces.append(made.decode(step, n))
            last = pieces[-1][:, -1].cpu()
            step = cases.one_token([0], last, (step.starts + n).tolist())
        assert torch.equal(whole, torch.cat(pieces, dim=1))

    def test_flags_start_again(self) -> None:
        made, _, _ = tuned("learned", torch.float16, TILES[0])
        made.step(Step.prefill(prompts([9]), [0]))
        begin = cases.one_token([0], torch.tensor([7]), [9])
        found = made.decode(begin, 11)
        made._alone._told = (1 << 31) - 30
        assert torch.equal(found, made.decode(begin, 11))
        assert made._alone._told < 1000

    def test_a_lone_row_among_others_leaves_their_cache(self) -> None:
        made, _, _ = tuned("multi-query", torch.float16, TILES[0])
        lengths = [30, 31, 32]
        made.step(Step.prefill(prompts(lengths)))
        three = cases.one_token([0, 1, 2], torch.arange(3), lengths)
        wanted = made.step(three).clone()
        made.decode(cases.one_token([1], torch.tensor([1]), [31]), 40)
        assert torch.equal(made.step(three)[[0, 2]], wanted[[0, 2]])

    def test_what_it_cannot_run_is_said_and_runs_in_the_chain(self) -> None:
        from porttool.engines.torch.cuda import CudaDecoder

        shape = shape_of("learned", d_ff=1000)
        plain = cases.drawn(shape, torch.float16, "cuda")
        tuning = {**default_tuning(shape, "cuda").as_dict(), "persistent": asdict(TILES[0])}
        made = CudaDecoder(shape, plain.state_dict(), dtype=torch.float16,
                           limits=cases.limits(1, 40), tuning=tuning)  # fmt: skip
        assert "no persistent kernel for one row: rows of its matrices" in made.description
        cache = KVCache(shape, 1, 40, dtype=torch.float64, device="cuda")
        for step in (Step.prefill([[3, 1, 2] * 7]), cases.one_token([0], torch.tensor([8]), [21])):
            wanted = cases.reference(plain, cache, step)
            assert cases.relative_error(made.step(step), wanted) < TOLERANCE[torch.float16]
