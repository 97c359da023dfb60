"""The canonical decoder against formulas written out, and against other models of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from porttool.config import ModelConfig
from porttool.nn import Decoder, KVCache, Step, meta_decoder
from porttool.nn.attention import Attention, rotary_angles, rotate
from porttool.nn.mlp import ACTIVATIONS
from porttool.nn.norm import Norm
from porttool.nn.trace import traced


def config(**changes):
    return ModelConfig(**{
        "vocab_size": 67, "n_positions": 32, "n_layer": 2, "n_head": 6, "n_kv_head": 6,
        "head_dim": 4, "d_model": 24, "d_ff": 40, "activation": "silu", "attention_scale": 0.5,
        **changes,
    })  # fmt: skip


def redraw(module):
    generator = torch.Generator().manual_seed(0)
    module.double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.2)
    return module


VARIANTS = {
    "learned": config(),
    "grouped": config(n_kv_head=2),
    "one key head": config(n_kv_head=1),
    "rotary": config(position="rotary", rotary_fraction=0.5),
    "rotary, gated, rms": config(
        position="rotary", gated=True, norm="rmsnorm", norm_bias=False, mlp_bias=False,
        qkv_bias=False, out_bias=False, n_kv_head=3,
    ),
    "layernorm1p, untied": config(norm="layernorm1p", tied_head=False),
    "inverse layer scale": config(inverse_layer_scale=True),
}  # fmt: skip


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_chunks_of_any_size_give_the_same_logits(shape):
    """One prefill, token by token, and a few at a time: unequal rows in slots out of order."""
    decoder = redraw(Decoder(shape))
    rows = [[5, 9, 2, 11, 40, 3, 3], [66, 1, 8, 21, 5, 6, 7]]
    whole = decoder(Step.prefill(rows))
    cache = KVCache(shape, 3, 32, dtype=torch.float64)
    slots = torch.tensor([2, 0])
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 7)):
        tokens = torch.tensor([r[first:last] for r in rows])
        starts, lengths = torch.tensor([first] * 2), torch.tensor([last - first] * 2)
        parts.append(decoder(Step(slots, tokens, starts, lengths), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_padding_is_written_nowhere(position):
    """A row that ends where the cache and the positions do is padded: others get more tokens."""
    shape = config(n_positions=8, position=position)
    decoder, prompt = redraw(Decoder(shape)), [5, 9, 2, 11, 40, 3, 3, 21]
    cache = KVCache(shape, 2, 8, dtype=torch.float64)
    decoder(Step.prefill([prompt[:6], [1]]), cache)
    tokens = torch.tensor([[*prompt[6:], 66, 65], [1, 8, 21, 5]])
    step = Step(torch.tensor([0, 1]), tokens, torch.tensor([6, 1]), torch.tensor([2, 4]))
    expected = decoder(Step.prefill([prompt]))[0, 6:]
    torch.testing.assert_close(decoder(step, cache)[0, :2], expected, atol=1e-12, rtol=0)


def test_rotary_goes_on_beyond_the_trained_positions():
    """They bound a learned table alone: what a longer context sees and how far away is the same."""
    prompt = [[(7 * i) % 67 for i in range(20)]]
    short, long = (config(position="rotary", n_positions=n) for n in (8, 32))
    expected = redraw(Decoder(long))(Step.prefill(prompt))
    torch.testing.assert_close(redraw(Decoder(short))(Step.prefill(prompt)), expected)


def test_a_row_may_step_back():
    """Rejected draft tokens are overwritten: what the cache held beyond is not seen."""
    shape = config()
    decoder = redraw(Decoder(shape))
    cache = KVCache(shape, 1, 32, dtype=torch.float64)
    decoder(Step.prefill([[5, 9, 2, 60, 61, 62]]), cache)
    one = torch.ones(1, dtype=torch.int64)
    again = decoder(Step(one * 0, torch.tensor([[11]]), one * 3, one), cache)
    expected = decoder(Step.prefill([[5, 9, 2, 11]]))[:, -1:]
    torch.testing.assert_close(again, expected, atol=1e-12, rtol=0)


def test_slots_are_copied_as_if_at_once():
    cache = KVCache(config(), 3, 4)
    cache.keys.copy_(torch.arange(3.0).view(1, 3, 1, 1, 1).expand_as(cache.keys))
    cache.values.copy_(cache.keys)
    cache.copy_slots(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]))
    assert cache.keys[0, :, 0, 0, 0].tolist() == [1, 0, 1]
    assert cache.values[1, :, 0, 0, 0].tolist() == [1, 0, 1]


def test_attention_against_a_loop():
    """Vaswani et al. 2017, equation 1, spelt out head by head and query by query."""
    shape = config(n_kv_head=2, inverse_layer_scale=True)
    attention = redraw(Attention(shape, layer=2))
    x = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = attention(x, torch.arange(5)[None], None, Step.prefill([[0] * 5]))
    qkv = (x[0] @ attention.qkv.weight.T + attention.qkv.bias).view(5, 10, 4)
    heads = torch.zeros(5, 6, 4, dtype=torch.float64)
    for head in range(6):
        key, value = qkv[:, 6 + head // 3], qkv[:, 8 + head // 3]
        for i in range(5):
            scores = [math.exp(0.5 / 3 * float(qkv[i, head] @ key[j])) for j in range(i + 1)]
            for j, score in enumerate(scores):
                heads[i, head] += score / sum(scores) * value[j]
    expected = heads.flatten(1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_rotation_by_complex_numbers():
    """Su et al. 2021: element i and i + half are one complex number, turned by its angle."""
    shape = config(head_dim=12, rotary_fraction=2 / 3, position="rotary", rotary_base=500.0)
    x = torch.randn(1, 1, 7, 12, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 9, 30, 4, 3]])
    found = rotate(x, rotary_angles(shape, positions, torch.float64))[0, 0]
    turned = torch.complex(x[0, 0, :, :4], x[0, 0, :, 4:8])
    frequency = torch.tensor([500.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    angle = positions[0][:, None] * frequency
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag, x[0, 0, :, 8:]], dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["layernorm", "layernorm1p", "rmsnorm"])
def test_norms_by_their_formulas(kind):
    norm = redraw(Norm(config(norm=kind, norm_bias=kind != "rmsnorm", norm_eps=0.03)))
    x = torch.randn(3, 24, dtype=torch.float64)
    if kind == "rmsnorm":
        expected = x / (x.square().mean(-1, keepdim=True) + 0.03).sqrt() * norm.weight
    else:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 0.03).sqrt()
        expected = scaled * (norm.weight + (kind == "layernorm1p")) + norm.bias
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)


FORMULAS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_by_their_formulas(name):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, atol=1e-12, rtol=0)
    assert ACTIVATIONS.keys() == FORMULAS.keys()


def test_the_whole_against_llama():
    """Rotary positions, grouped keys, RMS norm, a gated SiLU and no biases, as transformers has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config(
        position="rotary", gated=True, norm="rmsnorm", norm_bias=False, mlp_bias=False,
        qkv_bias=False, out_bias=False, n_kv_head=3, tied_head=False, norm_eps=1e-6,
    )  # fmt: skip
    theirs = redraw(LlamaForCausalLM(LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, rms_norm_eps=1e-6, attention_bias=False,
        tie_word_embeddings=False, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )))  # fmt: skip
    ours = Decoder(shape).double().requires_grad_(False)
    state = {"embedding.weight": theirs.model.embed_tokens.weight, "head.weight":
             theirs.lm_head.weight, "norm.weight": theirs.model.norm.weight}  # fmt: skip
    for i, layer in enumerate(theirs.model.layers):
        a, m = layer.self_attn, layer.mlp
        state |= {
            f"layers.{i}.norm1.weight": layer.input_layernorm.weight,
            f"layers.{i}.norm2.weight": layer.post_attention_layernorm.weight,
            f"layers.{i}.attention.qkv.weight": torch.cat(
                [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]
            ),
            f"layers.{i}.attention.out.weight": a.o_proj.weight,
            f"layers.{i}.mlp.up.weight": torch.cat([m.gate_proj.weight, m.up_proj.weight]),
            f"layers.{i}.mlp.down.weight": m.down_proj.weight,
        }
    ours.load_state_dict(state)
    tokens = [[5, 9, 2, 66, 0, 17]]
    expected = theirs(torch.tensor(tokens)).logits
    # transformers makes the rotary table in float32, whatever the weights are
    torch.testing.assert_close(ours(Step.prefill(tokens)), expected, atol=1e-5, rtol=0)


def test_prompt_table_rows_stand_for_ids_beyond_the_vocabulary():
    shape = config()
    decoder = redraw(Decoder(shape))
    with_words = decoder(Step.prefill([[5, 9, 2]]))
    decoder.prompt_table = decoder.embedding.weight[[5, 9]].clone()
    found = decoder(Step.prefill([[67, 68, 2]]))
    torch.testing.assert_close(found, with_words, atol=1e-12, rtol=0)


def test_a_meta_decoder_holds_no_memory_and_every_name():
    huge = config(vocab_size=50257, d_model=12288, d_ff=49152, n_layer=96, head_dim=2048)
    state = meta_decoder(huge).state_dict()
    assert all(t.device.type == "meta" for t in state.values())
    assert state["layers.95.mlp.up.weight"].shape == (49152, 12288)
    assert "head.weight" not in state
    assert "head.weight" in meta_decoder(config(tied_head=False)).state_dict()


def test_a_trace_names_every_operation():
    decoder = redraw(Decoder(config()))
    record = traced(decoder, Step.prefill([[5, 9, 2]]))
    assert record["logits"].equal(decoder(Step.prefill([[5, 9, 2]])))
    qkv = decoder.layers[1].attention.qkv
    found, given = record["layers.1.attention.qkv.out"], record["layers.1.attention.qkv.in"]
    torch.testing.assert_close(found, qkv(given))
    assert {"embedding.out", "position.out", "norm.out", "layers.0.mlp.down.in"} <= record.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_kv_head": 4}, "n_head 6 is not a multiple of n_kv_head 4"),
        ({"position": "rotary", "rotary_fraction": 0.75}, "rotary dimension 3 is odd"),
        ({"norm": "rmsnorm"}, "rmsnorm has no bias"),
        ({"vocab_size": 1 << 30}, "vocab_size"),
        ({"attention_scale": 0.0}, "attention_scale"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_shapes_that_cannot_be(changes, said):
    with pytest.raises(ValidationError, match=said):
        config(**changes)
