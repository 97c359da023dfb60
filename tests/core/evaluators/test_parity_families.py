"""`verify` on families whose sources fuse, split and permute weights, or are no HF folder."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from porttool.converter import convert
from porttool.engines.torch.runner import TorchRunner
from porttool.evaluators.damage import Damage
from porttool.evaluators.parity import verify
from porttool.plugins import choose_converter, load_registry
from porttool.testing import REFERENCE
from porttool.weights import take
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt2.converter import GPT2Converter
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import BigCodeConformance

OPTIONS = {"prompt_len": 12, "new_tokens": 6}


@pytest.fixture(scope="module")
def bigcode(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigcode")
    BigCodeConformance().write_source(folder / "source", 0)
    checkpoint = tiny.converted(folder / "source", folder / "checkpoint")
    return folder / "source", tiny.built(checkpoint, folder / "engine", dtype="float32")


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemo")
    NemoConformance().write_source(folder / "source", 0)
    checkpoint = tiny.converted(folder / "source", folder / "checkpoint")
    return folder / "source", tiny.built(checkpoint, folder / "engine", dtype="float32")


def verified(engine, source, output, **sides):
    runner = TorchRunner(engine, {"device": "cpu"})
    return verify(runner=runner, source=source, output=output, options=OPTIONS, **sides)


@pytest.mark.parametrize(
    ("damage", "place", "cause"),
    [
        ("nothing", None, None),
        ("scrambled layer", "layers.1.attention.qkv.out", None),
        ("keys and values swapped", "layers.0.attention.qkv.out", None),
        ("other gelu", "layers.0.mlp.down.in", "the activation is gelu, not gelu_tanh"),
        ("no attention scale", "layers.0.attention.out.in", "attention is not scaled"),
    ],
)
def test_multi_query_attention(bigcode, tmp_path, damage, place, cause):
    source, engine = bigcode
    converter = choose_converter(load_registry(), source)
    damaged = Damage(damage).apply(engine, tmp_path / "damaged")
    report = verified(damaged, source, tmp_path / "out", converter=converter)
    assert report.passed is (place is None)
    assert report.measurements.get("first_difference") == place
    assert cause in report.measurements["cause"] if cause else "cause" not in report.measurements


def test_an_archive_beside_a_folder_that_transformers_reads(nemo, tmp_path):
    source, engine = nemo
    reference = source.with_name(REFERENCE)
    converter = choose_converter(load_registry(), source)
    sides = {"converter": converter, "origin": source}
    sound = verified(engine, reference, tmp_path / "sound", **sides)
    assert sound.passed, sound.verdicts
    assert [v.name for v in sound.verdicts][:2] == ["config", "weights"]
    (reference / "generation_config.json").write_text('{"eos_token_id": 7}')
    other = verified(engine, reference, tmp_path / "other", **sides)
    assert other.passed, "the folder stands in for what was converted: its end tokens are its own"
    assert any(
        "at the ids 7, the engine, as its own source says, at none" in n for n in other.notes
    )
    (reference / "generation_config.json").unlink()
    damaged = Damage("no attention scale").apply(engine, tmp_path / "damaged")
    report = verified(damaged, reference, tmp_path / "out", **sides)
    assert "attention is not scaled" in report.measurements["cause"]


def test_without_the_familys_rules_logits_are_compared_and_the_rest_is_said(nemo, tmp_path):
    source, engine = nemo
    reference = source.with_name(REFERENCE)
    report = verified(engine, reference, tmp_path / "sound")
    assert report.passed
    assert report.verdicts[0].name == "prefill"
    assert any("config and weights are not" in note for note in report.notes)
    damaged = Damage("swapped norms").apply(engine, tmp_path / "damaged")
    assert not verified(damaged, reference, tmp_path / "out").passed


class Untransposed(GPT2Converter):
    """A family with a rule that is wrong: a square matrix is not turned."""

    def weight_map(self, config):
        right = super().weight_map(config)
        wrong = {"layers.{i}.attention.out.weight": take("h.{i}.attn.c_proj.weight")}
        return replace(right, rules={**right.rules, **wrong})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rule_that_is_wrong_itself_is_caught_by_the_reference_alone(tmp_path, dtype):
    GPT2Conformance().write_source(tmp_path / "source", 0)
    registry = load_registry()
    plugin = registry.record(registry.converters, "gpt2")
    checkpoint = convert(Untransposed(), tmp_path / "source", tmp_path / "made", plugin=plugin)
    engine = tiny.built(checkpoint, tmp_path / "engine", dtype=dtype)
    report = verified(engine, tmp_path / "source", tmp_path / "out", converter=Untransposed())
    passed = {v.name for v in report.verdicts if v.passed}
    assert {"config", "weights"} <= passed
    assert not {"prefill", "decode", "arithmetic in float32"} & passed
    assert report.measurements["first_difference"] == "layers.0.attention.out.out"


def test_a_reference_of_other_weights_has_no_places(nemo, tmp_path):
    """Then no module can be told by what it holds, and the report says so."""
    source, engine = nemo
    other = tmp_path / "other"
    NemoConformance().write_source(other / "source", 1)
    sides = {"converter": choose_converter(load_registry(), source), "origin": source}
    report = verified(engine, other / REFERENCE, tmp_path / "out", **sides)
    assert not report.passed
    assert report.measurements["first_difference"] is None
    assert any("no module of the Hugging Face folder" in note for note in report.notes)
