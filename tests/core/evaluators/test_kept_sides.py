"""Sides that run apart by the commands: a kept reference is of this engine's model, or refused."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from importlib import import_module

import pytest
from safetensors.torch import load_file, save_file

import tiny
from porttool.checkpoint import Checkpoint
from porttool.cli import invoke
from porttool.engine import choose_limits
from porttool.evaluators.accounting import derived
from porttool.progress import SILENT
from porttool.sources.places import SourceFiles
from tiny_coder import write_coder

SHORT = ["--max-new-tokens", "6", "--max-input-len", "40", "--set", "resamples", "200"]


def scale(source, factor):
    """Make another model of a source, of the same shape."""
    tensors = load_file(source / "model.safetensors")
    changed = {name: tensor * factor for name, tensor in tensors.items()}
    save_file(changed, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.fixture
def source(writer, tmp_path):
    return shutil.copytree(writer, tmp_path / "source")


@pytest.fixture
def engine(source, tmp_path):
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    limits = choose_limits(checkpoint.config, max_batch_size=8, max_input_len=48, max_output_len=24)
    return tiny.built(checkpoint, tmp_path / "gpt2", limits=limits).path


@pytest.fixture
def summarize(articles, tmp_path, monkeypatch, capsys):
    """Run the command in an empty work folder; return its status and what it said."""
    monkeypatch.setenv("PORTTOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        asked = ["summarize", *map(str, arguments), "--dataset", str(articles), *SHORT]
        status = invoke(asked)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


@pytest.fixture
def kept(summarize, engine, source, tmp_path):
    """A folder with the kept reference of the engine's own source."""
    named = ("--hf-model", source, "--test-hf")
    status, said = summarize(engine, *named, "--output", tmp_path / "kept")
    assert status == 0, said
    return tmp_path / "kept"


def test_a_reference_of_the_engines_own_source_is_taken(summarize, engine, source, kept, tmp_path):
    asked = (engine, "--test-engine", "--check-accuracy", "--output", kept)
    for more in ((), ("--hf-model", shutil.copytree(source, tmp_path / "copy"))):
        status, said = summarize(*asked, *more)
        assert status == 0, said


def test_a_reference_of_another_folder_than_the_named_is_refused(
    summarize, engine, source, kept, tmp_path
):
    other = scale(shutil.copytree(source, tmp_path / "other"), 1.5)
    status, said = summarize(
        engine, "--hf-model", other, "--test-engine", "--check-accuracy", "--output", kept
    )
    assert status == 2
    assert "reference.json was made with another model (fingerprint" in said
    assert "run --test-hf again" in said


def test_a_reference_of_a_folder_that_is_no_model_of_its_own_is_refused(
    summarize, engine, kept, tmp_path
):
    (tmp_path / "archive").mkdir()
    status, said = summarize(
        engine, "--hf-model", tmp_path / "archive", "--test-engine", "--output", kept
    )
    assert status == 2
    assert "archive: no config.json)" in said


def test_a_reference_of_the_weights_before_is_refused(summarize, engine, source, kept):
    scale(source, 1.5)
    status, said = summarize(engine, "--test-engine", "--check-accuracy", "--output", kept)
    assert status == 2
    assert "was made with another model" in said


def test_a_folder_that_another_run_takes_away_meanwhile_is_made_again(
    summarize, engine, source, tmp_path, monkeypatch
):
    output = tmp_path / "deep" / "kept"

    def bereft(work):
        def run(*args, **named):
            output.rmdir()
            output.parent.rmdir()
            return work(*args, **named)

        return run

    for place, asked, file in (
        ("summarize.make_reference", ("--hf-model", source, "--test-hf"), "reference.json"),
        ("sides.run_engine", (engine, "--test-engine"), "engine-summaries.json"),
    ):
        module, _, name = place.partition(".")
        module = import_module(f"porttool.evaluators.{module}")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, bereft(getattr(module, name)))
            status, said = summarize(*asked, "--output", output)
        assert status == 0, said
        assert (output / file).is_file()
        shutil.rmtree(output)
        output.mkdir()


def test_a_source_is_unpacked_where_the_folder_was_taken_away(source, registry, tmp_path):
    scratch = tmp_path / "deep" / "kept"

    class Unpacking(registry.converters.get("gpt2")):
        @contextmanager
        def prepare(self, source, output, progress):
            (output / "unpacked").touch()
            yield source

    with derived(Unpacking(), source, scratch, SILENT) as derivation:
        assert derivation.shapes


def test_where_the_source_is_gone_its_own_reference_is_taken(summarize, engine, source, kept):
    shutil.rmtree(source)
    for side in ((), ("--test-engine",)):
        status, said = summarize(engine, *side, "--check-accuracy", "--output", kept)
        assert status == 0, said
        assert ("is gone" in said) is (side == ())


def test_where_the_source_is_gone_another_models_reference_is_refused(
    summarize, engine, source, tmp_path
):
    other = scale(shutil.copytree(source, tmp_path / "other"), 1.5)
    output = ("--output", tmp_path / "kept")
    assert summarize(engine, "--hf-model", other, "--test-hf", *output)[0] == 0
    shutil.rmtree(source)
    status, said = summarize(engine, "--check-accuracy", *output)
    assert status == 2
    assert "was made with another model" in said


def test_engines_of_one_folder_do_not_share_a_report(summarize, engine, tmp_path):
    second = shutil.copytree(engine, tmp_path / "second")
    status, said = summarize(engine, "--test-hf")
    assert (status, "nothing was checked" in said, "verdict" in said) == (0, True, False)
    assert (tmp_path / "gpt2-reports" / "summarize" / "reference.json").is_file()
    assert summarize(second, "--test-engine")[0] == 0
    report = json.loads((tmp_path / "second-reports" / "summarize" / "report.json").read_text())
    assert report["reference"] == "not run"


def test_an_engine_whose_folder_is_called_like_a_family_runs_its_own_source(
    summarize, engine, source, tmp_path
):
    other = scale(shutil.copytree(source, tmp_path / "other"), 1.5)
    tiny.converted(other, tmp_path / "home" / "gpt2" / "checkpoint")
    assert summarize(engine, "--test-hf")[0] == 0
    status, said = summarize(engine, "--test-engine", "--check-accuracy")
    assert status == 0, said


def test_a_reference_alone_whose_source_is_gone_is_to_be_named(summarize, engine, source):
    shutil.rmtree(source)
    status, said = summarize(engine, "--test-hf")
    assert status == 2
    assert f"{source}, which" in said
    assert "name it with --hf-model" in said


def test_a_reference_alone_takes_no_options_of_the_runner(summarize, engine):
    status, said = summarize(engine, "--test-hf", "--runner-set", "device", "cpu")
    assert status == 2
    assert "(--runner-set) are the engine's, which does not run here" in said


def test_options_are_told_by_their_flags(summarize, engine):
    said = "--article-ids are taken in their order; leave --shuffle-seed out"
    asked = ("--article-ids", "max_articles/article_ids", "--shuffle-seed", "3")
    assert summarize(engine, *asked)[1].splitlines()[-1].endswith(said)
    said = summarize(engine, *asked[:2])[1]
    assert " max_articles/article_ids: there is no such file of article ids" in said


def test_a_reference_alone_needs_no_engine(summarize, source, engine, tmp_path):
    output = ("--output", tmp_path / "kept")
    status, said = summarize("--hf-model", source, "--test-hf", *output)
    assert status == 0, said
    status, said = summarize(engine, "--test-engine", "--check-accuracy", *output)
    assert status == 0, said


def test_an_interrupted_engine_leaves_the_reference(summarize, engine, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("porttool.evaluators.sides.run_engine", interrupted)
    output = ("--output", tmp_path / "kept")
    status, said = summarize(engine, *output)
    assert (status, "reference.json is complete: the same command with --test-engine" in said) == (
        130, True
    )  # fmt: skip
    monkeypatch.undo()
    assert summarize(engine, "--test-engine", "--check-accuracy", *output)[0] == 0


@pytest.mark.parametrize("check", [[], ["--check-accuracy"]])
def test_without_source_and_reference_nothing_runs(summarize, engine, source, tmp_path, check):
    shutil.rmtree(source)
    status, said = summarize(engine, *check)
    assert status == 2
    assert f"{source}, which the engine was converted from, is no longer there" in said
    assert "name the folder with --hf-model" in said
    assert not list(tmp_path.rglob("engine-summaries.json"))


def test_a_reference_alone_is_asked_as_the_engine_that_is_named_will_be(
    summarize, engine, source, tmp_path
):
    """With its template and its end tokens, whatever family its source is taken for now."""
    template = {"plain": "Q: {instruction} A:", "with_input": "Q: {instruction} {input} A:",
                "answer_marker": "A:"}  # fmt: skip
    tokens = {"bos": 0, "eos": [0, *range(200, 260)], "pad": None}
    tiny.edit_manifest(engine / "engine.json", prompt=template, tokens=tokens)
    for side in ("--test-hf", "--test-engine"):
        status, said = summarize(engine, side, "--set", "instruction", "Why?")
        assert status == 0, said
    report = json.loads((tmp_path / "gpt2-reports" / "summarize" / "report.json").read_text())
    assert "not run" not in (report["engine"], report["reference"])


def test_infill_asks_a_reference_alone_with_the_engines_tokens(coder_engine, problems, capsys):
    tokens = {"prefix": "<fim_suffix>", "middle": "<fim_middle>", "suffix": "<fim_prefix>"}
    tiny.edit_manifest(coder_engine / "engine.json", infill=tokens)
    for side in ("--test-hf", "--test-engine"):
        asked = ["infill", str(coder_engine), side, *problems]
        assert invoke(asked) == 0, capsys.readouterr().err
    report = coder_engine.with_name("engine-reports") / "infill" / "report.json"
    assert "not run" not in json.loads(report.read_text())["reference"]


@pytest.fixture
def coder_engine(tmp_path):
    """An engine that fills in, converted from tmp_path/source."""
    coder = write_coder(tmp_path / "source")
    return tiny.built(tiny.converted(coder, tmp_path / "checkpoint"), tmp_path / "engine").path


@pytest.fixture
def problems(tmp_path):
    """Options of `infill` for one short problem."""
    problem = {"task_id": "Test/0", "prompt": "def add(xs):\n", "entry_point": "add", "test": "",
               "canonical_solution": "    total = sum(xs)\n    return total\n"}  # fmt: skip
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    return ["--dataset", str(tmp_path / "problems.jsonl"), "--max-new-tokens", "4",
            "--set", "resamples", "200"]  # fmt: skip


def test_infill_takes_no_other_models_reference_either(coder_engine, problems, tmp_path, capsys):
    other = write_coder(tmp_path / "other", seed=1)
    asked = ["infill", str(coder_engine), *problems]
    assert invoke([*asked, "--hf-model", str(other), "--test-hf"]) == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "source")
    assert invoke([*asked, "--check-accuracy"]) == 2
    assert "was made with another model" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "engine-reports")
    assert invoke(asked) == 2
    assert "is no longer there: infill needs the engine and" in capsys.readouterr().err


@pytest.fixture
def foreign(engine, tmp_path):
    """An engine of the same model, converted from a file that transformers does not know."""
    (tmp_path / "archive").write_bytes(b"weights")
    copy = shutil.copytree(engine, tmp_path / "foreign")
    archive = SourceFiles.of(tmp_path / "archive")
    record = {"path": str(archive.source), "fingerprint": archive.fingerprint}
    tiny.edit_manifest(copy / "engine.json", source={**record, "options": {}})
    return copy


def test_a_reference_of_a_source_that_is_no_model_folder_is_named_once(
    summarize, foreign, source, tmp_path
):
    assert summarize(foreign, "--hf-model", source, "--test-hf")[0] == 0
    for gone in (False, True):
        if gone:
            (tmp_path / "archive").unlink()
        for side in ((), ("--test-engine",)):
            status, said = summarize(foreign, *side, "--check-accuracy")
            assert status == 0, said
            why = "is gone" if gone else "is no Hugging Face folder"
            assert (f"was converted from {why}: " in said) is (side == ())
    other = {"path": str(tmp_path / "archive"), "fingerprint": "of another file", "options": {}}
    tiny.edit_manifest(foreign / "engine.json", source=other)
    assert "was made with another model" in summarize(foreign, "--check-accuracy")[1]


def test_a_reference_that_was_not_named_for_the_engine_is_to_be_named(
    summarize, foreign, source, tmp_path
):
    output = ("--output", tmp_path / "kept")
    assert summarize("--hf-model", source, "--test-hf", *output)[0] == 0
    asked = (foreign, "--test-engine", "--check-accuracy", *output)
    status, said = summarize(*asked)
    assert status == 2
    assert "archive: no config.json); run --test-hf again, or name with --hf-model" in said
    assert summarize(*asked, "--hf-model", source)[0] == 0


def test_a_source_that_is_no_model_folder_says_that_one_is_to_be_named(summarize, foreign):
    status, said = summarize(foreign, "--test-hf")
    assert status == 2
    assert "has no config.json, so that transformers cannot run it: name the Hugging" in said
    assert "or make one with `porttool export CHECKPOINT --format huggingface`" in said
    status, said = summarize(foreign, "--check-accuracy")
    assert status == 2
    assert "has no config.json, so that transformers cannot run it: summarize needs" in said
    assert "or make one with `porttool export CHECKPOINT --format huggingface`" in said


def test_another_engines_kept_result_is_refused_before_the_reference_runs(
    summarize, engine, source, tmp_path, monkeypatch
):
    output = ("--output", tmp_path / "kept")
    other = scale(shutil.copytree(source, tmp_path / "other"), 1.5)
    tiny.built(tiny.converted(other, tmp_path / "c2"), tmp_path / "second")
    assert summarize(engine, "--test-engine", *output)[0] == 0
    monkeypatch.setattr("porttool.evaluators.summarize.make_reference", None)
    for asked, what in (((tmp_path / "second",), "another engine (torch, "),
                        (("--hf-model", other), "an engine of another model (its")):  # fmt: skip
        status, said = summarize(*asked, "--test-hf", *output)
        assert status == 2
        assert f"engine-summaries.json was made with {what}" in said


def test_an_engines_kept_result_is_known_by_the_engine_or_by_the_folder(
    summarize, engine, foreign, source, tmp_path
):
    copy = shutil.copytree(source, tmp_path / "copy")
    alone = ("--hf-model", copy, "--test-hf")
    cases = ((engine, (), alone), (foreign, (), (foreign, *alone)),
             (foreign, ("--hf-model", source), alone))  # fmt: skip
    for i, (of, named, asked) in enumerate(cases):
        output = ("--output", tmp_path / f"kept{i}")
        assert summarize(of, *named, "--test-engine", *output)[0] == 0
        status, said = summarize(*asked, *output)
        assert status == 0, said
        report = json.loads((tmp_path / f"kept{i}" / "report.json").read_text())
        assert "not run" not in (report["engine"], report["reference"])


def test_an_engines_kept_result_that_nobody_named_a_folder_of_is_refused(
    summarize, foreign, source, tmp_path
):
    output = ("--output", tmp_path / "kept")
    assert summarize(foreign, "--test-engine", *output)[0] == 0
    status, said = summarize("--hf-model", source, "--test-hf", *output)
    assert status == 2
    assert "json does not say of which Hugging Face folder its engine was made; name the" in said


def test_an_engine_of_the_same_checkpoint_in_another_type_is_another_engine(
    summarize, engine, source, tmp_path
):
    output = ("--output", tmp_path / "kept")
    half = tiny.built(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "half", dtype="float16")
    assert summarize(engine, "--test-engine", *output)[0] == 0
    status, said = summarize(half.path, "--test-hf", *output)
    assert status == 2
    assert "was made with another engine (torch, " in said and "float32); name the engine" in said
    assert summarize(engine, "--test-hf", *output)[0] == 0


def test_a_result_that_an_earlier_version_kept_is_made_again(summarize, engine, source, tmp_path):
    output = ("--output", tmp_path / "kept")
    assert summarize(engine, "--test-engine", *output)[0] == 0
    file = tmp_path / "kept" / "engine-summaries.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"engine": None, "counterpart": None}))
    folder = "of which Hugging Face folder its engine"
    for asked, what in ((engine,), "which engine it"), (("--hf-model", source), folder):
        status, said = summarize(*asked, "--test-hf", *output)
        assert status == 2
        assert (
            f"engine-summaries.json does not say {what} was made; run --test-engine again" in said
        )


def test_an_engine_that_nobody_named_says_nothing_of_a_reference(
    summarize, engine, source, tmp_path
):
    other = shutil.copytree(engine, tmp_path / "home" / "gpt2" / "engine")
    tiny.edit_manifest(other / "engine.json", tokens={"bos": 0, "eos": [9], "pad": None})
    output = ("--output", tmp_path / "kept")
    status, said = summarize("--hf-model", source, "--test-hf", *output)
    assert status == 0, said
    assert summarize(engine, "--test-engine", "--check-accuracy", *output)[0] == 0
