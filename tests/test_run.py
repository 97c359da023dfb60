"""What `run` prints, refuses and reads, on a tiny engine of 64 positions with a tokenizer."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

import nemo_writer
import tiny
from porttool.cli import console, invoke, main
from porttool.config import Limits
from porttool.errors import UsageError
from porttool.generate import Completion
from porttool.token_files import as_record, write_logits

PROMPT = ["--input-text", "The mayor"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("run")
    model = tiny.gpt2(seed=1, vocab_size=320, n_positions=64, bos_token_id=0, eos_token_id=0,
                      pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
    model.transformer.wte.weight.mul_(4)
    source = tiny.write_source(folder / "source", model)
    shutil.copy(tokenizer_folder / "tokenizer.json", source)
    checkpoint = tiny.converted(source, folder / "checkpoint")
    limits = Limits(max_batch_size=8, max_input_len=32, max_output_len=32)
    return tiny.built(checkpoint, folder / "engine", dtype="float64", limits=limits).path


@pytest.fixture
def run(engine, capsys):
    """Runs the command; returns its status and what it wrote to both streams."""

    def call(*arguments):
        given = [str(argument) for argument in arguments]
        status = invoke(["run", str(engine), "--set", "canonical", "true", *given])
        return status, *capsys.readouterr()

    return call


def test_what_a_model_says_is_printed_as_it_is(run, monkeypatch):
    said = "a[:heart:] [bold]b[/red]\tc\x07\r\x1b[1md  "
    monkeypatch.setattr("porttool.text.BPETokenizer.decode", lambda *_: said)
    assert run(*PROMPT, "--max-output-len", "2") == (0, said + "\n", "")


def test_a_row_that_ends_at_once_has_no_logits_and_takes_none_away(tmp_path):
    """All were refused, when everything had run, for one prompt whose first token was the end."""
    ended, whole = Completion((), "eos"), Completion((1,), "length", logits=torch.ones(1, 3))
    write_logits(tmp_path / "l.npy", [ended, whole])
    found = torch.from_numpy(np.load(tmp_path / "l.npy"))
    assert found[0].isnan().all()
    assert found[1].equal(torch.ones(1, 3))
    with pytest.raises(UsageError, match="no completion has a token, so there are no logits"):
        write_logits(tmp_path / "l.npy", [ended])


@pytest.mark.parametrize(("n_tokens", "beyond"), [(50, 2), (60, 1)])
def test_ids_beyond_the_tokenizer_are_said_to_be_so(run, tmp_path, n_tokens, beyond):
    """The model says 56 and 264; where no id is the tokenizer's an empty line looks like text."""
    (tmp_path / "tokenizer.model").write_bytes(nemo_writer.sentencepiece_model(n_tokens))
    (tmp_path / "ids.csv").write_text("1,2\n3,4\n")
    asked = ("--input-tokens", tmp_path / "ids.csv", "--max-output-len", "1")
    status, out, err = run(*asked, "--tokenizer", tmp_path)
    assert (status, out.count("\n")) == (0, 2)
    said = f"{beyond} of 2 completions hold no id of the tokenizer, which has {n_tokens}, the model"
    assert said in " ".join(err.split())


def test_a_prompt_that_the_tokenizer_cannot_encode(run, tmp_path):
    model = {"type": "WordLevel", "vocab": {"T": 0}, "unk_token": "?"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    status, _, err = run(*PROMPT, "--tokenizer", tmp_path)
    assert status == 1
    assert "name another folder with --tokenizer, or give token ids with --input-tokens" in err
    status, _, err = run(*PROMPT, "--tokenizer", tmp_path / "gone")
    assert status == 1
    assert err.endswith("vocab.txt); name another folder with --tokenizer\n")


def test_paths_and_titles_are_no_markup(tmp_path, capsys, source, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = shutil.copytree(source, tmp_path / "w[" / "red]:heart:" / "ck [bold]")
    assert invoke(["inspect", str(folder)]) == 0
    assert "red]:heart:/ck [bold]" in capsys.readouterr().out
    console.table("[/red]", ["[/red]"], [["[/red]"]])
    console.note("[/red] :heart:")
    shown = capsys.readouterr()
    assert shown.out.count("[/red]") == 3
    assert shown.err == "[/red] :heart:\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stream", "--num-beams", "2"], "--stream shows one completion"),
        (["--stream", "--num-return-sequences", "2", "--temperature", "1"], "one completion"),
        (["--num-beams", "2", "--stop", "a"], "beam search does not end at stop strings"),
        (["--seed", str(10**23)], "seed"),
        (["--seed", str(-(2**63) - 1)], "seed"),
        (["--temperature", "nan"], "finite number (got nan)"),
        (["--temperature", "inf"], "finite number (got inf)"),
        (["--repetition-penalty", "inf"], "finite number"),
        (["--presence-penalty", "nan"], "finite number"),
        (["--length-penalty", "-inf"], "finite number"),
        (["--stop", "a\udcff"], "--stop 'a\\udcff': not UTF-8 text"),
        (["--bad-words", "a\udcff"], "--bad-words 'a\\udcff': not UTF-8 text"),
        (["--instruction", "\udcff"], "--instruction '\\udcff': not UTF-8 text"),
        (["--output-csv", "-"], "only --output-json writes to standard output"),
        (["--top-p", "0.9"], "--top-p would change nothing; set --temperature above 0"),
        (["--top-k", "5", "--min-p", "0.1"], "--top-k, --min-p would change"),
        (
            ["--num-beams", "2", "--temperature", "1", "--top-k", "4"],
            "--temperature, --top-k would change nothing; leave that out: beam search does not",
        ),
        (["--temperature", "0", "--top-k", "5"], "--top-k would change nothing"),
        (["--num-beams", "2", "--top-p", "0.9"], "leave that out: beam search does not sample"),
        (["--num-return-sequences", "2"], "--num-return-sequences needs a --temperature"),
        (["--length-penalty", "2"], "--length-penalty would change nothing; set --num-beams above"),
        (["--temperature", "1", "--early-stopping"], "--early-stopping would change nothing"),
        (["--logprobs"], "--logprobs are written with --output-json alone: add it"),
        (["--max-output-len", "40"], "build with --max-output-len 40"),
        (["--max-output-len", "64"], "take another model: this one has 64 positions"),
        (["--input-text", "x" * 40, "--input-text", "y"], "build with --max-input-len 40"),
        (["--input-text", "x" * 64], "shorten it, or take another model"),
    ],
)
def test_what_cannot_be_is_refused(run, arguments, says):
    status, out, err = run(*PROMPT, *arguments)
    assert (status, out) == (2, "")
    assert says in err


@pytest.mark.parametrize("decoding", [(), ("--num-beams", "2")])
def test_a_seed_of_what_draws_nothing_is_taken(run, decoding):
    """Scripts fix it once, for a temperature of 0, too."""
    plain = run(*PROMPT, "--max-output-len", "4", *decoding)
    assert plain[0] == 0
    assert run(*PROMPT, "--max-output-len", "4", *decoding, "--seed", "7") == plain


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--top-p", "0.9"], "set --temperature above 0"),
        (["--max-output-len", "0"], "--max-output-len: Input should be greater than 0"),
        (["--min-output-len", "9", "--max-output-len", "8"], "--min-output-len 9 exceeds --max-"),
        (["--min-output-len", "-1"], "--min-output-len: Input should be greater"),
        (["--logprobs"], "--output-json alone"),
        (["--bad-words", ""], "an empty bad word or stop string"),
    ],
)
def test_sampling_is_looked_at_before_anything_is_loaded(run, monkeypatch, arguments, says):
    monkeypatch.setattr("porttool.api.load", None)
    status, out, err = run(*PROMPT, *arguments)
    assert (status, out) == (2, "")
    assert says in err


def test_what_of_sampling_depends_on_the_engine(run):
    status, out, err = run(*PROMPT, "--min-output-len", "40")
    assert (status, out) == (2, "")
    assert "--min-output-len 40 exceeds --max-output-len 32" in err


@pytest.mark.parametrize(
    ("flag", "content", "says"),
    [
        ("--input-tokens", "5\n9,99999\n", "prompt 1 holds the id 99999; ids run from 0 to 319, "
         "those of virtual tokens, from there on, need --prompt-table"),
        ("--input-tokens", "5\n9,-2\n", "prompt 1 holds the id -2; ids run from 0 to 319"),
        ("--input-tokens", "5\nx\n", "in, line 2: should be token ids, separated by commas"),
        ("--input-tokens", "", "in: there is no prompt in it"),
        ("--input-tokens", " \n\n", "in: there is no prompt in it"),
        ("--input-file", "", "in: there is no prompt in it"),
        ("--input-file", " \n\n", "in: there is no prompt in it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_of_prompts(run, tmp_path, monkeypatch, flag, content, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text(content)
    status, out, err = run(flag, "in")
    assert (status, out) == (2, "")
    assert says in " ".join(err.split())


@pytest.mark.parametrize("flag", ["--input-file", "--input-tokens"])
def test_a_file_of_prompts_that_is_not_there(run, monkeypatch, flag):
    monkeypatch.setattr("porttool.api.load", None)
    said = "there is no such file; only --input-text reads standard input"
    assert run(flag, "-") == (2, "", f"error: -: {said}\n")
    assert run(flag, "nowhere.csv") == (2, "", "error: nowhere.csv: there is no such file\n")


@pytest.mark.parametrize("flag", ["json", "csv", "npy", "logits-npy"])
def test_a_place_that_is_not_there_is_refused_before_anything_runs(run, monkeypatch, flag):
    monkeypatch.setattr("porttool.api.load", None)
    status, _, err = run(*PROMPT, f"--output-{flag}", "nodir/a")
    assert status == 2
    assert "nodir/a: there is no folder" in err


def test_a_seed_may_be_any_signed_64_bit_number(run):
    for seed in (-(2**63), 2**63 - 1):
        sampled = ["--temperature", "1", "--num-return-sequences", "2", "--seed", str(seed)]
        assert run(*PROMPT, *sampled, "--max-output-len", "2")[0] == 0


def test_a_stream_stops_where_the_text_does(run):
    length = ["--max-output-len", "24"]
    whole = run(*PROMPT, *length)[1]
    stops = {whole[i : i + n] for i in range(2, len(whole) - 6, 3) for n in (1, 2, 5)}
    stops = [s for s in sorted(stops) if "\N{REPLACEMENT CHARACTER}" not in s][:12]
    assert len(stops) > 5
    for stop in stops:
        asked = [*PROMPT, *length, f"--stop={stop}", "--stop=not there"]
        assert run(*asked, "--stream") == run(*asked)


def test_a_stream_beside_printed_json_goes_to_standard_error(run):
    asked = [*PROMPT, "--max-output-len", "8", "--output-json", "-"]
    status, plain, nothing = run(*asked)
    assert (status, nothing) == (0, "")
    text = json.loads(plain)["completions"][0]["text"]
    assert run(*asked, "--stream") == (0, plain, text + "\n")


def test_the_default_length_is_what_the_engine_holds(run):
    status, out, _ = run(*PROMPT, "--ignore-eos", "--output-json", "-")
    assert status == 0
    assert len(json.loads(out)["completions"][0]["tokens"]) == 32


def test_only_a_newline_ends_a_prompt(run, tmp_path, monkeypatch):
    file, read = tmp_path / "prompts.txt", []
    monkeypatch.setattr(
        "porttool.text.BPETokenizer.encode", lambda _, text: read.append(text) or [1]
    )
    file.write_bytes("a\u2028b\x0b\x0cc\r\n\n  \nd\x85\re\n".encode())
    status, _, err = run("--input-file", file, "--max-output-len", "1")
    assert (status, read) == (0, ["a\u2028b\x0b\x0cc", "d\x85\re"])
    assert err == "blank lines skipped: 2\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(run, tmp_path, monkeypatch):
    """Editors on Windows write one."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfThe mayor"))
    monkeypatch.setattr("sys.stdin", stdin)
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfThe mayor\r\n")
    (tmp_path / "ids.csv").write_bytes(b"\xef\xbb\xbf5,9\r\n")
    ask = ("--max-output-len", "1", "--output-json", "-")
    wanted = run(*PROMPT, *ask)
    assert run("--input-file", tmp_path / "text", *ask) == wanted
    assert run("--input-text", "-", *ask) == wanted
    status, out, _ = run("--input-tokens", tmp_path / "ids.csv", *ask)
    assert (status, json.loads(out)["prompt_tokens"]) == (0, [5, 9])


def test_python_runs_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["porttool", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("porttool", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"porttool, version {version('porttool')}\n"


def test_what_is_no_number_is_null_in_json():
    completion = Completion((1, 2), "length", logprobs=(float("nan"), -0.5), score=-float("inf"))
    [found] = as_record([3], [completion])["completions"]
    assert (found["logprobs"], found["score"]) == ([None, -0.5], None)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_cannot_say_is_escaped(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    with pytest.raises(SystemExit) as ended:
        main(["run", "--model", "≤", "--input-text", "x"])
    console.say("≤")
    console.table("≤", ["≤"], [["≤"]])
    assert ended.value.code in (1, 2)
    for stream in streams:
        stream.flush()
        assert rb"\u2264" in stream.buffer.getvalue()


def test_a_stream_that_cannot_be_reconfigured_is_left(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", None)
    console.tolerate_encodings()


@pytest.mark.parametrize("flag", ["--output-csv", "--output-json", "--output-npy"])
def test_no_file_of_an_engine_is_written_over(run, engine, tmp_path, flag):
    (tmp_path / "link").symlink_to(engine)
    for place in (engine, tmp_path / "link"):
        before = (engine / "engine.json").read_bytes()
        status, _, said = run(*PROMPT, flag, str(place / "engine.json"))
        assert (engine / "engine.json").read_bytes() == before
        assert status == 2
        assert f"lies in {engine}, which is an engine: choose another place" in said


def test_what_is_printed_lies_in_no_folder(run, engine, monkeypatch):
    monkeypatch.chdir(engine)
    assert run(*PROMPT, "--output-json", "-")[0] == 0


@pytest.mark.parametrize("flag", ["--output-csv", "--output-npy", "--output-json"])
def test_no_name_is_no_file(run, monkeypatch, flag):
    """As a variable of the shell that is not set gives it; the work was lost at its end."""
    monkeypatch.setattr("porttool.api.load", None)
    status, _, said = run(*PROMPT, flag, "")
    assert (status, said) == (2, "error: . is a folder: name a file for the result\n")


def test_two_results_take_two_files(run, tmp_path):
    both = [
        "--output-csv",
        str(tmp_path / "a"),
        "--output-json",
        str(tmp_path / "." / "b" / ".." / "a"),
    ]
    (tmp_path / "b").mkdir()
    status, _, said = run(*PROMPT, *both)
    assert status == 2
    assert "is named for two results, of which one would be lost" in said
    npy, lengths_npy = tmp_path / "a.npy", tmp_path / "a.lengths.npy"
    lengths = ["--output-npy", npy, "--output-logits-npy", lengths_npy]
    assert "a.lengths.npy is named for two results" in run(*PROMPT, *lengths)[2]
    null = ["--output-csv", "/dev/null", "--output-json", "/dev/null", "--max-output-len", "1"]
    assert run(*PROMPT, *null)[0] == 0


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_files_of_ours(closed, tmp_path):
    """The lowest descriptor would be given to what is opened next, with what is printed."""
    script = (
        "import os; from porttool.cli import main\n"
        "try: main(['plugins', 'list', '--json'])\n"
        "finally: open('next', 'w').write(str(os.open(os.devnull, os.O_RDONLY) > 2))"
    )
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", script]
    ended = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "next").read_text() == "True"
