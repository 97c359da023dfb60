"""The trained demo model: a sound port passes on real text, a damaged one does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import damage_matrix
import tiny
from porttool.checkpoint import Checkpoint
from porttool.cli import invoke as porttool
from porttool.engines.torch.runner import TorchRunner
from porttool.errors import CheckFailed
from porttool.evaluators.damage import Damage
from porttool.evaluators.parity import verify
from porttool.evaluators.summarize import summarize
from porttool.plugins import choose_converter, load_registry
from porttool.text import load_tokenizer

DEMO = Path(__file__).parent.parent / "examples" / "demo"
SOURCE = DEMO / "gpt2-news"
CPU = {"device": "cpu"}
RECIPE = {
    "dataset": str(DEMO / "articles.jsonl"), "max_articles": 16, "max_new_tokens": 60,
    "max_input_len": 412,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return tiny.built(tiny.converted(SOURCE, folder / "checkpoint"), folder / "engine")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The reference's results, made once and compared with every engine."""
    folder = tmp_path_factory.mktemp("reference")
    options = {**RECIPE, "yardstick": False}
    converter = choose_converter(load_registry(), SOURCE)
    assert not summarize(
        source=SOURCE, converter=converter, output=folder, options=options
    ).verdicts
    return folder / "reference.json"


@pytest.fixture
def summarized(reference, tmp_path):
    def run(engine, **options):
        (tmp_path / "out").mkdir()
        shutil.copy(reference, tmp_path / "out")
        return summarize(
            runner=TorchRunner(engine, CPU), tokenizer=load_tokenizer(engine.tokenizer),
            output=tmp_path / "out", options={**RECIPE, **options},
        )  # fmt: skip

    return run


def failures(report):
    return {v.name for v in report.verdicts if v.passed is not True}


def test_the_trained_model_passes_and_its_summaries_are_good(summarized, engine):
    report = summarized(engine, rouge1_threshold=70)
    report.require_pass()
    assert "rouge1 threshold" in {v.name for v in report.verdicts}


def test_a_model_that_learnt_nothing_does_not(summarized, engine, tmp_path):
    damaged = Damage("every matrix scrambled").apply(engine, tmp_path / "damaged")
    report = summarized(damaged, rouge1_threshold=70)
    assert {"rouge1 not inferior", "token agreement", "rouge1 threshold"} <= failures(report)


@pytest.mark.parametrize(
    ("damage", "caught"),
    [
        ("scrambled layer", {"rouge1 not inferior", "token agreement", "log-probability drift"}),
        ("other gelu", {"log-probability drift"}),
        ("noise of int4", {"rouge1 not inferior", "token agreement", "log-probability drift"}),
        ("noise of int8", {"log-probability drift"}),
        ("noise of 2 %", {"log-probability drift"}),
    ],
)
def test_summarize_catches_damage(summarized, engine, tmp_path, damage, caught):
    report = summarized(Damage(damage).apply(engine, tmp_path / "damaged"))
    assert caught <= failures(report)
    with pytest.raises(CheckFailed, match="log-probability drift"):
        report.require_pass()


RUN = ("--dataset", RECIPE["dataset"], "--max-articles", "12", "--max-new-tokens", "40",
       "--max-input-len", "412")  # fmt: skip


@pytest.fixture(scope="module")
def kept(engine, tmp_path_factory):
    """The reference's results, as `porttool summarize --test-hf` leaves them."""
    folder = tmp_path_factory.mktemp("kept")
    asked = ["summarize", str(engine.path), "--test-hf", "--hf-model", str(SOURCE)]
    assert porttool([*asked, "--output", str(folder), *RUN]) == 0
    return folder / "reference.json"


@pytest.mark.parametrize(
    ("damage", "dtype"),
    [
        ("nothing", "float16"),
        ("swapped norms", "float32"),
        ("other gelu", "float32"),
        ("other gelu", "float16"),
        ("epsilon of 1e-3", "bfloat16"),
        ("shifted positions", "float32"),
        ("transposed projection", "float32"),
        ("another group's head", "float32"),
    ],
)
def test_the_command_exits_with_1(engine, kept, tmp_path, capsys, damage, dtype):
    built = tiny.built(Checkpoint.open(engine.path.parent / "checkpoint"), tmp_path / "engine",
                       dtype=dtype)  # fmt: skip
    subject = Damage(damage).apply(built, tmp_path / "damaged")
    found = damage_matrix.summarized(subject, tmp_path / "out", kept, *RUN)
    capsys.readouterr()
    assert found["status"] == int(damage != "nothing"), found
    if damage != "nothing" and dtype != "float32":
        assert set(found["failed"]) == {"arithmetic in float32"}


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        ("nothing", None),
        ("scrambled layer", "layers.1.attention.qkv.out"),
        ("other gelu", "layers.0.mlp.down.in"),
        ("noise of int8", "embedding.out"),
    ],
)
def test_verify_catches_and_places_damage(engine, tmp_path, damage, place):
    subject = Damage(damage).apply(engine, tmp_path / "damaged")
    report = verify(
        runner=TorchRunner(subject, CPU), source=SOURCE, output=tmp_path / "out",
        tokenizer=load_tokenizer(SOURCE), converter=choose_converter(load_registry(), SOURCE),
    )  # fmt: skip
    assert report.passed is (place is None)
    assert report.measurements.get("first_difference") == place
    assert "tokenizer" not in failures(report)


def exact_gelu(layer):
    layer.mlp.act = torch.nn.functional.gelu


def smaller_epsilon(layer):
    layer.norm1.eps = layer.norm2.eps = 1e-6


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (None, None),
        (exact_gelu, "in the engine's own arithmetic: the activation is gelu, not gelu_tanh"),
        (smaller_epsilon, "in the engine's own arithmetic: the norms' epsilon is not 1e-05"),
    ],
)
def test_verify_finds_mistakes_of_a_float16_engine_below_its_rounding(
    engine, tmp_path, mistake, said
):
    """The config is right, so that nothing but the engine's own logits can show them."""
    checkpoint = Checkpoint.open(engine.path.parent / "checkpoint")
    built = tiny.built(checkpoint, tmp_path / "engine", dtype="float16")
    runner = TorchRunner(built, CPU if mistake is None else {**CPU, "canonical": True})
    for layer in runner._decoder.module.layers if mistake else ():
        mistake(layer)
    report = verify(
        runner=runner, source=SOURCE, output=tmp_path / "out",
        tokenizer=load_tokenizer(SOURCE), converter=choose_converter(load_registry(), SOURCE),
    )  # fmt: skip
    [found] = [v for v in report.verdicts if v.name == "mistakes below rounding"]
    shares = [abs(float(share)) for share in found.found.split(", ")]
    assert [share > 0.75 for share in shares] == [mistake is exact_gelu, mistake is smaller_epsilon]
    assert sum(share < 0.5 for share in shares) == (1 if mistake else 2)  # the bound
    assert failures(report) == ({"mistakes below rounding"} if said else set())
    assert [note for note in report.notes if "arithmetic" in note] == ([said] if said else [])
