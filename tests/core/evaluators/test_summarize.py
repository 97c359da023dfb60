"""Both sides get the same ids, together or one after the other, and the verdicts follow."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import tiny
from porttool.config import PromptTemplate
from porttool.engine import Engine
from porttool.engines.torch.runner import TorchRunner
from porttool.errors import CheckFailed, PorttoolError, UsageError
from porttool.evaluator import Report, Verdict
from porttool.evaluators.agreement import TOLERANCES
from porttool.evaluators.chart import BAD, ENGINE, draw_differences
from porttool.evaluators.comparison import Bounds, Comparison, judge_rouge
from porttool.evaluators.damage import Damage
from porttool.evaluators.dataset import Article
from porttool.evaluators.prompts import Recipe, encode_articles
from porttool.evaluators.reference import ReferenceModel
from porttool.evaluators.results import Continuation, Decoding, load_result
from porttool.evaluators.rouge import KINDS
from porttool.evaluators.sides import generate_all, rescored, sampling_of
from porttool.evaluators.statistics import articles_needed
from porttool.evaluators.summarize import SummarizeEvaluator, summarize
from porttool.evaluators.unfinished import Begun, Unfinished, unfinished_file
from porttool.generate import Completion
from porttool.progress import Progress
from porttool.text import load_tokenizer

CPU = {"device": "cpu"}
COMPARED = [
    "rouge1 not inferior", "rouge2 not inferior", "rougeL not inferior", "rougeLsum not inferior",
    "token agreement", "log-probability drift", "end tokens",
    "tokenizer",
]  # fmt: skip


@pytest.fixture
def run(writer, writer_engine, articles, tmp_path):
    """Summarise; say which sides run, and change any option."""

    def go(
        *, engine=True, reference=True, runner=None, source=writer, progress=None, tokenizer=None,
        **options,
    ):  # fmt: skip
        subject = runner or TorchRunner(writer_engine, CPU)
        settings = {"dataset": str(articles), "max_new_tokens": 12, "batch_size": 3,
                    "max_input_len": 40, "resamples": 500, **options}  # fmt: skip
        return summarize(
            output=tmp_path / "out",
            runner=subject if engine else None,
            source=source if reference else None,
            tokenizer=tokenizer or load_tokenizer(writer),
            options=settings,
            progress=progress or Progress(),
        )

    return go


def outcome(report):
    return {v.name: v.passed for v in report.verdicts}


def test_a_sound_engine_passes(run, tmp_path):
    report = run()
    assert list(outcome(report)) == COMPARED
    assert report.passed, report.verdicts
    assert report.verdicts[0].detail.endswith("n 14; of all articles up to 19.3% may still differ")
    texts = [a["engine"] for a in report.measurements["articles"]]
    assert len(set(texts)) > 6, "the model says the same of every article: nothing is tested"
    assert texts == [a["reference"] for a in report.measurements["articles"]]
    for name in ("report.json", "report.html", "report.png", "reference.json", "articles.txt"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all 8 checks pass" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    saved = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert saved["measurements"]["articles"][3]["sha256"]


def test_what_is_planned_is_said_before_and_what_was_found_after(run):
    told = []

    class Listener(Progress):
        def note(self, text):
            told.append(text)

    report = run(progress=Listener(), assumed_sd=3.0, margin=1.0)
    assert "14 articles of" in told[0]
    assert "margin 1 ROUGE points, assumed sd of the differences 3.00" in told[1]
    assert any("measured sd of the differences 0.00" in note for note in report.notes)


@pytest.mark.parametrize("name", ["report.png", "report.html", "report.json"])
def test_what_was_found_is_told_where_the_disk_is_full(run, tmp_path, name):
    told = []

    class Listener(Progress):
        def note(self, text):
            told.append(text)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("/dev/full")
    with pytest.raises(PorttoolError, match=f"{name}: the disk is full"):
        run(progress=Listener())
    assert [text.split(":")[:2] for text in told[-8:]] == [["pass", f" {n}"] for n in COMPARED]


@pytest.mark.parametrize("apart", [False, True])
def test_wrong_end_tokens_are_not_shared_by_both_sides_unseen(run, writer_engine, tmp_path, apart):
    """Both sides stop at the engine's: only what transformers would do by itself tells."""
    copy = shutil.copytree(writer_engine.path, tmp_path / "engine")
    tiny.edit_manifest(copy / "engine.json", tokens={"bos": 0, "eos": [319], "pad": None})
    runner = TorchRunner(Engine.open(copy), CPU)
    if apart:
        run(runner=runner, engine=True, reference=True)
        report = run(runner=runner, reference=False)
    else:
        report = run(runner=runner)
    assert {name for name, passed in outcome(report).items() if not passed} == {"end tokens"}
    [ends] = [v for v in report.verdicts if v.name == "end tokens"]
    assert (ends.found, ends.bound) == ("319", "0")


def test_a_wrong_tokenizer_is_not_shared_by_both_sides_unseen(writer, writer_engine, run, tmp_path):
    """It is the engine's own that both are given: only the source's own tells."""
    copy = shutil.copytree(writer_engine.path, tmp_path / "engine")
    values = json.loads((writer / "tokenizer.json").read_text())
    del values["model"]["merges"][-7]
    (copy / "tokenizer" / "tokenizer.json").write_text(json.dumps(values))
    report = run(tokenizer=load_tokenizer(copy / "tokenizer"))
    assert {name for name, passed in outcome(report).items() if not passed} == {"tokenizer"}


def test_the_same_twice(run):
    first, second = run(), run()
    assert first.verdicts == second.verdicts
    assert first.tables[0] == second.tables[0]
    for key in ("rouge", "articles", "options"):
        assert first.measurements[key] == second.measurements[key]


def test_one_side_after_the_other_is_as_both_at_once(run, tmp_path):
    both = run()
    shutil.rmtree(tmp_path / "out")
    alone = run(engine=False)
    assert not alone.verdicts
    assert not alone.passed
    assert "run the engine with the same options" in alone.notes[-1]
    later = run(reference=False)
    assert later.verdicts == both.verdicts
    assert later.measurements["models"] == both.measurements["models"]


def test_the_engine_first_then_the_reference(run):
    assert not run(reference=False).verdicts
    assert run(engine=False).passed


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_articles": 12}, "articles and token ids of the prompts"),
        ({"max_input_len": 39}, "token ids of the prompts"),
        ({"max_new_tokens": 11}, "decoding"),
        ({"num_beams": 2}, "decoding"),
        ({"suffix": " Summary: "}, "token ids of the prompts"),
    ],
)
def test_a_saved_reference_of_another_task_is_refused(run, change, what):
    run(engine=False)
    with pytest.raises(UsageError, match=f"was made with different {what}"):
        run(reference=False, **change)


def test_a_refused_run_leaves_the_list_of_articles_of_the_kept_results(run, tmp_path):
    run(engine=False)
    listed = (tmp_path / "out" / "articles.txt").read_bytes()
    with pytest.raises(UsageError, match="articles"):
        run(reference=False, max_articles=5)
    assert (tmp_path / "out" / "articles.txt").read_bytes() == listed


def test_a_saved_reference_in_another_type_is_refused(run):
    run(engine=False)
    with pytest.raises(UsageError, match="was made in float32, not bfloat16"):
        run(reference=False, reference_dtype="bfloat16")


def test_a_damaged_saved_reference_is_refused(run, tmp_path):
    run(engine=False)
    (tmp_path / "out" / "reference.json").write_text('{"format": "porttool-summaries"}')
    with pytest.raises(UsageError, match=r"reference\.json: not a saved result"):
        run(reference=False)


@pytest.mark.parametrize(
    ("damage", "caught"),
    [
        ("scrambled layer", {"token agreement", "log-probability drift"}),
        ("other gelu", {"log-probability drift"}),
        ("noise of 2 %", {"log-probability drift"}),
        ("shifted positions", {"token agreement", "log-probability drift"}),
    ],
)
def test_damage_is_caught(run, writer_engine, tmp_path, damage, caught):
    damaged = Damage(damage).apply(writer_engine, tmp_path / "damaged")
    report = run(runner=TorchRunner(damaged, CPU))
    assert caught <= {name for name, passed in outcome(report).items() if passed is False}
    with pytest.raises(CheckFailed, match="log-probability drift"):
        report.require_pass()


def test_beam_search_on_both_sides(run):
    report = run(num_beams=3, length_penalty=2.0)
    assert list(outcome(report)) == [name for name in COMPARED if "drift" not in name]
    assert report.passed, report.verdicts


def test_a_beam_with_the_score_of_another_is_no_tie(run, monkeypatch):
    """The score is that of the tokens, by the engine's own logits, whatever the search says."""

    def mixed(group, sampling):
        best, *_, worst = group.finished
        return [Completion(worst.tokens, worst.finish, score=best.score)]

    monkeypatch.setattr("porttool.beam.collect", mixed)
    [agreement] = [v for v in run(num_beams=3).verdicts if v.name == "token agreement"]
    assert agreement.passed is False


@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_beams_are_scored_as_the_search_scores_them(writer_engine, penalty):
    runner, prompts = TorchRunner(writer_engine, CPU), [[5, 9, 2], [7], [1, 60, 33, 4, 8, 19, 2]]

    def beams(*eos):
        decoding = Decoding(max_new_tokens=8, num_beams=3, length_penalty=penalty, eos=eos)
        found = generate_all(runner, prompts, sampling_of(decoding, logprobs=False), eos)
        for prompt, beam in zip(prompts, found, strict=True):
            again = rescored(runner, prompt, beam, decoding)
            assert again.score == pytest.approx(beam.score, abs=1e-5)
        return found

    ended = beams(*(beam.tokens[4] for beam in beams(0)))
    assert any(beam.ended for beam in ended)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_held_to_the_references_own_rounding(
    run, writer_checkpoint, tmp_path, dtype
):
    engine = tiny.built(writer_checkpoint, tmp_path / "half", dtype=dtype)
    report = run(runner=TorchRunner(engine, CPU))
    [drift] = [v for v in report.verdicts if v.name == "log-probability drift"]
    assert drift.passed, drift
    rounding = load_result(tmp_path / "out", "reference").rounding
    assert set(rounding) == {dtype}
    assert drift.bound == f"99 % ≤ {2.5 * rounding[dtype]:.2g}"
    assert any("was not computed in float32" in note for note in report.notes)  # no converter


@pytest.mark.parametrize("passed", [True, False])
def test_a_no_of_verify_is_said_beside_a_yes(run, writer_engine, tmp_path, passed):
    """Everywhere: on the page a green heading stands over that table."""
    verdict = Verdict(name="weights", passed=passed, found="51 of 52 tensors", bound="all")
    seal = writer_engine.manifest.seal
    ladder = Report(evaluator="parity", engine="torch", reference="", verdicts=(verdict,),
                    measurements={"engine": seal})  # fmt: skip
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "report.json").write_text(ladder.model_dump_json())
    report = run()
    assert report.passed
    said = [note for note in report.notes if "verify says no to this engine" in note]
    assert [": weights (" in note for note in said] == ([] if passed else [True])
    assert report.measurements["engine"] == seal


@pytest.mark.parametrize("own", [True, False])
def test_a_parity_report_is_shown_beside_its_own_engine(run, writer_engine, tmp_path, own):
    """Beside another one it would vouch for what was never verified."""
    seal = writer_engine.manifest.seal if own else "another"
    verdict = Verdict(name="greedy tokens", passed=True, found="6 of 6", bound="all")
    ladder = Report(evaluator="parity", engine="torch", reference="", verdicts=(verdict,),
                    measurements={"engine": seal})  # fmt: skip
    place = tmp_path / "parity" / "report.json"
    place.parent.mkdir()
    place.write_text(ladder.model_dump_json())
    assert not any("this engine" in note for note in run(engine=False).notes)  # there is none yet
    report = run()
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("<h2>Parity</h2>" in page) is own
    assert (f"{place} is not of this engine, and not shown" in report.notes) is not own


def test_too_few_articles_give_no_verdict(run):
    report = run(max_articles=4)
    assert outcome(report)["rouge1 not inferior"] is None
    with pytest.raises(CheckFailed, match="needs at least 10 different articles"):
        report.require_pass()


@pytest.mark.parametrize(("threshold", "passed"), [(-1.0, True), (99.0, False)])
def test_the_absolute_threshold(run, threshold, passed):
    report = run(reference=False, rouge1_threshold=threshold)
    assert outcome(report) == {"rouge1 threshold": passed}


def test_nothing_compared_is_a_failure(run):
    with pytest.raises(CheckFailed, match="nothing was compared"):
        run(reference=False).require_pass()


class Stopper(Progress):
    """Stands for Ctrl-C in the middle of the work."""

    def advance(self, amount):
        raise KeyboardInterrupt


def test_an_interrupted_engine_leaves_no_results(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(progress=Stopper(), reference=False)
    assert not (tmp_path / "out").exists()


class Reference(Progress):
    """What is said, and Ctrl-C at a batch of prompts, if one is named."""

    def __init__(self, *, stops=0):
        self.stops, self.batches, self.told, self.totals = stops, 0, [], {}

    def start(self, label, total, *, unit="B"):
        self.totals[label] = total

    def note(self, text):
        self.told.append(text)

    def advance(self, amount):
        self.batches += 1
        if self.batches == self.stops:
            raise KeyboardInterrupt


@pytest.fixture
def continued(monkeypatch):
    """How many prompts each batch of the reference had, those for the first token left out."""
    sizes, generate = [], ReferenceModel._generate_batch

    def counted(self, prompts, decoding):
        if decoding.max_new_tokens > 1:
            sizes.append(len(prompts))
        return generate(self, prompts, decoding)

    monkeypatch.setattr(ReferenceModel, "_generate_batch", counted)
    return sizes


@pytest.mark.parametrize("lost", [0, 100])
def test_a_reference_that_was_stopped_goes_on(run, tmp_path, continued, lost):
    """Also where the last line was cut off."""
    out = tmp_path / "out"
    run(engine=False)
    wanted = load_result(out, "reference")
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(engine=False, progress=Reference(stops=3))
    file = unfinished_file(out)
    assert stopped.value.__notes__ == [f"{file} keeps 9 prompts: the same command goes on"]
    assert [path.name for path in out.iterdir()] == [file.name]
    file.write_bytes(file.read_bytes()[: -lost or None])
    continued.clear()
    second = Reference()
    run(engine=False, progress=second)
    assert continued == ([3, 2] if not lost else [3, 3, 2])
    done = 9 if not lost else 6
    assert f"{file} has {done} of 14 prompts: it goes on" in second.told
    assert second.totals["Hugging Face"] == 14 - done, "the rate is of this run's prompts"
    found = load_result(out, "reference")
    assert found.continuations == wanted.continuations
    assert found.speed.n_tokens == wanted.speed.n_tokens
    assert not file.exists()


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 11}, {"batch_size": 4}, {"reference_dtype": "bfloat16"}]
)
def test_another_run_does_not_go_on_with_it(run, continued, change):
    with pytest.raises(KeyboardInterrupt):
        run(engine=False, progress=Reference(stops=3))
    continued.clear()
    other = Reference()
    run(engine=False, progress=other, **change)
    assert sum(continued) == 14
    assert any("is of a run with other options or models: it begins anew" in t for t in other.told)


def test_stopped_while_its_rounding_is_measured_a_reference_is_kept(run, monkeypatch, continued):
    monkeypatch.setattr(ReferenceModel, "logits", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(engine=False)
    assert "keeps 14 prompts: the same command goes on" in stopped.value.__notes__[0]
    monkeypatch.undo()
    told = Reference()
    run(engine=False, progress=told)
    assert any("has 14 of 14 prompts" in text for text in told.told)
    assert "Hugging Face" not in told.totals
    assert not any("begins anew" in text for text in told.told)


def test_a_reference_may_be_stopped_again(run, tmp_path, continued):
    """What was cut off is not in the way; times add up."""
    with pytest.raises(KeyboardInterrupt):
        run(engine=False, progress=Reference(stops=3))
    file = unfinished_file(tmp_path / "out")
    head, first, *rest = file.read_text().splitlines(keepends=True)
    slow = json.dumps({**json.loads(first), "seconds": 1000.0}) + "\n"
    file.write_text("".join([head, slow, *rest])[:-100])
    with pytest.raises(KeyboardInterrupt):
        run(engine=False, progress=Reference(stops=2))
    continued.clear()
    run(engine=False)
    assert continued == [2]
    assert 1000 < load_result(tmp_path / "out", "reference").speed.seconds < 1100


def test_weights_that_were_changed_meanwhile_are_another_run(run, continued, writer, tmp_path):
    """Where the fingerprint does not look: here even to the same."""
    model = tmp_path / "model"
    shutil.copytree(writer, model)
    with pytest.raises(KeyboardInterrupt):
        run(engine=False, source=model, progress=Reference(stops=3))
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes())
    continued.clear()
    run(engine=False, source=model)
    assert sum(continued) == 14


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 2, 1], [0, 1, 3, 3]])
def test_lines_of_two_runs_at_once_are_not_mistaken(run, tmp_path, continued, order):
    run(engine=False)
    wanted = load_result(tmp_path / "out", "reference").continuations
    with pytest.raises(KeyboardInterrupt):
        run(engine=False, progress=Reference(stops=3))
    file = unfinished_file(tmp_path / "out")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[i] for i in order))
    continued.clear()
    run(engine=False)
    assert sum(continued) == 14 - 3 * (order[1] == 1)
    assert load_result(tmp_path / "out", "reference").continuations == wanted


def test_what_overflowed_can_be_read_again(run, tmp_path, monkeypatch):
    """A reference's rounding in float16 is no number where its activations overflow there."""
    nan, low = float("nan"), float("-inf")
    monkeypatch.setattr("porttool.evaluators.sides.measure_rounding", lambda *_: nan)
    run(engine=False)
    found = load_result(tmp_path / "out", "reference")
    assert math.isnan(found.rounding["float16"])
    half = found.model_copy(update={"dtype": "float16"})
    assert Bounds().tolerance(half, found).drift == TOLERANCES["float16"].drift
    made = Continuation(tokens=(1,), ended=False, logprobs=(low,), candidates=(((1, low),),))
    begun = Begun(description="", source="", batch_size=1, task=found.task)
    Unfinished(tmp_path, begun).add([made], 1.0)
    assert Unfinished(tmp_path, begun).batches[0].continuations == (made,)


def test_a_disk_that_is_full_is_named_with_the_file(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    class Fills(Progress):
        def advance(self, amount):
            monkeypatch.setattr("pathlib.Path.open", full)

    with pytest.raises(PorttoolError, match=r"reference.unfinished.jsonl: the disk is full"):
        run(engine=False, progress=Fills())


def test_no_side_at_all(run):
    with pytest.raises(UsageError, match="neither an engine nor a Hugging Face folder"):
        run(engine=False, reference=False)


class Idle(Progress):
    """Nothing may run."""

    def start(self, label, total, *, unit="B"):
        pytest.fail(f"{label} ran")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_input_len": 70}, "--max-input-len is 70, the engine holds 60: give 60 or less, or "),
        ({"max_new_tokens": 40}, "--max-new-tokens is 40, the engine holds 24.*-output-len 40"),
        ({"num_beams": 9}, "--num-beams is 9, the engine holds 5"),
        ({"engine": False, "max_input_len": 90},
         "--max-input-len 90 plus --max-new-tokens 12 is too much: the model has 96 positions"),
        ({"engine": False, "max_input_len": None, "max_new_tokens": 100},
         "^--max-new-tokens 100 is too much: the model has 96 positions"),
    ],
)  # fmt: skip
def test_what_neither_side_holds_is_refused_before_one_runs(run, asked, message):
    with pytest.raises(UsageError, match=message):
        run(progress=Idle(), **asked)


def test_a_reference_of_another_shape_is_refused_before_it_runs(run, tmp_path):
    other = tiny.write_source(tmp_path / "other", tiny.gpt2(vocab_size=321))
    with pytest.raises(UsageError, match="is not the engine's model: it has vocab_size 321, not"):
        run(source=other, progress=Idle())


@pytest.mark.parametrize(
    ("idle", "said"),
    [
        ({"length_penalty": 2.0}, "': length_penalty would change nothing; set num_beams above 1$"),
        ({"early_stopping": False}, "': early_stopping would change nothing; set num_beams"),
        ({"article_ids": "ids.txt", "shuffle_seed": 0}, "leave shuffle_seed out$"),
        ({"instruction": "Say it."}, "instruction would change nothing: .* the prompt 'suffix'"),
        ({"revision": "main"}, "articles.jsonl is local: revision would change nothing"),
        ({"dataset_config": "1.0.0", "split": "train"}, "local: dataset_config, split would"),
    ],
)
def test_options_that_would_change_nothing_are_refused(run, idle, said):
    with pytest.raises(UsageError, match=said):
        run(progress=Idle(), **idle)


def test_a_suffix_beside_a_template_would_change_nothing(run, writer_engine, tmp_path):
    engine = shutil.copytree(writer_engine.path, tmp_path / "engine")
    tiny.edit_manifest(engine / "engine.json", prompt=TEMPLATE.model_dump())
    runner = TorchRunner(Engine.open(engine), CPU)
    with pytest.raises(UsageError, match=r"suffix would change nothing: .* prompt 'instruction'"):
        run(runner=runner, suffix=" In short: ", progress=Idle())


def test_options_are_closed():
    with pytest.raises(UsageError, match="max_artciles"):
        SummarizeEvaluator({"max_artciles": 3})
    with pytest.raises(UsageError, match="max_articles"):
        SummarizeEvaluator({"max_articles": 0})


def test_a_source_that_is_no_model(run, tmp_path, writer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"config\.json; name a Hugging Face folder with --hf-m"):
        run(source=tmp_path / "empty")


def test_a_source_without_a_weight_is_refused(run, tmp_path, writer):
    from safetensors.torch import load_file, save_file

    from porttool.errors import SourceError

    copy = shutil.copytree(writer, tmp_path / "holey")
    tensors = load_file(copy / "model.safetensors")
    del tensors["transformer.h.1.ln_2.bias"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"missing_keys: transformer\.h\.1\.ln_2\.bias"):
        run(source=copy)


def test_the_recipe(writer):
    tokenizer = load_tokenizer(writer)
    article = Article("a", " The mayor did n't vote .", "x")
    recipe = Recipe(" TL;DR: ", "", None, 500)
    [ids] = encode_articles([article], tokenizer, recipe)
    assert tokenizer.decode(ids) == "The mayor didn't vote . TL;DR:"
    [short] = encode_articles([article], tokenizer, Recipe(" TL;DR: ", "", None, 6))
    assert short == ids[-6:]


def test_an_instruction_keeps_its_template_and_the_articles_beginning(writer):
    tokenizer = load_tokenizer(writer)
    template = PromptTemplate(plain="{instruction}|", with_input="{instruction}|{input}|end",
                              answer_marker="end")  # fmt: skip
    article = Article("a", "The council will vote on the new bridge . " * 9, "x")
    [ids] = encode_articles([article], tokenizer, Recipe("", "Say.", template, 40))
    text = tokenizer.decode(ids)
    assert len(ids) <= 40
    assert text.startswith("Say.|The council will vote")
    assert text.endswith("|end")
    with pytest.raises(UsageError, match="template alone is longer than 3 tokens"):
        encode_articles([article], tokenizer, Recipe("", "Say.", template, 3))


TEMPLATE = PromptTemplate(plain="{instruction}|", with_input="{input}|", answer_marker="|")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_an_article_that_the_tokenizer_has_no_token_for(writer, monkeypatch, template):
    tokenizer, recipe = load_tokenizer(writer), Recipe("", "Say.", template, 40)
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: [] if text == "\u4e2d" else encode(self, text)
    )
    articles = [Article("a", "The mayor .", "x"), Article("b", "\u4e2d", "x")]
    with pytest.raises(UsageError, match="the tokenizer gives no token for the article 'b'; leave"):
        encode_articles(articles, tokenizer, recipe)


def test_instruction_without_a_template(run):
    with pytest.raises(UsageError, match="no instruction template"):
        run(prompt="instruction")


def texts(n):
    return [Article(str(i), f"text {i}", "x") for i in range(n)]


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_how_many_articles_decide_depends_on_the_confidence(confidence):
    side = SimpleNamespace(
        continuations=[SimpleNamespace(text="a")] * 20, dtype="float32", rounding={}
    )
    ours, theirs = {"rouge1": [3.0, 0.0] * 10}, {"rouge1": [0.0, 3.0] * 10}
    bounds = Bounds(resamples=1000, confidence=confidence)
    found = judge_rouge(Comparison(texts(20), side, side, ours, theirs, (), bounds), "rouge1")
    sd = (9 * 20 / 19) ** 0.5
    wanted = articles_needed(sd, 0.5, confidence=confidence)
    assert found.detail.endswith(f"undecided: an equal port would need {wanted} articles")


def test_articles_without_a_word_on_either_side_do_not_count():
    def side(*texts):
        written = [SimpleNamespace(text=text) for text in texts]
        return SimpleNamespace(continuations=written, dtype="float32", rounding={})

    zeros = {"rouge1": [0.0] * 12}
    ours, theirs = side("a", " ", *[""] * 10), side("b", "c", "\n", *[""] * 9)
    found = Comparison(texts(12), ours, theirs, zeros, zeros, (), Bounds(resamples=10))
    assert found.n_worded == 2
    assert judge_rouge(found, "rouge1").passed is None
    worded = Comparison(
        texts(12), side(*"abcdefghijkl"), theirs, zeros, zeros, (), Bounds(resamples=10)
    )
    assert judge_rouge(worded, "rouge1").passed is True


@pytest.mark.parametrize(("n", "colour"), [(9, BAD), (10, ENGINE)])
def test_the_picture_is_of_the_verdicts_colour(n, colour):
    """Below ten articles there is no yes, however good the numbers look."""
    written = [SimpleNamespace(text="a") for _ in range(n)]
    side = SimpleNamespace(continuations=written, dtype="float32", rounding={})
    scores = {kind: [1.0] * n for kind in KINDS}
    axes = Mock(get_xlim=lambda: (-1, 1))
    draw_differences(axes, Comparison(texts(n), side, side, scores, scores, (), Bounds()))
    assert {call.kwargs["color"] for call in axes.plot.call_args_list} == {colour}


def test_one_text_many_times_is_one_article(run, articles, rows, tmp_path):
    """Ids tell nothing: a model says the same of the same text, however often it is asked."""
    copies = [{**rows[0], "id": str(i), "highlights": f"x {i}"} for i in range(10)]
    file = tmp_path / "copies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*copies, *rows[1:9]]))
    report = run(dataset=str(file))
    assert outcome(report)["rouge1 not inferior"] is None
    assert report.verdicts[0].found == "9 articles"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*copies, *rows[1:10]]))
    assert run(dataset=str(file)).passed
