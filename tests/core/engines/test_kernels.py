"""Every Triton kernel, under Triton's interpreter, against the plain torch operation.

No shape is a multiple of its tile, buffers start as NaN, and float32 keeps rounding out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import cuda_cases as cases
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_launch import (
    Projected,
    attend,
    merge,
    ranged,
    residual_norm,
    stream,
    wide,
)
from porttool.engines.torch.cuda_library import activation
from porttool.engines.torch.cuda_prefill import _blocks
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_state import Scratch
from porttool.engines.torch.cuda_tune import tuned_rows
from porttool.engines.torch.cuda_tuning import SHARED_BYTES, AttentionTile, StreamTile, WideTile
from porttool.engines.torch.cuda_weights import Linear, NormWeights, with_norm
from porttool.nn import KVCache, Step
from porttool.nn.mlp import ACTIVATIONS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's tests cover these there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]
TOLERANCE = 2e-6


def decoder(case: str, n_slots: int = 20, **changes: object) -> CudaDecoder:
    """Return a case's decoder with tiles smaller than its matrices and an unset cache."""
    shape = cases.config(case, **changes)
    tuning = default_tuning(shape, "cpu")
    streams = dict.fromkeys(tuning.stream, StreamTile(8, 32, held=1))
    wides = {
        rows: {name: WideTile(16, 16, 4, 2, 1 if name in ("up", "head") else 2) for name in tiles}
        for rows, tiles in tuning.wide.items()
    }
    tuning = replace(tuning, stream=streams, wide=wides, attention=AttentionTile(3, 8),
                     wide_attention=dict.fromkeys(wides, AttentionTile(1, 8)))  # fmt: skip
    weights = cases.drawn(shape, torch.float32).state_dict()
    made = CudaDecoder(shape, weights, dtype=torch.float32,
                       limits=cases.limits(n_slots, 40), device="cpu",
                       tuning=tuning.as_dict())  # fmt: skip
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made


def scratch_of(made: CudaDecoder, n: int) -> Scratch:
    """Return scratch that holds nothing anybody wrote."""
    scratch = made._scratch_of(n)
    for tensor in vars(scratch).values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    return scratch


def random_norm(width: int, *, shift: bool) -> NormWeights:
    """Return a norm whose scale and shift both matter."""
    return NormWeights(torch.randn(width), torch.randn(width) if shift else None)


def normed(x: Tensor, norm: NormWeights, eps: float, *, rms: bool) -> Tensor:
    """Return the plain operation in float64."""
    gamma = norm.gamma.double()
    if rms:
        return F.rms_norm(x.double(), gamma.shape, gamma, eps)
    beta = None if norm.beta is None else norm.beta.double()
    return F.layer_norm(x.double(), gamma.shape, gamma, beta, eps)


@pytest.mark.parametrize("case", ["learned", "gated rotary", "grouped rms"])
def test_stream_linear_with_a_norm(case: str) -> None:
    made = decoder(case)
    c, gated = made.config, made.config.gated
    rms = c.norm == "rmsnorm"
    weight = torch.randn(37 * (2 if gated else 1), 50)
    plain = Linear(weight, torch.randn(len(weight)), gated=gated)
    linear = with_norm(plain, random_norm(50, shift=not rms))
    x, out = torch.randn(2, 50) * 3 + 1, torch.full((2, 37), float("nan"))
    stream(made.model, scratch_of(made, 2), linear, StreamTile(8, 16, held=2), 2, x, out,
           act=c.activation)  # fmt: skip
    assert linear.norm is not None
    hidden = F.linear(normed(x, linear.norm, c.norm_eps, rms=rms), weight.double(),
                      plain.bias.double() if plain.bias is not None else None)  # fmt: skip
    act: Callable[[Tensor], Tensor] = ACTIVATIONS[c.activation]
    gate, *rest = hidden.chunk(2, dim=-1) if gated else (hidden,)
    wanted = act(gate) * (rest[0] if rest else 1)
    assert cases.relative_error(out, wanted) < TOLERANCE


def test_stream_linear_adds_to_the_residual_stream() -> None:
    made = decoder("learned")
    scratch = scratch_of(made, 1)
    linear = Linear(torch.randn(48, 77), torch.randn(48))
    x, before = torch.randn(1, 77), torch.randn(1, 48)
    scratch.x[:1] = before
    stream(made.model, scratch, linear, StreamTile(4, 32), 1, x, None)
    assert linear.bias is not None
    wanted = before + F.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert cases.relative_error(scratch.x[:1], wanted) < TOLERANCE


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("split", [1, 3])
def test_wide_linear(rows: int, split: int) -> None:
    made = decoder("learned")
    scratch = scratch_of(made, rows)
    linear = Linear(torch.randn(48, 75), torch.randn(48))
    x = torch.randn(rows, 75)
    delta = torch.full((split * rows * 48,), float("nan"))
    wide(made.model, replace(scratch, delta=delta), linear, WideTile(16, 16, 4, 2, split), rows,
         x, None)  # fmt: skip
    wanted = F.linear(x.double(), linear.weight.double())
    assert cases.relative_error(delta.view(split, rows, 48).sum(0), wanted) < TOLERANCE


def test_wide_linear_activates_and_gates() -> None:
    made = decoder("gated rotary")
    linear = Linear(torch.randn(74, 33), torch.randn(74), gated=True)
    x, out = torch.randn(5, 33), torch.full((5, 37), float("nan"))
    wide(made.model, scratch_of(made, 5), linear, WideTile(16, 16, 4, 2), 5, x, out, act="gelu")
    assert linear.bias is not None
    hidden = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    gate, rest = hidden.chunk(2, dim=-1)
    assert cases.relative_error(out, F.gelu(gate) * rest) < TOLERANCE


@pytest.mark.parametrize("case", ["learned", "grouped rms"])
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("width", [48, 4300])
def test_residual_norm(case: str, parts: int, width: int) -> None:
    made = decoder(case)
    rms = made.config.norm == "rmsnorm"
    x, out = torch.randn(5, width) * 2 + 1, torch.full((5, width), float("nan"))
    delta = torch.randn(parts, 5, width) if parts else None
    bias = torch.randn(width) if parts else None
    norm = random_norm(width, shift=not rms)
    total = x.double() + (0 if delta is None or bias is None else delta.double().sum(0) + bias)
    residual_norm(made.model, x, delta, bias, norm, out, parts=parts)
    assert cases.relative_error(x, total) < TOLERANCE
    assert cases.relative_error(out, normed(total, norm, 1e-5, rms=rms)) < TOLERANCE


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_activation(kind: str, gated: bool) -> None:
    x = torch.randn(3, 74) * 3
    out = torch.full((3, 37 if gated else 74), float("nan"))
    activation(x, out, kind, gated=gated)
    act: Callable[[Tensor], Tensor] = dict(ACTIVATIONS)[kind]  # type: ignore[index]
    gate, *rest = x.double().chunk(2, dim=-1) if gated else (x.double(),)
    assert cases.relative_error(out, act(gate) * (rest[0] if rest else 1)) < TOLERANCE


@pytest.mark.parametrize("case", ["multi-query", "gated rotary"])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_over_a_cache(case: str, splits: int) -> None:
    """Rows at different lengths, one of them a row's first token."""
    made = decoder(case)
    c, model = made.config, made.model
    scratch, lengths = scratch_of(made, 2), [21, 0]
    keys = torch.randn(2, c.n_kv_head, 40, c.head_dim)
    values = torch.randn_like(keys)
    for slot, length in enumerate(lengths):
        model.cache.keys[0, slot, :, :length] = keys[slot, :, :length]
        model.cache.values[0, slot, :, :length] = values[slot, :, :length]
    made.rows.slots[:2] = torch.tensor([0, 1])
    made.rows.positions[:2] = torch.tensor(lengths)
    scratch.qkv[:2] = torch.randn(2, c.qkv_dim)
    attend(model, made.rows, 0, scratch, AttentionTile(splits, 16, stages=splits), 2,
           Projected(scratch.qkv))  # fmt: skip
    if splits > 1:
        merge(model, scratch, splits, 2)
    attention = cases.drawn(c, torch.float32).layers[0].attention
    attention.qkv = torch.nn.Identity()
    attention.out = torch.nn.Identity()
    cache = KVCache(c, 2, 40, dtype=torch.float64)
    cache.keys[0], cache.values[0] = keys.double(), values.double()
    step = Step(*(torch.tensor(n) for n in ([0, 1], [[0], [0]], lengths, [1, 1])))
    wanted = attention(scratch.qkv[:2, None].double(), step.positions, cache, step)
    assert cases.relative_error(scratch.attended[:2], wanted[:, 0]) < TOLERANCE
    for slot, length in enumerate(lengths):
        stored = model.cache.keys[0, slot, :, length]
        assert cases.relative_error(stored, cache.keys[0, slot, :, length]) < TOLERANCE


@pytest.mark.parametrize("case", list(cases.CASES))
def test_whole_decoder(case: str) -> None:
    """Prefill, several tokens of a row, one row, and greedy tokens, against float64."""
    made = decoder(case, n_layer=1)
    plain = cases.drawn(made.config, torch.float32)
    cache = KVCache(made.config, 20, 40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, 101, shape, generator=generator)

    steps = [
        Step.prefill([tokens(n).tolist() for n in (7, 3, 11)], [4, 0, 2]),
        Step(torch.tensor([0, 2]), tokens(2, 3), torch.tensor([3, 11]), torch.tensor([3, 1])),
        cases.one_token([2], tokens(1), [12]),
    ]
    for step in steps:
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(made.step(step), wanted) < 2e-5
    begin = cases.one_token([4, 0], tokens(2), [7, 6])
    found, step, wanted_tokens = made.decode(begin, 2), begin, []
    for _ in range(2):
        best = cases.reference(plain, cache, step).argmax(-1)
        wanted_tokens.append(best)
        step = cases.one_token([4, 0], best, (step.starts + 1).tolist())
    assert torch.equal(found, torch.stack(wanted_tokens, dim=1))


def test_prompt_table_and_copied_slots() -> None:
    made = decoder("learned", n_layer=1)
    plain = cases.drawn(made.config, torch.float32)
    table = torch.randn(5, 48) * 0.2
    plain.prompt_table = table.double()
    made.load_prompt_table(table)
    cache = KVCache(made.config, 20, 40, dtype=torch.float64)
    step = Step.prefill([[101, 105, 3, 9], [7, 103]], [1, 5])
    wanted = cases.reference(plain, cache, step)
    assert cases.relative_error(made.step(step), wanted) < 2e-5
    made.copy_slots([1, 5], [5, 1])
    cache.copy_slots(torch.tensor([1, 5]), torch.tensor([5, 1]))
    step = cases.one_token([5, 1], torch.tensor([8, 9]), [4, 2])
    assert cases.relative_error(made.step(step), cases.reference(plain, cache, step)) < 2e-5


def test_a_tuning_says_what_it_chose() -> None:
    tuning = default_tuning(cases.config("learned"), "cpu")
    tuning = replace(tuning, wide={**tuning.wide, "32": {"qkv": WideTile(64, 128, 4, 6, 2),
                                                         "out": WideTile(0, 0)}})  # fmt: skip
    parts = tuning.wide_attention["32"].splits
    wanted = f"attention {parts} x 16, qkv 64 x 128 in 2 cuts, out the library's"
    assert tuning.described(20) == wanted
    assert tuning.described(1).startswith("attention")
    assert tuned_rows(1) == (1,)
    assert tuned_rows(200) == (1, 16, 32, 64, 128)
    assert tuned_rows(40) == (1, 16, 32, 40)


@pytest.mark.parametrize("shared", [SHARED_BYTES, 99 << 10])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_the_rules_tiles_fit_shared_memory(rows: int, itemsize: int, shared: int) -> None:
    """float32's tiles are twice as large, other GPUs' memory is half: fewer are in flight then."""
    big = cases.config("gated rotary", d_model=2048, d_ff=5440, head_dim=128, vocab_size=256000)
    for name, tile in default_tuning(big, "cpu").wide[str(rows)].items():
        gated = name == "up"
        columns = tile.block_n * (2 if gated else 1)
        stages = tile.stages_within(shared, rows, itemsize, gated=gated)
        assert stages * tile.block_k * (rows + columns) * itemsize <= shared
        assert stages > 1 or (itemsize == 4 and shared < SHARED_BYTES)
        assert stages == tile.stages or itemsize == 4 or shared < SHARED_BYTES


@pytest.mark.parametrize("block_d", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_prefill_fits_smaller_gpus(block_d: int, dtype: torch.dtype) -> None:
    for shared in (SHARED_BYTES, 99 << 10):
        queries, keys, _, stages = _blocks(block_d, dtype, shared)
        held = block_d * (queries + 2 * stages * keys) * dtype.itemsize
        assert held <= shared
    if dtype == torch.float16 and block_d == 128:
        assert _blocks(128, dtype, SHARED_BYTES) == (64, 64, 4, 3)


def test_every_layer_is_a_range_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    layers = decoder("learned", n_layer=2).model.weights.layers
    for index, layer in ranged(layers, on_gpu=True):
        assert layer is layers[index] and seen[-1] == f"layers.{index}"
    assert seen == ["layers.0", "end", "layers.1", "end"]
    assert len(list(ranged(layers, on_gpu=False))) == 2 and len(seen) == 4
    with pytest.raises(ZeroDivisionError):
        for index, _ in ranged(layers, on_gpu=True):
            index / 0
    assert seen[4:] == ["layers.0", "end"]
