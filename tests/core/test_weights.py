from __future__ import annotations

import math

import pytest
import torch

from porttool.config import ModelConfig
from porttool.errors import PluginError, SourceError
from porttool.sources.torch_file import TensorTree
from porttool.weights import (
    Take,
    WeightMap,
    cast,
    check_shapes,
    concat,
    interleaved_qkv,
    map_tensor,
    resolve_rules,
    take,
    transpose,
)

CONFIG = ModelConfig(
    vocab_size=11, n_positions=8, n_layer=1, n_head=4, n_kv_head=2, head_dim=3, d_model=12,
    d_ff=16, activation="gelu", attention_scale=1.0,
)  # fmt: skip


def tree(**tensors):
    return TensorTree(tensors, "weights.bin", mapped=False)


def test_rules_fill_in_the_layer():
    table = WeightMap({"layers.{i}.norm1.weight": take("h.{i}.ln"), "embedding.weight": take("e")})
    wanted = ["embedding.weight", "layers.0.norm1.weight", "layers.12.norm1.weight"]
    present = tree(**{n: torch.ones(1) for n in ("e", "h.0.ln", "h.12.ln")})
    found = resolve_rules(wanted, table, present.infos())
    assert [found[n].names for n in wanted] == [("e",), ("h.0.ln",), ("h.12.ln",)]


def test_missing_tensors_are_counted_and_named():
    table = WeightMap({f"w{i}": take(f"s{i}") for i in range(9)})
    with pytest.raises(SourceError, match=r"missing from the source: s0, s1, .*s5 and 3 more"):
        resolve_rules([f"w{i}" for i in range(9)], table, {})


def test_what_is_missing_is_told_beside_what_is_left_over():
    source = tree(**{"model.wte": torch.ones(1)})
    with pytest.raises(SourceError, match=r"source: wte \(read: .*\); what .* for: model\.wte$"):
        resolve_rules(["w"], WeightMap({"w": take("wte")}), source.infos())


def test_extra_tensors_are_named_with_their_file():
    source = tree(wte=torch.ones(1), stranger=torch.ones(1))
    with pytest.raises(SourceError, match=r"nothing accounts for in weights\.bin: stranger; the"):
        resolve_rules(["w"], WeightMap({"w": take("wte")}), source.infos())


def test_unused_and_duplicates_are_accounted_for():
    source = tree(wte=torch.ones(1), copy=torch.ones(1), **{"h.7.mask": torch.ones(1)})
    table = WeightMap({"w": take("wte")}, unused=("h.*.mask",), duplicates={"copy": "wte"})
    assert resolve_rules(["w"], table, source.infos()) == {"w": Take(("wte",))}


def test_a_misspelt_rule_is_named_beside_the_tensor_that_lacks_one():
    table = WeightMap({"layers.{i}.mlp.dwon.weight": take("x"), "norm.weight": take("y")})
    said = r"rule for 'layers\.\{i\}\.mlp\.down\.weight'; there is one for 'layers\..*dwon\.weight'"
    with pytest.raises(SourceError, match=said):
        resolve_rules(["layers.0.mlp.down.weight", "norm.weight"], table, {})


def test_a_plain_dictionary_is_no_weight_map():
    with pytest.raises(PluginError, match="weight_map returned a dict, not a WeightMap"):
        resolve_rules(["w"], {"w": take("w")}, {})


def via_of_one_argument(tensors):
    return tensors[0]


@pytest.mark.parametrize(
    ("via", "said"),
    [
        (via_of_one_argument, r"via_of_one_argument: TypeError: .* 1 positional argument but 2"),
        (lambda config, tensors: tensors[0].nothing, r"<lambda>: AttributeError: 'Tensor'"),
        (lambda config, tensors: tensors[0].tolist(), "<lambda> gives a list, not a tensor"),
    ],
)
def test_a_rule_that_fails_is_a_plugins_mistake(via, said):
    source, shapes, rules = tree(w=torch.ones(2)), {"norm": (2,)}, {"norm": take("w", via=via)}
    check_shapes(shapes, rules, source, CONFIG)  # on tensors without memory it is not judged
    with pytest.raises(PluginError, match=rf"^norm.*test_weights\..*{said}"):
        map_tensor("norm", (2,), rules["norm"], source, CONFIG)


def test_a_tensor_without_a_rule():
    with pytest.raises(SourceError, match=r"no weight rule for 'layers\.\{i\}\.extra'"):
        resolve_rules(["layers.3.extra"], WeightMap({}), {})


def test_wrong_shape_names_everything():
    source = tree(c=torch.ones(3, 4))
    with pytest.raises(SourceError) as caught:
        map_tensor("layers.0.x", (3, 4), take("c", via=transpose), source, CONFIG)
    assert str(caught.value) == (
        "layers.0.x should be [3, 4] but comes out as [4, 3] of c [3, 4] in weights.bin; "
        "the config and the weights disagree"
    )


def test_a_transform_that_cannot_work_names_its_tensors():
    source = tree(a=torch.ones(3, 4), b=torch.ones(3, 5))
    with pytest.raises(SourceError, match=r"q cannot be made of a \[3, 4\] in weights.bin, b \[3"):
        map_tensor("q", (6, 4), take("a", "b", via=concat), source, CONFIG)


def test_interleaved_qkv_against_a_loop():
    """Rows by key head: two queries, its key, its value; here spelt out one by one."""
    rows = torch.arange(2 * 4 * 3 * 5.0).view(24, 5)
    blocks = rows.view(2, 4, 3, 5)
    expected = torch.cat([
        *(blocks[g, q] for g in range(2) for q in range(2)),
        *(blocks[g, 2] for g in range(2)),
        *(blocks[g, 3] for g in range(2)),
    ])  # fmt: skip
    assert interleaved_qkv(CONFIG, [rows]).equal(expected)
    assert interleaved_qkv(CONFIG, list(rows.chunk(2))).equal(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("where", [0, 123, 999])
def test_nonfinite_is_refused_wherever_it_is(value, dtype, where):
    tensor = torch.randn(1000)
    tensor[where] = value
    with pytest.raises(SourceError, match=r"wte: holds NaN .*convert --allow-nonfinite`"):
        cast("wte", tensor, dtype)
    assert not cast("wte", tensor, dtype, allow_nonfinite=True).isfinite().all()


@pytest.mark.parametrize("shape", [(1000,), (40, 25)])
def test_opposite_infinities_do_not_cancel(shape):
    tensor = torch.zeros(shape)
    tensor.view(-1)[3], tensor.view(-1)[4] = float("inf"), float("-inf")
    with pytest.raises(SourceError, match="holds NaN or infinity"):
        cast("wte", tensor, "float32")


@pytest.mark.parametrize("allowed", [False, True])
def test_overflow_names_the_value_and_the_way_out(allowed):
    with pytest.raises(SourceError, match=r"wte: values up to 7e\+04 do not fit float16; choose"):
        cast("wte", torch.tensor([1.0, -70000.0]), "float16", allow_nonfinite=allowed)


@pytest.mark.parametrize("beside", [math.nan, math.inf])
def test_what_overflows_beside_infinity_is_refused_too(beside):
    tensor = torch.tensor([[1.0, beside], [2.0, 70000.0]])
    for each in (tensor, tensor.flatten(), tensor.t()):
        with pytest.raises(
            SourceError, match=r"wte: values up to 7e\+04 do not fit float16; choose"
        ):
            cast("wte", each, "float16", allow_nonfinite=True)
    found = cast("wte", tensor, "bfloat16", allow_nonfinite=True)
    assert found.float().equal(tensor.bfloat16().float()) or math.isnan(beside)
    assert found.isfinite().tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_that_overflows_is_not_an_error(dtype):
    """Large values of one sign: every element is finite though their sum is not."""
    tensor = torch.full((4096,), 3e38)
    assert cast("wte", tensor, dtype).equal(tensor.to(getattr(torch, dtype)))
    half = torch.full((4096,), 60000.0)
    assert cast("wte", half, "float16").equal(half.half())


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3), (515, 1030), (64, 64), (2048, 7)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_transposed_matrix_is_laid_out_exactly(shape, dtype):
    tensor = torch.randn(shape)
    result = cast("w", tensor.t(), dtype)
    assert result.is_contiguous()
    assert result.equal(tensor.to(getattr(torch, dtype)).t())
