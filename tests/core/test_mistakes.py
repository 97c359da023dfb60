"""What a newcomer does wrong is told in plain words, by the commands, with the right status."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from porttool.cli import invoke
from porttool.cli.console import ConsoleProgress
from porttool.component import Component, Options, explain
from porttool.config import Sampling
from porttool.errors import SourceError, UsageError
from porttool.huggingface import SourceConfig
from porttool.progress import format_bytes, format_tera
from porttool.prompt_table import PromptTable
from porttool.sources.archive import Archive
from porttool.sources.json_file import read_json
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.sources.tokenizer_files import read_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"


@pytest.fixture
def copy(tmp_path, source):
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return its status and its message on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PORTTOOL_HOME", raising=False)

    def run(*arguments: object) -> tuple[int, str]:
        status = invoke([str(argument) for argument in arguments])
        return status, " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--margin inf", "margin: Input should be a finite number"),
        ("--margin 1e-300", "margin: Input should be greater than or equal to 0.001"),
        ("--rouge1-threshold nan", "--rouge1-threshold: Input should be a finite number"),
        ("--set max_drift Infinity", "max_drift: Input should be a finite number"),
        ("--set resamples 1", "resamples: Input should be greater than or equal to 100"),
        ("--set resamples 99999999999", "resamples: Input should be less than or equal to 1000000"),
        ("--set seed -1", "seed: Input should be greater than or equal to 0"),
        ("--shuffle-seed -1", "--shuffle-seed: Input should be greater than or equal to 0"),
        ("--num-beams 2 --set length_penalty 1e308", "length_penalty: Input should be less than"),
    ],
)
def test_no_number_of_an_evaluation_ends_in_a_traceback(said, engine_folder, option, message):
    """Most were found by the arithmetic, after both sides had run; an infinite bound passed all."""
    status, told = said("summarize", engine_folder, "--dataset", "none.jsonl", *option.split())
    assert (status, message in told) == (2, True), told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run {} --input-text x --num-beams 2 --length-penalty -1e308",
         "--length-penalty: Input should be greater than or equal to -32"),
        ("bench {} --seed 99999999999999999999", "--seed: Input should be less than"),
        ("build --dummy -o new --rotary-pct nan", "--rotary-pct: Input should be less than"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(said, engine_folder, command, message):
    status, told = said(*command.format(engine_folder).split())
    assert (status, message in told) == (2, True), told


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_pointer_of_git_lfs(copy, said, name):
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(POINTER)
    status, message = said("convert", copy, "-o", "out")
    assert status == 1
    assert f"{copy / name}: is a Git LFS pointer, not the file; run `git lfs pull`" in message


@pytest.mark.parametrize("read", [read_json, Archive, lambda path: read_files([path])])
def test_a_pointer_in_other_places(tmp_path, read):
    (tmp_path / "file").write_bytes(POINTER)
    with pytest.raises(SourceError, match=r"file: is a Git LFS pointer"):
        read(tmp_path / "file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_to_a_file_that_is_gone(copy, said, name):
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to("../blobs/0123")
    status, message = said("convert", copy, "-o", "out")
    assert status == 1
    assert f"{name}: is a link to a file that is gone (../blobs/0123); fetch the model" in message


def test_a_shard_whose_link_is_gone(tmp_path, reference, said):
    folder = tiny.write_source(tmp_path / "source", reference, tiny.Form(shards=2))
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("gone")
    assert f"{shard}: is a link to a file that is gone" in said("convert", folder, "-o", "out")[1]


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("build {} -o out", "source", "this is a Hugging Face folder: convert it first"),
        ("run {} --input-text x", "source", "is a Hugging Face folder: convert and build it first"),
        ("verify {}", "source", "this is a Hugging Face folder: convert and build it first"),
        ("run {} --input-text x", "checkpoint",
         "this is a checkpoint of porttool, not an engine: build it first"),
        ("verify {}", "checkpoint", "a checkpoint of porttool, not an engine: build it first"),
        ("build {} -o out", "engine", "this is an engine of porttool, not a checkpoint"),
        ("convert {} -o out", "checkpoint", "this is already a checkpoint of porttool"),
        ("convert {} -o out", "engine", "this is already an engine of porttool, not a source"),
        ("build {} -o out", "nowhere", "nowhere does not exist"),
        ("run {} --input-text x", "nowhere", "nowhere does not exist"),
        ("verify {}", "nowhere", "nowhere does not exist"),
        ("convert {} -o out", "nowhere",
         "nowhere does not exist; on the hub it would have an owner, as OWNER/nowhere"),
        ("convert {}:x/y -o out", "nowhere",
         "nowhere:x/y does not exist, and nothing on the hub has such a name"),
    ],
)  # fmt: skip
def test_another_kind_of_folder(said, source, checkpoint, engine_folder, command, kind, message):
    places = {"source": source, "checkpoint": checkpoint.path, "engine": engine_folder}
    place = places.get(kind, Path("nowhere"))
    status, told = said(*(word.format(place) for word in command.split()))
    assert status == 2
    assert str(place) in told
    assert message in told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("build {}/1-gpu -o out", "if it is a source, `porttool convert` it first"),
        ("export {}/1-gpu -o out --format fastertransformer", "`porttool convert` it first"),
        ("build {}", "say with --output where the engine goes, or name a model with --model"),
        ("build -o out", "say the checkpoint, or name a model with --model"),
        ("convert --model Writer/camel-5b-hf", "a path or a hub id is given without an option"),
        ("convert --model ./{}", "a path or a hub id is given without an option"),
        ("convert --model gpt2-xl", "mean 'gpt2'? One of its models is a SOURCE, as OWNER/gpt2-xl"),
        ("run --model camel5b", "--input-tokens, --instruction and --prefix"),
        ("summarize --check-accuracy --max-articles 9", "--max-articles 9: a verdict on the"),
        ("infill --dataset x --check-accuracy --max-problems 9", "needs at least 10; leave --che"),
    ],
)
def test_the_next_step_is_said(said, command, message):
    """`build` of a c-model folder is what the ancestor's users type first."""
    Path("c-model/1-gpu").mkdir(parents=True)
    status, told = said(*command.format("c-model").split())
    assert status in (1, 2)
    assert message in told


def test_a_folder_with_a_config_alone(copy, said):
    (copy / "model.safetensors").unlink()
    status, told = said("convert", copy, "-o", "out")
    assert (status, told.endswith("draw them: `porttool build --dummy --config`")) == (1, True)


@pytest.mark.parametrize("command", ["build / -o out", "run / --input-text x", "verify /"])
def test_the_root_is_a_folder_as_any_other(said, command):
    status, told = said(*command.split())
    assert (status, told[:18]) == (1, "error: /: there is")


@pytest.mark.parametrize("wrong", [["--engine", "onnx", "--dtype", "float64"], ["--tp", "5"],
                                   ["--engine", "onnx", "--tp", "2"]])  # fmt: skip
def test_a_refused_build_leaves_nothing(said, checkpoint, wrong):
    pytest.importorskip("onnx")
    status, message = said("build", checkpoint.path, "-o", "out", *wrong)
    assert status == 2, message
    assert not list(Path().iterdir())
    assert said("run", "out", "--input-text", "x") == (2, "error: out does not exist")


NEEDS_AN_ENGINE = ("run --input-text x", "verify", "bench", "profile", "summarize",
                   "infill --dataset none.jsonl")  # fmt: skip


@pytest.mark.parametrize("command", ["build", *NEEDS_AN_ENGINE])
@pytest.mark.parametrize("wrong", ["gpt2x", "gpt-2", "gp2"])
def test_a_model_that_is_not_there(said, command, wrong):
    status, message = said(*command.split(), "--model", wrong)
    folder = "checkpoint" if command == "build" else "engine"
    assert status == 2
    assert message.startswith(
        f"error: porttool-out/{wrong}/{folder} does not exist: there is no converter named "
        f"'{wrong}'; did you mean 'gpt2'? (installed: "
    )


def test_a_model_whose_steps_are_still_to_do(said, checkpoint, tmp_path):
    convert, build = "`porttool convert --model gpt2`", "`porttool build --model gpt2`"
    engine = "error: porttool-out/gpt2/engine does not exist; run "
    assert said("build", "--model", "gpt2") == (
        2, f"error: porttool-out/gpt2/checkpoint does not exist; run {convert} first"
    )  # fmt: skip
    for command in NEEDS_AN_ENGINE:
        asked = [*command.split(), "--model", "gpt2"]
        assert said(*asked) == (2, f"{engine}{convert} and {build} first")
    assert "give --model gpt2" in said("build", "--model", "gpt2/megatron")[1]
    shutil.copytree(checkpoint.path, tmp_path / "porttool-out" / "gpt2" / "checkpoint")
    for command in NEEDS_AN_ENGINE:
        assert said(*command.split(), "--model", "gpt2") == (2, f"{engine}{build} first")
    there = said("build", "--model", "gpt2", "--workdir", "there")[1]
    assert there.endswith("run `porttool convert --model gpt2 --workdir there` first")


def test_the_folder_beside_the_right_one_is_told_from_it(said, engine_folder, checkpoint, source):
    """One step above an engine, or one below it; a file out of a source or a checkpoint."""
    for near in (engine_folder.parent, engine_folder / "rank0"):
        status, message = said("run", str(near), "--input-text", "x")
        assert status == 2
        assert message.endswith(f"not an engine of porttool, but {engine_folder} is: name that")
    for folder, kind in ((source, "gpt2"), (checkpoint.path, "a checkpoint")):
        status, message = said("convert", str(folder / "model.safetensors"), "--output", "out")
        assert status == 2
        assert f"; name the folder that it lies in, {folder} ({kind}); `porttool" in message


def test_the_folder_in_the_one_named_is_told(said, source, checkpoint, tmp_path):
    shutil.copytree(source, tmp_path / "models" / "mine")
    shutil.copytree(checkpoint.path, tmp_path / "models" / "checkpoint")
    (tmp_path / "models" / "empty").mkdir()
    near = "name one that lies in it, models/checkpoint (a checkpoint) or models/mine (gpt2);"
    for command in (["inspect", "models"], ["convert", "models", "--output", "out"]):
        status, error = said(*command)
        assert status == 2
        assert f"models: no installed family recognises this; {near}" in error


def test_of_several_archives_one_has_to_be_named(said, tmp_path):
    for name in "ab":
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / f"{name}.nemo").touch()
    status, error = said("convert", "models", "--output", "out")
    near = "name one that lies in it, models/a.nemo (gpt_next) or models/b.nemo (gpt_next);"
    assert (status, near in error) == (2, True)


def test_a_source_named_as_nothing_is_not_the_familys_own(said, monkeypatch):
    monkeypatch.setattr("porttool.hub.fetch", Mock(side_effect=AssertionError))
    status, error = said("convert", "", "--model", "camel5b")
    assert (status, error[:47]) == (2, "error: the name of a folder or hub id is empty:")


@pytest.mark.parametrize("command", ["verify", "summarize"])
def test_a_reference_named_as_nothing_is_not_the_recorded_one(said, engine_folder, command):
    status, error = said(command, engine_folder, "--hf-model", "")
    assert (status, error) == (
        2, "error: the name of a folder or hub id is empty: give one, or leave it out",
    )  # fmt: skip


def test_a_folder_is_named_by_a_dot(said):
    status, message = said("run", ".", "--input-text", "x")
    assert status == 1
    assert message == (
        "error: .: there is no engine.json here, so this is not an engine of porttool; if it is a "
        "source, `porttool convert` and `build` it first; if it was one, make it again"
    )
    Path("table.npy").touch()
    with pytest.raises(UsageError, match="this is a file, not a prompt table: `porttool convert`"):
        PromptTable.open(Path("table.npy"))


def test_a_prompt_table_is_known_as_one(tmp_path, said):
    np.save(tmp_path / "rows.npy", np.ones((2, 24), np.float32))
    assert said("convert", "rows.npy", "-o", "table")[0] == 0
    assert "this is a prompt table of porttool, not an engine" in said("verify", "table")[1]
    with pytest.raises(UsageError, match="gone does not exist"):
        PromptTable.open(tmp_path / "gone")


@pytest.mark.parametrize("names", [(), ("tokenizer_config.json",), ("vocab.json",)])
def test_a_source_without_a_tokenizer(copy, said, names):
    for name in names:
        (copy / name).write_text("{}")
    status, message = said("convert", copy, "-o", "out")
    assert status == 0
    assert "the source has no tokenizer" in message
    assert "only token ids can be fed" in message
    assert not Path("out/tokenizer").exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [("megatron_lm_345m_v0.0.zip", "unpack it and name its folder"),
     ("gpt2.Q4_K_M.gguf", "name the folder in Hugging Face's layout that it was made from")],
)  # fmt: skip
def test_files_that_people_have_and_nobody_reads(said, name, advice):
    place = Path("downloads") / name
    place.parent.mkdir()
    place.touch()
    for named, subject in ((place, "it is"), (place.parent, f"{name} is")):
        status, message = said("convert", named, "-o", "out")
        assert status == 2
        assert f"{named}: no installed family recognises this; {subject} " in message
        assert advice in message


def test_a_folder_of_the_hubs_cache(source, said):
    """Its snapshots are two levels down, beside the blobs that they link to."""
    cached = Path("models--owner--name")
    shutil.copytree(source, cached / "snapshots" / "607a30d")
    status, message = said("convert", cached, "-o", "out")
    assert status == 2
    assert f"name one that lies in it, {cached}/snapshots/607a30d (gpt2)" in message


def test_nothing_is_said_where_there_is_a_tokenizer(tmp_path, tokenizer_folder, said):
    folder = tiny.write_source(tmp_path / "wide", tiny.gpt2(vocab_size=320))
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    status, message = said("convert", folder, "-o", "out")
    assert (status, "no tokenizer" in message) == (0, False)
    assert Path("out/tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize("output", ["{}/out", "{}/deep/er/out", "{}/../source/out"])
def test_an_output_in_the_source(copy, said, output):
    before = sorted(copy.rglob("*"))
    status, message = said("convert", copy, "-o", output.format(copy))
    assert status == 2
    assert f"the output must not lie in the source {copy}" in message
    assert sorted(copy.rglob("*")) == before


def test_null_is_no_default_where_a_value_is_needed(copy, said):
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "activation_function": None}))
    status, message = said("convert", copy, "-o", "out")
    assert status == 1
    assert f"{file}: 'activation_function' is null; give it a value, or delete the key" in message
    config = SourceConfig({"flag": None, "number": None}, file)
    for read in (lambda: config.flag("flag", True), lambda: config.number("number", 1.0)):
        with pytest.raises(SourceError, match="is null"):
            read()


def test_an_option_that_the_family_does_not_have(copy, said):
    status, message = said("convert", copy, "-o", "out", "--n-head", "4")
    assert status == 2
    assert message == "error: bad option for 'gpt2': --n-head is unknown; its options are: none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-output-len", "0"], "--max-output-len: Input should be greater than 0 (got 0)"),
        (["--num-beams", "2", "--num-return-sequences", "3"],
         "--num-return-sequences exceeds --num-beams"),
    ],
)  # fmt: skip
def test_sampling_that_cannot_be(tmp_path, said, engine_folder, arguments, message):
    (tmp_path / "ids.csv").write_text("1,2\n")
    status, told = said("run", engine_folder, "--input-tokens", "ids.csv", *arguments)
    assert (status, told) == (2, f"error: {message}")


def test_a_validation_error_in_plain_words():
    with pytest.raises(ValueError, match="validation error") as caught:
        Sampling.model_validate({"temprature": 1, "top_k": "many"})
    assert explain(caught.value) == (  # type: ignore[arg-type]
        "top_k: Input should be a valid integer, unable to parse string as an integer "
        "(got 'many'); temprature is unknown"
    )


def test_converting_nothing(said):
    status, message = said("convert")
    assert status == 2
    assert "name a SOURCE, or a family with --model" in message


@pytest.mark.parametrize("name", ["gpt2", "santacoder", "echo"])
def test_a_new_plugin_named_as_an_installed_one(said, name):
    pytest.importorskip(f"porttool_{name}")
    status, message = said("plugins", "new", name)
    assert status == 2
    assert f"the package porttool_{name} is installed" in message
    assert not list(Path().iterdir())


def test_ctrl_c_says_what_is_left(source, said, monkeypatch):
    """Interrupted while weights are written; the same command finishes the work."""
    convert = ("convert", source, "-o", "made")
    build = ("build", "made", "-o", "engine", "--dtype", "float64")
    for command in (convert, build):
        with monkeypatch.context() as patch:
            patch.setattr(ConsoleProgress, "advance", Mock(side_effect=KeyboardInterrupt))
            status, message = said(*command)
        output = command[3]
        left = Path(f".{output}.partial")
        assert status == 130
        assert message.endswith(
            f"error: interrupted; {left} keeps what was written: run the same command again to "
            "finish, or remove that folder to be rid of it"
        )
        assert left.is_dir()
        assert said(*command)[0] == 0
        assert Path(output).is_dir()
        assert not left.exists()


def test_a_failure_gives_the_terminal_its_cursor_back(copy, tmp_path):
    """A bar hides it, and nobody ended the bar of work that failed."""
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = torch.nan
    save_file(weights, copy / "model.safetensors")
    terminal, stream = pty.openpty()
    command = [sys.executable, "-m", "porttool", "convert", str(copy), "-o", str(tmp_path / "new")]
    with subprocess.Popen(command, stderr=stream, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(stream)
        told = b""
        with suppress(OSError):  # EIO is its end
            while piece := os.read(terminal, 1 << 12):
                told += piece
    os.close(terminal)
    hide, show = b"\x1b[?25l", b"\x1b[?25h"
    assert process.returncode == 1
    assert hide in told
    assert told.index(show) < told.index(b"error: ")
    assert told.count(hide) == told.count(show)


def test_ctrl_c_where_nothing_is_left(source, said, monkeypatch):
    monkeypatch.setattr("porttool.api.convert_source", Mock(side_effect=KeyboardInterrupt))
    assert said("convert", source, "-o", "made") == (130, "error: interrupted")
    assert not list(Path().iterdir())


def test_a_gpu_that_is_full(source, said, monkeypatch):
    """As when another process takes its memory after the engine was loaded."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total")
    assert said("convert", source, "-o", "made")[0] == 0
    assert said("build", "made", "-o", "engine")[0] == 0
    monkeypatch.setattr("porttool.engines.torch.cpu.CpuDecoder.step", Mock(side_effect=full))
    Path("prompts.csv").write_text("1,2\n")
    status, message = said("run", "engine", "--input-tokens", "prompts.csv")
    assert status == 1
    assert message.endswith(
        "error: the GPU ran out of memory (CUDA out of memory. Tried to allocate 2 GiB): stop what "
        "else uses it, or build with a smaller --max-batch-size or --max-input-len"
    )


def test_sizes_in_a_unit_that_fits(source, said):
    """A tiny model's progress is no "0.000 of 0.000 GB"."""
    sizes = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "1.00 kB",
        2.5e6: "2.50 MB",
        3.1e12: "3100.00 GB",
    }
    assert {n: format_bytes(n) for n in sizes} == sizes
    n_bytes = sum(t.nbytes for t in SafetensorsFile(source / "model.safetensors").infos().values())
    status, message = said("convert", source, "-o", "made")
    assert status == 0
    size = f"{n_bytes / 1e3:.2f} kB"
    assert f"convert gpt2: {size} of {size}, " in message


def test_the_end_of_slow_work_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr("porttool.cli.console.PLAIN_INTERVAL", -1)
    progress = ConsoleProgress()
    progress.start("bench", 2, unit="runs")
    progress.advance(1)
    progress.advance(1)
    progress.finish()
    told = [line.partition(", ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["bench: 1 of 2 runs", "bench: 2 of 2 runs"]


def test_a_slow_device_has_a_speed():
    """Half precision on a CPU was 0.00 TFLOP/s."""
    assert [format_tera(x) for x in (2.1e9, 1.5e11, 8.711e14)] == ["0.0021", "0.15", "871"]


def test_a_list_is_asked_for_as_it_is_written():
    class Tasks(Component):
        name = "tasks"

        class Options(Options):
            tasks: tuple[str, ...] = ()

    with pytest.raises(UsageError) as caught:
        Tasks({"tasks": "a"})
    assert str(caught.value) == (
        """bad option for 'tasks': tasks: should be a list, as '["a", "b"]' (got 'a')"""
    )


KNOBS = "--n-layer 1 --n-embd 16 --n-head 2 --vocab-size 64 --n-positions 32"


@pytest.mark.parametrize(
    "command",
    [
        "convert {source} -o {place}",
        "convert {source} -o {place} --force",
        "convert {source} --workdir {place}",
        "convert rows.npy -o {place}",
        "build {checkpoint} -o {place}",
        f"build --dummy {KNOBS} -o {{place}}",
        "export {checkpoint} --format fastertransformer -o {place}",
        "plugins new my_family -o {place}",
        "profile {engine} -o {place}",
        "verify {engine} --output {place}",
        "summarize {engine} --output {place}",
    ],
)
@pytest.mark.parametrize("place", ["file/sub", "file/a/b", "link/sub"])
def test_an_output_below_a_file(said, source, checkpoint, engine_folder, command, place):
    Path("file").write_text("mine")
    Path("link").symlink_to("gone")
    np.save("rows.npy", np.ones((2, 24), np.float32))
    before = sorted(Path().rglob("*"))
    places = {"source": source, "checkpoint": checkpoint.path, "engine": engine_folder}
    status, message = said(*command.format(place=place, **places).split())
    assert status == 2
    above = Path(place).parts[0]
    assert message.startswith(f"error: {place}")
    assert message.endswith(f"{Path(above).absolute()} is not a folder; choose another place")
    assert Path("file").read_text() == "mine"
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("flag", ["--output-json", "--picture"])
def test_a_result_below_a_file(said, engine_folder, flag):
    Path("file").write_text("mine")
    status, message = said("bench", engine_folder, flag, "file/x.png")
    assert (status, message) == (
        2, f"error: file/x.png: there is no folder {Path('file').absolute()}"
    )  # fmt: skip


@pytest.mark.parametrize("command", ["convert {source}", "build {checkpoint}"])
@pytest.mark.parametrize("stands", ["checkpoint", "engine", "[]", "3", "[" * 99_999, "other"])
def test_what_stands_at_the_output_is_said_before_any_work(
    said, source, checkpoint, engine_folder, monkeypatch, command, stands
):
    """And --force is advice only where it would do."""
    if stands in ("checkpoint", "engine"):
        shutil.copytree({"checkpoint": checkpoint.path, "engine": engine_folder}[stands], "out")
    else:
        Path("out").mkdir()
        Path("out", "a" if stands == "other" else "checkpoint.json").write_text(stands)
    for work in ("porttool.converter.plan_jobs", "porttool.api.open_checkpoint"):
        monkeypatch.setattr(work, None)
    asked = command.format(source=source, checkpoint=checkpoint.path).split()
    status, told = said(*asked, "-o", "out")
    what = {"checkpoint": "(a finished checkpoint of gpt2 in float32, from ",
            "engine": "(a finished engine of gpt2 in float64, from ",
            "other": "already; choose"}  # fmt: skip
    made = "checkpoint" if "convert" in command else "engine"
    kind = stands if stands in ("engine", "other") else "checkpoint"
    assert status == 2
    assert told.startswith("error: out exists already")
    assert what.get(stands, "(a damaged checkpoint); ") in told
    replaceable = kind == made
    assert ("add --force to make it anew" in told) is replaceable


@pytest.mark.parametrize("target", ["checkpoint", "gone"])
@pytest.mark.parametrize("flags", [(), ("--force",)])
def test_a_link_at_the_output_is_called_one(said, source, checkpoint, target, flags):
    if target == "checkpoint":
        shutil.copytree(checkpoint.path, target)
    Path("link").symlink_to(target)
    status, told = said("convert", source, "-o", "link", *flags)
    assert status == 2
    place = Path(target).absolute()
    assert told.startswith(f"error: link is a symbolic link to {place}, and no link is replaced")
    assert Path("link").is_symlink() and Path(target).exists() is (target == "checkpoint")
