"""Engines that decode on the device, stages, and what a page shows of a parity report."""

from __future__ import annotations

import pytest
import torch

import drawn
from porttool.engines.torch.runner import TorchRunner
from porttool.errors import UsageError
from porttool.evaluator import Report, Verdict
from porttool.evaluators.page import read_parity
from porttool.evaluators.results import Decoding, Task
from porttool.evaluators.sides import add_logprobs, generate_all, run_engine, sampling_of
from porttool.evaluators.stages import StageMap, compare_stages, find_parting, likely_cause
from porttool.nn import Step
from porttool.progress import Progress
from porttool.text import load_tokenizer
from porttool.weights import concat, take, transpose

PROMPTS = [[5, 90, 211], [7] * 11, [300, 2, 8, 45, 6, 31]]


class OnDevice(TorchRunner):
    """Decodes by itself, as a GPU engine does; `slip` changes a token on the way."""

    decodes_on_device = True
    slip: int | None = None

    def decode(self, step, n_tokens, choose=None):
        if choose is not None:
            return super().decode(step, n_tokens, choose)
        tokens, rows = step.tokens, []
        for i in range(n_tokens):
            logits = self.step(Step(step.slots, tokens, step.starts + i, step.lengths))
            tokens = logits.argmax(-1)[:, None]
            if self.slip is not None and i == self.slip:
                tokens = (tokens + 1) % logits.shape[-1]
            rows.append(tokens)
        return torch.cat(rows, 1)


@pytest.mark.parametrize(("slip", "kept"), [(None, 8), (3, 4)])
def test_log_probabilities_are_added_as_far_as_the_tokens_are_the_same(writer_engine, slip, kept):
    runner = OnDevice(writer_engine, {"device": "cpu"})
    runner.slip = slip
    decoding = Decoding(max_new_tokens=8)
    found = generate_all(runner, PROMPTS, sampling_of(decoding, logprobs=False), ())
    assert all(c.logprobs is None for c in found)
    runner.slip = None
    for first, merged in zip(found, add_logprobs(runner, PROMPTS, found, decoding), strict=True):
        assert merged.tokens == first.tokens
        assert len(merged.logprobs) == kept
        assert all(-20 < p <= 0 for p in merged.logprobs)


class Counted(Progress):
    def __init__(self):
        self.steps = []
        self.begun = []

    def start(self, label, total, *, unit="B"):
        self.begun.append(f"{label}: {total} {unit}")

    def advance(self, amount):
        self.steps.append(amount)


@pytest.mark.parametrize(("num_beams", "steps"), [(1, [1] * 24), (2, [16, 8]), (4, [8] * 3)])
def test_progress_counts_what_beams_make_too(writer_engine, num_beams, steps):
    """The engine has five rows: so many prompts as fit are searched at a time."""
    runner = TorchRunner(writer_engine, {"device": "cpu"})
    sampling = sampling_of(Decoding(max_new_tokens=8, num_beams=num_beams), logprobs=False)
    progress = Counted()
    found = generate_all(runner, PROMPTS, sampling, (), progress=progress)
    assert progress.steps == steps
    alone = [generate_all(runner, [prompt], sampling, ())[0] for prompt in PROMPTS]
    assert [c.tokens for c in found] == [c.tokens for c in alone]


def test_an_engine_that_ends_early_was_asked_for_no_more(writer_engine, tokenizer_folder):
    runner = TorchRunner(writer_engine, {"device": "cpu"})
    end = generate_all(
        runner, PROMPTS[:1], sampling_of(Decoding(max_new_tokens=8), logprobs=False), ()
    )
    task = Task.of((), PROMPTS, Decoding(max_new_tokens=8, eos=end[0].tokens[2:3]))
    progress = Counted()
    found = run_engine(runner, load_tokenizer(tokenizer_folder), PROMPTS, task, progress=progress)
    assert progress.begun == ["engine: 24 tokens at most"]
    assert sum(progress.steps) == sum(len(c.tokens) for c in found.continuations) < 24


def test_only_stages_that_correspond_are_compared():
    def permuted(config, tensors):
        return tensors[0]

    stage_map = StageMap.of(
        {
            "layers.0.attention.qkv.weight": take("q.weight", "k.weight", via=concat),
            "layers.0.attention.out.weight": take("o.weight", via=transpose),
            "layers.0.mlp.up.weight": take("up.weight", via=permuted),
            "layers.0.norm1.weight": take("ln.weight", via=permuted),
            "layers.0.norm1.bias": take("ln.bias"),
        }
    )
    assert stage_map.modules["layers.0.attention.qkv"] == "q"
    one = torch.ones(1, 2, 4)
    raw = {f"{name}.{end}": one for name in stage_map.modules for end in ("in", "out")}
    theirs = stage_map.arrange({**raw, "logits": one}, drawn.shape("gpt2"))
    assert theirs["layers.0.attention.qkv.out"].shape == (2, 8)
    ours = {
        "layers.0.norm1.out": one,
        "layers.0.attention.qkv.in": one,
        "layers.0.attention.out.in": 2 * one,
        "layers.0.mlp.up.out": one,
        "logits": 3 * one,
    }
    stages = compare_stages(ours, theirs, "float32")
    assert [s.name for s in stages] == [
        "layers.0.norm1.out", "layers.0.attention.qkv.in", "layers.0.attention.out.in", "logits",
    ]  # fmt: skip
    parting = find_parting(stages)
    assert parting.stage.name == "layers.0.attention.out.in"
    assert parting.after == "layers.0.attention.qkv.in"
    assert "likely the query, key and value projection, or inside attention" in parting.text


def test_a_stage_is_held_to_the_references_own_rounding():
    truth = {"embedding.out": torch.ones(1, 1, 8)}
    own = {"embedding.out": truth["embedding.out"] * 1.001}
    for factor, agrees in ((1.002, True), (1.004, False)):
        ours = {"embedding.out": truth["embedding.out"] * factor}
        [stage] = compare_stages(ours, truth, "bfloat16", own)
        assert stage.agrees is agrees


def test_not_a_number_is_a_difference():
    truth = {"logits": torch.ones(1, 1, 8)}
    ours = {"logits": torch.full((1, 1, 8), float("nan"))}
    for own in (None, ours):
        [stage] = compare_stages(ours, truth, "bfloat16", own)
        assert not stage.agrees
        assert stage.text == "NaN or infinity on the engine's side alone"
    [stage] = compare_stages(truth, ours, "float32")
    assert not stage.agrees
    assert stage.text == "NaN or infinity on Hugging Face's side alone"


def test_every_stage_has_a_cause(writer_engine):
    runner = TorchRunner(writer_engine, {"device": "cpu", "canonical": True})
    names = runner.trace(Step.prefill([[1, 2, 3]]))
    compared = [n for n in names if not n.endswith(("embedding.in", "position.in"))]
    unknown = [n for n in compared if likely_cause(n) == "an operation before it"]
    assert all(n.endswith((".qkv.in", ".up.in")) for n in unknown), unknown


def test_a_page_shows_a_parity_report_and_no_other(tmp_path):
    verdict = Verdict(name="prefill", passed=True, found="1", bound="2")
    for name, shown in (("parity", True), ("summarize", False)):
        report = Report(evaluator=name, engine="e", reference="r", verdicts=(verdict,))
        (tmp_path / "report.json").write_text(report.model_dump_json())
        assert (read_parity(tmp_path / "report.json", named=False) is not None) is shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("[1]", "should be"),
        ("{", "Invalid JSON"),
        ('{"evaluator": "summarize", "engine": "", "reference": "", "verdicts": []}',
         "it is a report of 'summarize'"),
    ],
)  # fmt: skip
def test_a_parity_report_that_was_named_is_one(tmp_path, content, said):
    place = tmp_path / "report.json"
    if content is not None:
        place.write_text(content)
    assert read_parity(place, named=False) is None
    with pytest.raises(UsageError, match=f"{place}: no parity report of `verify`: .*{said}"):
        read_parity(place, named=True)
