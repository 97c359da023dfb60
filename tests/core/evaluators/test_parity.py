"""`verify` passes a sound engine, and catches, places and explains one that is damaged."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from porttool.cli import invoke
from porttool.config import InfillTokens, PromptTemplate, SpecialTokens
from porttool.engine import Engine, choose_limits
from porttool.engines.torch.runner import TorchRunner
from porttool.errors import CheckFailed, UsageError
from porttool.evaluators.accounting import Derivation, check_weights, judge_config
from porttool.evaluators.damage import Damage
from porttool.evaluators.hypotheses import find_mistake
from porttool.evaluators.logits import BOUNDS, WORST_FACTOR, first_wrong, judge_logits, measure
from porttool.evaluators.parity import verify
from porttool.evaluators.transformers_folder import end_ids
from porttool.nn import Step
from porttool.plugins import choose_converter, load_registry
from porttool.progress import SILENT, Progress
from porttool.weights import take
from porttool_gpt2.converter import GPT2Converter

CPU = {"device": "cpu"}
LADDER = ["config", "end tokens", "weights", "prefill", "decode", "decode, several tokens a step",
          "greedy tokens"]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Inverse layer scaling, and an activation that is not the default one."""
    model = tiny.gpt2(seed=2, scale_attn_by_inverse_layer_idx=True)
    return tiny.write_source(tmp_path_factory.mktemp("parity") / "source", model)


@pytest.fixture(scope="module")
def checkpoint(source):
    return tiny.converted(source, source.parent / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint):
    return tiny.built(checkpoint, checkpoint.path.parent / "engine")


@pytest.fixture
def verified(source, tmp_path):
    """Verify a runner or an engine against the source; return the report."""

    def run(subject, **options):
        runner = TorchRunner(subject, CPU) if isinstance(subject, Engine) else subject
        converter = choose_converter(load_registry(), source)
        return verify(
            runner=runner, source=source, converter=converter, output=tmp_path / "out",
            options={"prompt_len": 16, "new_tokens": 8, **options},
        )  # fmt: skip

    return run


def outcome(report):
    return {v.name: v.passed for v in report.verdicts}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_sound_engine_passes_every_rung(checkpoint, verified, tmp_path, dtype):
    report = verified(tiny.built(checkpoint, tmp_path / "engine", dtype=dtype))
    more = ["arithmetic in float32"] if "16" in dtype else []
    assert [v.name for v in report.verdicts] == LADDER + more
    assert report.passed, report.verdicts
    report.require_pass()
    saved = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert saved["evaluator"] == "parity"
    assert all(v["passed"] is True for v in saved["verdicts"])


@pytest.mark.parametrize(
    ("damage", "rungs", "place", "cause"),
    [
        ("scrambled layer", {"weights"}, "layers.1.attention.qkv.out", None),
        ("swapped norms", {"weights"}, "layers.0.norm1.out", "norm1 and norm2 are swapped"),
        ("other gelu", {"config"}, "layers.0.mlp.down.in", "the activation is gelu, not gelu_tanh"),
        ("shifted positions", {"weights"}, "position.out", "positions are one too high"),
        ("transposed projection", {"weights"}, "layers.0.attention.out.out", None),
        ("keys and values swapped", {"weights"}, "layers.0.attention.qkv.out", None),
        ("noise of 2 %", {"weights"}, "embedding.out", None),
        ("noise of int8", {"weights"}, "embedding.out", None),
        ("no 1/(layer + 1)", {"config"}, "layers.1.attention.out.in", "lacks the factor"),
        ("no attention scale", {"config"}, "layers.0.attention.out.in", "is not scaled"),
        ("epsilon of 1e-3", {"config"}, "layers.0.norm1.out", None),
    ],
)
def test_damage_is_caught_and_placed(engine, verified, tmp_path, damage, rungs, place, cause):
    report = verified(Damage(damage).apply(engine, tmp_path / "damaged"))
    failed = {name for name, passed in outcome(report).items() if not passed}
    assert rungs | {"prefill", "decode"} <= failed
    assert not ({"config", "weights"} - rungs) & failed
    assert report.measurements["first_difference"] == place
    assert any(f"first differs at {place}" in note for note in report.notes)
    found = report.measurements.get("cause")
    assert cause in found if cause else found is None
    with pytest.raises(CheckFailed, match="prefill: NMSE"):
        report.require_pass()


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        ("swapped norms", "layers.0.norm1.weight: holds layers.0.norm2.weight"),
        ("shifted positions", "position.weight: its rows are shifted by one"),
        ("transposed projection", "layers.0.attention.out.weight: is transposed"),
        ("scrambled layer", "layers.1.attention.qkv.weight: the same values in another order"),
        ("noise of 2 %", "embedding.weight: off by 2.0"),
    ],
)
def test_weights_say_how_they_differ(engine, source, tmp_path, damage, how):
    damaged = Damage(damage).apply(engine, tmp_path / "damaged")
    check = check_weights(damaged, derivation_of(source), progress=SILENT)
    assert how in "; ".join(f"{n}: {d}" for n, d in check.differing.items())


def test_another_way_to_ask_than_the_sources_fails(engine, source):
    """The template, and the tokens for infilling: no logit shows them."""
    derivation = derivation_of(source)
    assert judge_config(engine.manifest, derivation).passed
    derivation.prompt = PromptTemplate(
        plain="{instruction}", with_input="{input}", answer_marker=""
    )
    said = judge_config(engine.manifest, derivation)
    assert (said.passed, said.detail[:33]) == (False, "prompt is None, should be plain='")
    derivation = derivation_of(source)
    infill = InfillTokens(prefix="<p>", middle="<m>", suffix="<s>")
    derivation.source = replace(derivation.source, infill=infill)
    said = judge_config(engine.manifest, derivation)
    assert (said.passed, said.detail[:34]) == (False, "infill is None, should be prefix='")


@pytest.mark.parametrize("eos", [(13,), (), (66, 13)])
def test_other_end_tokens_than_the_sources(engine, verified, tmp_path, eos):
    """They change no logit, and both sides of `summarize` are given the engine's."""
    copy = shutil.copytree(engine.path, tmp_path / "engine")
    tiny.edit_manifest(copy / "engine.json", tokens={"bos": 66, "eos": eos, "pad": 65})
    report = verified(Engine.open(copy))
    assert {n for n, passed in outcome(report).items() if not passed} == {"config", "end tokens"}
    [config, ends] = report.verdicts[:2]
    assert config.detail == f"eos is {eos}, should be (66,)"
    assert (ends.found, ends.bound) == (", ".join(map(str, sorted(eos))) or "none", "66")


def test_end_tokens_that_are_read_wrongly_are_seen_by_the_reference(
    source, verified, tmp_path, monkeypatch
):
    """Where the family's own reading is wrong, the engine agrees with that."""
    wrong = SpecialTokens(eos=(13,))
    monkeypatch.setattr(GPT2Converter, "special_tokens", lambda *_: wrong)
    built = tiny.built(tiny.converted(source, tmp_path / "checkpoint"), tmp_path / "engine")
    report = verified(built)
    assert {n for n, passed in outcome(report).items() if not passed} == {"end tokens"}


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (7, None, (7,)), (7, [5, 6], (5, 6)), ([7, 8], None, (7, 8)), (None, None, ()),
        (900, None, ()), (7, [8, 900], (8,)),
    ],
)  # fmt: skip
def test_where_transformers_ends(source, tmp_path, config, generation, wanted):
    folder = shutil.copytree(source, tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_ids(folder) == wanted


def derivation_of(source):
    return Derivation(choose_converter(load_registry(), source), source)


@pytest.mark.parametrize(
    ("ours", "theirs", "place", "cause"),
    [
        (("norm1", "norm2"), ("ln_2", "ln_1"), "layers.0.norm1.in", "or a weight rule that names"),
        (("norm2",), ("ln_1",), "layers.0.norm2.in", "or a weight rule that names another module"),
    ],
)
def test_a_wrong_weight_rule_is_among_the_causes(
    source, verified, tmp_path, monkeypatch, ours, theirs, place, cause
):
    right = GPT2Converter.weight_map

    def wrong(self, config):
        swapped = {
            f"layers.{{i}}.{a}.{part}": take(f"h.{{i}}.{b}.{part}")
            for a, b in zip(ours, theirs, strict=True)
            for part in ("weight", "bias")
        }
        table = right(self, config)
        return replace(table, rules={**table.rules, **swapped}, unused=(*table.unused, "*.ln_*"))

    monkeypatch.setattr(GPT2Converter, "weight_map", wrong)
    engine = tiny.built(tiny.converted(source, tmp_path / "checkpoint"), tmp_path / "engine")
    report = verified(engine)
    assert report.measurements["first_difference"] == place
    assert any(f"first differs at {place}" in n and cause in n for n in report.notes)


def test_half_precision_hides_no_noise(checkpoint, verified, tmp_path):
    sound = tiny.built(checkpoint, tmp_path / "engine", dtype="bfloat16")
    report = verified(Damage("noise of 2 %").apply(sound, tmp_path / "damaged"))
    assert outcome(report)["prefill"] is False
    assert "Hugging Face in bfloat16" in report.verdicts[3].detail


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_half_precision_hides_is_computed_in_float32(checkpoint, verified, tmp_path, dtype):
    sound = tiny.built(checkpoint, tmp_path / "engine", dtype=dtype)
    report = verified(Damage("other gelu").apply(sound, tmp_path / "damaged"))
    failed = {name for name, passed in outcome(report).items() if not passed}
    assert failed == {"config", "arithmetic in float32"}
    assert report.measurements["first_difference"] == "layers.0.mlp.down.in"
    assert "the activation is gelu, not gelu_tanh" in report.measurements["cause"]


def test_tensors_missing_or_too_many_are_named(engine, source, tmp_path):
    damaged = Damage("nothing").apply(engine, tmp_path / "copy")
    file = damaged.rank_path() / "model.safetensors"
    tensors = load_file(file)
    tensors["stray.weight"] = tensors.pop("layers.2.mlp.up.bias")
    save_file(tensors, file)
    verdict = check_weights(damaged, derivation_of(source), progress=SILENT).verdict
    assert verdict.passed is False
    assert "missing: layers.2.mlp.up.bias" in verdict.detail
    assert "not the model's: stray.weight" in verdict.detail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"stray.weight": torch.ones(2)}), "not the model's: stray.weight"),
        (lambda t: t["norm.bias"][3:4].mul_(1 + 2**-20), "norm.bias: off by "),
    ],
    ids=["one too many", "the last bits of one number"],
)
def test_one_thing_that_is_not_the_source_s_fails(engine, source, tmp_path, change, said):
    """No logit shows either."""
    damaged = Damage("nothing").apply(engine, tmp_path / "copy")
    file = damaged.rank_path() / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    verdict = check_weights(damaged, derivation_of(source), progress=SILENT).verdict
    assert (verdict.passed, verdict.detail.startswith(said)) == (False, True), verdict.detail


def test_weights_rounded_on_their_way_are_accepted_and_said(source, tmp_path):
    narrow = tiny.converted(source, tmp_path / "narrow", dtype="bfloat16")
    built = tiny.built(narrow, tmp_path / "engine", dtype="float32")
    check = check_weights(built, derivation_of(source), progress=SILENT)
    assert check.verdict.passed
    assert check.through == "bfloat16"


def test_two_ranks_are_put_together(source, tmp_path):
    from porttool.builder import Rank
    from porttool.evaluators.accounting import compare_tensor
    from porttool.sharding import shard

    derivation = derivation_of(source)
    whole = derivation.tensor("layers.0.mlp.up.weight")
    for index in (0, 1):
        rank = Rank(index, 2)
        part = shard("layers.0.mlp.up.weight", derivation.config, rank,
                     lambda a, b: whole[a:b], len(whole))  # fmt: skip
        assert compare_tensor("layers.0.mlp.up.weight", part, derivation, rank) == ("", "")
        wrong, _ = compare_tensor("layers.0.mlp.up.weight", part, derivation, Rank(1 - index, 2))
        assert wrong


def test_a_tensor_that_one_rank_lacks_is_missing(source, tmp_path):
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    built = tiny.built(checkpoint, tmp_path / "engine", world_size=3)
    assert check_weights(built, derivation_of(source), progress=SILENT).verdict.passed
    file = built.rank_path(1) / "model.safetensors"
    tensors = load_file(file)
    del tensors["norm.bias"]
    save_file(tensors, file)
    verdict = check_weights(built, derivation_of(source), progress=SILENT).verdict
    assert (verdict.passed, verdict.detail) == (False, "missing: norm.bias")


class LateWriter(TorchRunner):
    """Writes and reads the cache one place too early once a row has begun."""

    def step(self, step, *, all_positions=False):
        begun = (step.starts > 0).to(torch.int64)
        moved = Step(step.slots, step.tokens, step.starts - begun, step.lengths)
        return super().step(moved, all_positions=all_positions)


class RowMixer(TorchRunner):
    """Takes every row of a decode step for its neighbour."""

    def step(self, step, *, all_positions=False):
        slots = step.slots if int(step.starts.max()) == 0 else step.slots.flip(0)
        moved = Step(slots, step.tokens, step.starts, step.lengths)
        return super().step(moved, all_positions=all_positions)


class OneTokenOnly(TorchRunner):
    """Right with one token a step, wrong with several."""

    def step(self, step, *, all_positions=False):
        if int(step.starts.max()) > 0 and step.tokens.shape[1] > 1:
            step = Step(step.slots, step.tokens.flip(1), step.starts, step.lengths)
        return super().step(step, all_positions=all_positions)


class SlotForgetter(TorchRunner):
    """Takes a row's place in a decode step for its slot: right where the two are the same."""

    def step(self, step, *, all_positions=False):
        slots = step.slots if int(step.starts.max()) == 0 else torch.arange(len(step.slots))
        moved = Step(slots, step.tokens, step.starts, step.lengths)
        return super().step(moved, all_positions=all_positions)


@pytest.mark.parametrize(
    ("runner", "failed"),
    [
        (LateWriter, {"decode", "decode, several tokens a step"}),
        (SlotForgetter, {"decode", "decode, several tokens a step"}),
        (RowMixer, {"decode", "decode, several tokens a step"}),
        (OneTokenOnly, {"decode, several tokens a step"}),
    ],
)
def test_broken_cache_is_told_from_broken_arithmetic(engine, verified, runner, failed):
    report = verified(runner(engine, CPU))
    wrong = {n for n, passed in outcome(report).items() if not passed}
    assert wrong - {"greedy tokens"} == failed
    assert report.measurements["cause"] == "cache"
    assert any("likely the cache" in note for note in report.notes)
    if runner is OneTokenOnly:
        assert any("with several tokens a step" in note for note in report.notes)


class Drifter(TorchRunner):
    """Every logit of a decoded token a little off: other arithmetic than prefill's."""

    def step(self, step, *, all_positions=False):
        logits = super().step(step, all_positions=all_positions)
        if int(step.starts.max()) > 0:
            logits = logits * (1 + 3e-5 * torch.arange(logits.shape[-1]).remainder(2))
        return logits


def test_arithmetic_of_decode_alone_is_not_called_the_cache(engine, verified):
    report = verified(Drifter(engine, CPU))
    wrong = {n for n, passed in outcome(report).items() if not passed}
    assert wrong == {"decode", "decode, several tokens a step"}
    assert report.measurements["cause"] == "arithmetic of decode"
    assert any("without a jump; likely the arithmetic of decode" in note for note in report.notes)


class ShortSighted(TorchRunner):
    """Takes every token of a long prompt for the last."""

    def step(self, step, *, all_positions=False):
        tokens = step.tokens.clone()
        if tokens.shape[1] > 30:
            tokens[:, :-1] = tokens[:, -1:]
        moved = Step(step.slots, tokens, step.starts, step.lengths)
        return super().step(moved, all_positions=all_positions)


class Forgetful(TorchRunner):
    """Writes and reads the cache one place too early beyond 40 tokens."""

    def step(self, step, *, all_positions=False):
        late = (step.starts > 40).to(torch.int64)
        moved = Step(step.slots, step.tokens, step.starts - late, step.lengths)
        return super().step(moved, all_positions=all_positions)


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        (TorchRunner, None),
        (ShortSighted, "a prompt of 40 tokens does not agree, a prompt of 20 tokens agrees"),
        (Forgetful, "prompts of up to 40 tokens agree, what follows does not, from new token 1"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_with_long_contexts_alone(
    checkpoint, verified, tmp_path, runner, said, dtype
):
    limits = choose_limits(checkpoint.config, max_input_len=40, max_output_len=8)
    built = tiny.built(checkpoint, tmp_path / "engine", limits=limits, dtype=dtype)
    report = verified(runner(built, CPU), prompt_len=9, new_tokens=8)
    failed = {n for n, passed in outcome(report).items() if not passed}
    assert failed == ({"long contexts"} if said else set())
    [found] = [v for v in report.verdicts if v.name == "long contexts"]
    assert "prompts of 20, 40 tokens, 8 more" in found.detail
    assert ("Hugging Face in bfloat16" in found.detail) is (dtype == "bfloat16")
    assert not said or any(note.startswith(said) for note in report.notes)
    without = verified(runner(built, CPU), prompt_len=9, new_tokens=8, long_contexts=False)
    assert without.passed
    assert "long contexts are not compared: long_contexts is false" in without.notes


class Told(Progress):
    """What was begun, how much of it there is and how much was done."""

    def __init__(self):
        self.work = {}

    def start(self, label, total, *, unit="B"):
        self.work[label] = [total, 0]
        self.label = label

    def advance(self, amount):
        self.work[self.label][1] += amount


def test_long_work_is_told_to_its_end(checkpoint, source, tmp_path):
    limits = choose_limits(checkpoint.config, max_input_len=40, max_output_len=8)
    built = tiny.built(checkpoint, tmp_path / "engine", limits=limits, dtype="bfloat16")
    told = Told()
    options = {"prompt_len": 9, "new_tokens": 8}
    verify(
        runner=TorchRunner(built, CPU), source=source, output=tmp_path / "out", options=options,
        progress=told,
    )  # fmt: skip
    assert told.work["long contexts"] == [20 + 40 + 8] * 2
    assert told.work["reference"] == [1 + 2 * (6 + 1)] * 2  # six prompts, in two types


class NoisyKernel(TorchRunner):
    """Right weights, wrong arithmetic."""

    def step(self, step, *, all_positions=False):
        logits = super().step(step, all_positions=all_positions)
        return logits + 0.01 * torch.sin(torch.arange(logits.shape[-1]))


class Opaque(NoisyKernel):
    traces = False


@pytest.mark.parametrize(("runner", "whose"), [(NoisyKernel, "engine's"), (Opaque, "source's")])
def test_wrong_arithmetic_on_right_weights_is_the_engines_own(engine, verified, runner, whose):
    report = verified(runner(engine, CPU))
    assert outcome(report)["prefill"] is False
    assert report.measurements["first_difference"] is None
    assert any(
        f"on the {whose} weights agrees" in n and "torch engine's own arithmetic" in n
        for n in report.notes
    )


class HastyDecoder(TorchRunner):
    """Gives the right logits, but the wrong tokens when it decodes by itself."""

    decodes_on_device = True

    def decode(self, step, n_tokens, choose=None):
        return torch.zeros(len(step.slots), n_tokens, dtype=torch.int64)


def test_wrong_tokens_on_right_logits(engine, verified):
    report = verified(HastyDecoder(engine, CPU))
    assert {n for n, p in outcome(report).items() if not p} == {"greedy tokens"}
    assert any("the logits agree but the tokens do not" in note for note in report.notes)


def test_nan_never_passes(engine, verified):
    class Broken(TorchRunner):
        def step(self, step, *, all_positions=False):
            return super().step(step, all_positions=all_positions) * float("nan")

    report = verified(Broken(engine, CPU), diagnose=False)
    assert outcome(report)["prefill"] is False
    assert outcome(report)["decode"] is False
    [prefill] = [v for v in report.verdicts if v.name == "prefill"]
    n = report.measurements["prefill"]["n_positions"]
    assert (prefill.found, prefill.detail) == ("NaN or infinity", (
        f"logits that are NaN or infinite: the engine's at {n} of {n}, Hugging Face's at none of "
        f"{n} positions; first in prompt 0 at position 0"
    ))  # fmt: skip


@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
def test_what_is_no_number_is_counted_and_placed(side):
    ours = [torch.randn(4, 9), torch.randn(5, 9)]
    theirs = [row.clone() for row in ours]
    for rows in {"ours": [ours], "theirs": [theirs], "both": [ours, theirs]}[side]:
        rows[1][2:, 3] = float("nan")
        rows[1][4, 3] = float("inf")
    found = measure(ours, theirs)
    counts = (0 if side == "theirs" else 3, 0 if side == "ours" else 3)
    assert (found.ours_nonfinite, found.theirs_nonfinite) == counts
    assert (found.row, found.position, found.worst, found.nmse) == (1, 2, math.inf, math.inf)
    assert found.cosine == -1
    assert judge_logits("prefill", found, "bfloat16", found).passed is False
    assert first_wrong(ours[1], theirs[1], 1.0) == 2


def test_a_yardstick_that_is_no_number_is_none():
    theirs = [torch.randn(4, 9, dtype=torch.float64)]
    own = measure([theirs[0] * float("nan")], theirs)
    for ours, passed in ((theirs[0] + 1e-9, True), (theirs[0] + 9, False)):
        verdict = judge_logits("prefill", measure([ours], theirs), "float16", own)
        assert verdict.passed is passed
        assert verdict.detail.endswith(
            "no yardstick: Hugging Face in float16 has logits that are NaN or infinite"
        )
        assert "nan" not in verdict.bound


def test_one_logit_that_is_far_off_fails_among_any_number_that_are_right():
    """The mean of the squares would not see it."""
    theirs = torch.randn(500, 400, dtype=torch.float64)
    ours = theirs.clone()
    ours[123, 45] += 1e-3
    found = measure([ours], [theirs])
    verdict = judge_logits("prefill", found, "float32")
    assert found.nmse < BOUNDS["float32"].nmse / 10
    assert (found.position, verdict.passed) == (123, False)


@pytest.mark.parametrize(("times", "passed"), [(1.9, True), (2.1, False)])
def test_four_times_the_yardstick_s_squared_error_is_too_much(times, passed):
    """Also where the largest error is no larger, and where the type's own bound is wider."""
    theirs = torch.randn(50, 400, dtype=torch.float64)
    noise = 1e-4 * torch.randn(50, 400, dtype=torch.float64).sign()
    own = measure([theirs + noise], [theirs])
    found = measure([theirs + times * noise], [theirs])
    verdict = judge_logits("prefill", found, "bfloat16", own)
    assert found.worst < WORST_FACTOR * own.worst
    assert judge_logits("prefill", found, "bfloat16").passed
    assert verdict.passed is passed


def test_weights_that_are_no_numbers_are_said_to_be(tmp_path, capsys):
    """Converted as they are, they fail in plain words; the place is found, on both sides."""
    model = tiny.gpt2()
    model.transformer.ln_f.weight[3] = float("nan")
    source = tiny.write_source(tmp_path / "source", model)
    checkpoint, engine = str(tmp_path / "checkpoint"), str(tmp_path / "engine")
    assert invoke(["convert", str(source), "-o", checkpoint, "--allow-nonfinite"]) == 0
    assert invoke(["build", checkpoint, "-o", engine]) == 0
    capsys.readouterr()
    assert invoke(["verify", engine, "--runner-set", "device", "cpu"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "norm.weight: 1 of 24 values NaN or infinite in the engine, 1 in the source" in said
    assert "first differs at norm.out (NaN or infinity on both sides, norm.in still" in said
    assert "nan" not in said


def test_what_is_no_number_has_no_cause_among_the_mistakes(source):
    converter = choose_converter(load_registry(), source)
    derivation = Derivation(converter, source)
    weights = {name: derivation.tensor(name) for name in derivation.shapes}
    logits = torch.full((4, derivation.config.vocab_size), float("nan"))
    assert find_mistake(derivation.config, weights, [1, 2, 3, 4], logits) is None


def test_a_source_of_other_sizes_is_refused(engine, tmp_path):
    other = tiny.write_source(tmp_path / "other", tiny.gpt2(vocab_size=500))
    with pytest.raises(UsageError, match="is not the engine's model: it has vocab_size 500, not"):
        verify(runner=TorchRunner(engine, CPU), source=other, output=tmp_path / "out")


def test_a_source_that_is_gone_is_named(source, tmp_path):
    moved = shutil.copytree(source, tmp_path / "moved")
    built = tiny.built(tiny.converted(moved, tmp_path / "checkpoint"), tmp_path / "engine")
    shutil.rmtree(moved)
    with pytest.raises(UsageError, match=r"moved, which the engine was converted from, is no lon"):
        verify(runner=TorchRunner(built, CPU), source=None, output=tmp_path / "out")


def test_a_report_in_the_place_of_a_file_is_refused(engine, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert invoke(["verify", str(engine.path), "--output", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_verify_needs_the_source(engine, tmp_path):
    with pytest.raises(UsageError, match="name the folder with --hf-model"):
        verify(runner=TorchRunner(engine, CPU), source=None, converter=None,
               output=tmp_path / "out")  # fmt: skip


def test_texts_need_a_tokenizer(verified, engine):
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        verified(engine, texts=("Hello.",))


def test_an_engine_for_one_new_token_cannot_be_verified(checkpoint, verified, tmp_path):
    limits = choose_limits(checkpoint.config, max_output_len=1)
    with pytest.raises(UsageError, match="--max-output-len 2"):
        verified(tiny.built(checkpoint, tmp_path / "engine", limits=limits))


def test_unknown_option_is_named(verified, engine):
    with pytest.raises(UsageError, match="n_promts"):
        verified(engine, n_promts=3)
