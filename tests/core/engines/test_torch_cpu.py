"""The CPU decoder, compiled and in plain torch, against the canonical decoder."""

from __future__ import annotations

import platform
import pwd
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from porttool.config import Limits, ModelConfig
from porttool.engines.native import head, library
from porttool.engines.torch import cpu
from porttool.engines.torch.cpu import NATIVE_TOKENS, CpuDecoder, Plan
from porttool.errors import UsageError
from porttool.nn import Decoder, KVCache, Step

LIMITS = Limits(max_batch_size=5, max_input_len=30, max_output_len=20)
BASE = {
    "vocab_size": 211, "n_positions": 50, "n_layer": 3, "n_head": 4, "n_kv_head": 4, "head_dim": 20,
    "d_model": 56, "d_ff": 72, "activation": "gelu_tanh", "attention_scale": 0.2,
}  # fmt: skip
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
SHAPES = {
    "gpt2": {},
    "mqa": {"n_kv_head": 1, "activation": "gelu", "head_dim": 67},
    "gqa": {"n_kv_head": 2, "activation": "silu", "gated": True, "norm": "rmsnorm", **NO_BIAS},
    "gpt-next": {"position": "rotary", "rotary_fraction": 0.5, "norm": "layernorm1p",
                 "activation": "silu", "gated": True, "tied_head": False, **NO_BIAS},
    "rotary": {"position": "rotary", "rotary_base": 500.0, "activation": "relu2"},
    "scaled": {"inverse_layer_scale": True, "upcast_attention": True, "activation": "quick_gelu"},
    "relu": {"activation": "relu", "n_layer": 1, "d_model": 7, "d_ff": 5, "head_dim": 2},
    "gated bias": {"gated": True, "activation": "gelu"},
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.08, torch.float16: 0.02}

compiled = pytest.mark.skipif(
    shutil.which("g++") is None, reason="without a compiler only plain torch runs"
)


def drawn(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights from N(0, 0.2) that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: w.shape for name, w in Decoder(config).state_dict().items()}
    return {
        name: (0.2 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


class Pair:
    """The decoder under test and the canonical one in float64, each with a cache."""

    def __init__(self, shape: str = "gpt2", dtype=torch.float32, *, native: bool = True) -> None:
        self.config = ModelConfig(**{**BASE, **SHAPES[shape]})
        weights = drawn(self.config, dtype)
        self.decoder = CpuDecoder(self.config, weights, dtype=dtype, limits=LIMITS, native=native)
        assert (self.decoder.native is not None) == native, self.decoder.description
        self.reference = Decoder(self.config).double().eval().requires_grad_(False)
        self.reference.load_state_dict({n: w.double() for n, w in weights.items()})
        self.cache = KVCache(self.config, 5, 50, dtype=torch.float64)
        self.tolerance = TOLERANCE.get(dtype, 1e-9)

    def check(self, step: Step) -> None:
        """Feed both; every real token's logits agree, and the last ones asked for alone."""
        wanted = self.reference(step, self.cache)
        last = self.decoder.step(step, all_positions=False)
        got = self.decoder.step(step, all_positions=True)
        real = torch.arange(step.tokens.shape[1]) < step.lengths[:, None]
        ends = wanted[torch.arange(len(wanted)), step.lengths - 1]
        bound = self.tolerance * float(wanted[real].std())
        torch.testing.assert_close(got[real].double(), wanted[real], rtol=0, atol=bound)
        torch.testing.assert_close(last.double(), ends, rtol=0, atol=bound)


def prompts(n: int, vocab: int = 211) -> list[list[int]]:
    return [[(31 * i + 7 * j) % vocab for j in range(3 + 5 * i)] for i in range(n)]


def one_each(pair: Pair, starts: list[int], slots: list[int]) -> Step:
    return Step.decode([(13 * s + 5) % 211 for s in starts], slots, starts)


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_decode_and_several_tokens(shape, dtype, native):
    if native and dtype is torch.float64:
        pytest.skip("float64 always runs in plain torch")
    pair = Pair(shape, dtype, native=native)
    pair.check(Step.prefill(prompts(3), [4, 0, 2]))
    pair.check(one_each(pair, [13, 3, 8], [2, 4, 0]))
    pair.check(one_each(pair, [14], [2]))
    several = Step(
        torch.tensor([0, 2]), torch.tensor([[9, 4, 1], [210, 2, 0]]),
        torch.tensor([9, 15]), torch.tensor([3, 2]),
    )  # fmt: skip
    pair.check(several)
    pair.check(one_each(pair, [12, 4], [0, 4]))


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
def test_rotary_beyond_the_trained_positions(native):
    """A long prompt, which torch feeds, and then what follows it: as with more positions."""
    pair = Pair("rotary", native=native)
    short = pair.config.model_copy(update={"n_positions": 12})
    weights = drawn(pair.config, torch.float32)
    pair.decoder = CpuDecoder(short, weights, dtype=torch.float32, limits=LIMITS, native=native)
    pair.check(Step.prefill([list(range(40)), [7]], [1, 3]))
    pair.check(one_each(pair, [40, 1], [1, 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("able", [False, True])
def test_prompts_in_float16_are_multiplied_in_float32(monkeypatch, dtype, able):
    """A processor without float16 takes four times as long for the products otherwise."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "multiplies_float16", lambda: able)
    types = []
    linear = cpu.F.linear
    monkeypatch.setattr(cpu.F, "linear", lambda x, *w: types.append(x.dtype) or linear(x, *w))
    pair = Pair(dtype=dtype, native=False)
    pair.check(Step.prefill(prompts(3)))
    maps = 2 * (4 * pair.config.n_layer + 1)
    assert types.count(dtype) + types.count(torch.float32) == maps
    heads, few = 2, 3  # the last layer's maps of three last tokens but for q, k and v
    wide = dtype is torch.float16 and not able
    assert types.count(dtype) == (heads + few if wide else maps)
    types.clear()
    pair.check(one_each(pair, [3], [0]))
    assert set(types) == {dtype, torch.float64}  # the reference's


def test_a_fresh_prompt_needs_no_mask():
    """Of a long one it would take the square of the length, for every row."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.most = max(self.most, getattr(out, "nbytes", 0))
            return out

    step = Step.prefill([[1] * 500] * 4)
    with Largest() as seen:
        assert Plan.of(step).mask is None
    assert seen.most <= 2 * step.tokens.nbytes


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_feel_its_neighbours(dtype):
    pair = Pair("rotary", dtype)
    prompt = torch.tensor([[5, 6, 7, 8]])
    rows = Step(torch.arange(3), prompt.repeat(3, 1), torch.zeros(3).long(), torch.full((3,), 4))
    together = pair.decoder.step(rows, all_positions=True)
    for slot in range(3):
        for i in range(4):
            one = Step(
                torch.tensor([slot]), prompt[:, i : i + 1], torch.tensor([i]), torch.tensor([1])
            )
            alone = pair.decoder.step(one, all_positions=False)
            assert torch.equal(alone[0], together[slot, i])


@pytest.mark.parametrize(("slot", "start"), [(0, 39), (5, 3)])
@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
def test_decoding_stays_in_the_cache(native, slot, start):
    pair = Pair(native=native)
    with pytest.raises(UsageError, match=f"{start + 12} tokens in slot {slot}; .* 5 slots of 50"):
        pair.decoder.decode(one_each(pair, [start], [slot]), 12)
    assert pair.decoder.decode(one_each(pair, [38], [4]), 12).shape == (1, 12)


@compiled
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_decoding_takes_the_highest_logit(dtype, n):
    pair = Pair("gpt-next", dtype)
    decoder = pair.decoder
    decoder.step(Step.prefill(prompts(n)), all_positions=False)
    step = one_each(pair, [len(p) for p in prompts(n)], list(range(n)))
    found = decoder.decode(step, 12)
    for i in range(12):
        best = decoder.step(step, all_positions=False).argmax(-1)
        assert best.tolist() == found[:, i].tolist()
        step = Step(step.slots, best[:, None], step.starts + 1, step.lengths)


@compiled
def test_a_large_model_hands_over_its_tokens_sooner(monkeypatch):
    """What follows an end token is decoded for nothing, and a stream waits for all of it."""
    pair = Pair()
    n_bytes = sum(weight.nbytes for weight in pair.decoder.module.parameters())
    step = one_each(pair, [3, 5], [0, 1])
    pair.decoder.step(Step.prefill(prompts(2)), all_positions=False)
    whole = pair.decoder.decode(step, 12)
    assert whole.shape == (2, 12)
    for read, n in ((n_bytes // 2, 1), (3 * n_bytes, 3)):
        monkeypatch.setattr(cpu, "READ_AT_ONCE", read)
        large = Pair().decoder
        large.step(Step.prefill(prompts(2)), all_positions=False)
        assert large.tokens_at_once == n
        assert torch.equal(large.decode(step, 12), whole[:, :n])


@compiled
@pytest.mark.parametrize("shape", ["gpt2", "gqa"])
def test_threads_change_nothing(shape):
    pair = Pair(shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            pair.decoder.step(Step.prefill([[1], [2], [3]]), all_positions=False)
            step = one_each(pair, [1, 1, 1], [0, 1, 2])
            found = pair.decoder.decode(step, 20)
            results.append((found, pair.decoder.step(step, all_positions=False)))
        finally:
            torch.set_num_threads(1)
    for found, logits in results[1:]:
        assert torch.equal(found, results[0][0])
        assert torch.equal(logits, results[0][1])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_code_for_older_processors_agrees(monkeypatch, tmp_path, dtype):
    wide = Pair("mqa", dtype)
    flags = ("-std=c++17", "-O1", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-fopenmp")
    monkeypatch.setattr(library, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load_library.cache_clear()
    narrow = Pair("mqa", dtype)
    library.load_library.cache_clear()
    assert narrow.decoder.native.library is not wide.decoder.native.library
    for pair in (wide, narrow):
        pair.check(Step.prefill([[4, 9], [8]]))
        pair.check(one_each(pair, [2, 1], [0, 1]))
    steps = [one_each(pair, [3, 2], [0, 1]) for pair in (wide, narrow)]
    found = [p.decoder.decode(s, 8) for p, s in zip((wide, narrow), steps, strict=True)]
    assert torch.equal(*found)


@compiled
def test_equal_logits_go_to_the_lowest_id():
    config = ModelConfig(**BASE)
    weights = drawn(config, torch.float32)
    weights["embedding.weight"][7:] = weights["embedding.weight"][7].clone()
    decoder = CpuDecoder(config, weights, dtype=torch.float32, limits=LIMITS)
    step = Step.prefill([[200]])
    logits = decoder.step(step, all_positions=False)
    assert decoder.decode(step, 1).item() == logits.argmax().item() <= 7


@pytest.mark.parametrize("shape", [(300, 24), (5, 4000), (4200, 3)])
def test_rounded_rows_stay_within_their_bound(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[0] = 0
    coarse, scale, error = head.round_rows(weight)
    x = torch.randn(shape[1], 50, generator=torch.Generator().manual_seed(1))
    off = (weight.double() @ x.double() - scale[:, None] * coarse.double() @ x.double()).abs()
    assert (off <= error[:, None] * x.norm(dim=0)).all()
    assert (error < 0.012 * weight.float().norm(dim=1) + 1e-6).all()


def test_large_batches_decode_in_torch(monkeypatch):
    monkeypatch.setitem(NATIVE_TOKENS, torch.float32, 1)
    pair = Pair(native=shutil.which("g++") is not None)
    pair.decoder.step(Step.prefill(prompts(2)), all_positions=False)
    step = one_each(pair, [3, 8], [0, 1])
    found = pair.decoder.decode(step, 3)
    monkeypatch.undo()
    assert found.tolist() == pair.decoder.decode(step, 3).tolist()
    assert NATIVE_TOKENS[torch.float32] > 1


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
def test_prompt_table(native):
    pair = Pair(native=native)
    table = torch.randn(6, 56, generator=torch.Generator().manual_seed(2))
    with pytest.raises(UsageError, match="run from 3 to 216, but the model's from 0 to 210"):
        pair.decoder.step(Step.prefill([[3, 216]]), all_positions=False)
    pair.decoder.load_prompt_table(table)
    pair.reference.prompt_table = table.double()
    pair.check(Step.prefill([[211, 216, 4], [3, 4]]))
    pair.decoder.load_prompt_table(None)
    with pytest.raises(UsageError):
        pair.decoder.step(Step.prefill([[211]]), all_positions=False)


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])
def test_slots_are_copied(native):
    pair = Pair(native=native)
    pair.check(Step.prefill(prompts(2)))
    for held in (pair.decoder, pair.cache):
        source, target = [0, 1], [1, 3]
        if held is pair.cache:
            source, target = torch.tensor(source), torch.tensor(target)
        held.copy_slots(source, target)
    pair.check(one_each(pair, [3, 8], [1, 3]))


@pytest.mark.parametrize("start", [0, 2])
def test_a_step_may_be_wider_than_its_rows(start):
    pair = Pair(native=False)
    pair.check(Step.prefill([[9, 8], [7, 6]], [3, 1]))
    tokens = torch.arange(18).view(2, 9)
    pair.check(Step(torch.tensor([3, 1]), tokens, torch.tensor([start, 0]), torch.tensor([5, 1])))


@pytest.mark.parametrize("shape", ["gpt2", "relu"])
def test_the_last_layer_is_run_for_what_is_asked_for(shape):
    """The second has no other layer."""
    pair, tokens = Pair(shape, native=False), []
    for layer in pair.decoder.module.layers:
        layer.mlp.register_forward_hook(lambda _, given, __: tokens.append(given[0].shape[:2]))
    n_layer, step = pair.config.n_layer, Step.prefill(prompts(3))
    pair.decoder.step(step, all_positions=False)
    assert tokens == [(3, 13)] * (n_layer - 1) + [(3, 1)]
    pair.decoder.step(step, all_positions=True)
    assert tokens[n_layer:] == [(3, 13)] * n_layer


def test_the_last_place_of_the_cache_survives_padding():
    pair = Pair(native=False)
    pair.check(Step.prefill([[i % 211 for i in range(49)], [1, 2, 3]]))
    ragged = Step(
        torch.tensor([0, 1]), torch.tensor([[8, 0, 0], [4, 5, 6]]),
        torch.tensor([49, 3]), torch.tensor([1, 3]),
    )  # fmt: skip
    alone = Step(torch.tensor([0]), torch.tensor([[8]]), torch.tensor([49]), torch.tensor([1]))
    mixed = pair.decoder.step(ragged, all_positions=False)
    wanted = pair.reference(alone, pair.cache)
    torch.testing.assert_close(mixed[0].double(), wanted[0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(None, r"no C\+\+ compiler"), ("false", "false failed"), ("nowhere", "nowhere does not run")],
)
def test_why_nothing_was_compiled_is_said(monkeypatch, tmp_path, compiler, reason):
    library.load_library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", compiler) if compiler else monkeypatch.delenv("CXX", raising=False)
    config = ModelConfig(**BASE)
    decoder = CpuDecoder(config, drawn(config, torch.float32), dtype=torch.float32, limits=LIMITS)
    library.load_library.cache_clear()
    assert decoder.native is None and not decoder.decodes_on_device
    assert decoder.description.startswith("cpu, plain torch (")
    with pytest.raises(library.NativeUnavailable, match=reason):
        library.load_library()
    assert not list(tmp_path.rglob("*.so"))


@compiled
def test_the_compiler_may_be_a_command_of_several_words(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"env LANG=C {shutil.which('g++')} -m64")
    assert library.build_library().is_file()
    monkeypatch.setenv("CXX", "'g++")
    library.load_library.cache_clear()
    with pytest.raises(library.NativeUnavailable, match="No closing quotation"):
        library.load_library()


@compiled
def test_another_c_library_gets_code_of_its_own(monkeypatch, tmp_path):
    """A home folder shared with containers: code for a newer C library would load in none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = library.build_library()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
    assert library.build_library() != built


def test_without_a_home_folder_nothing_is_compiled(monkeypatch):
    library.load_library.cache_clear()
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(library.NativeUnavailable, match="home directory"):
        library.load_library()
