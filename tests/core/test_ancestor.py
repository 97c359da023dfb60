"""Command lines of the tools that people come from: as far as they hold here, and what is said."""

from __future__ import annotations

import shlex

import click
import pytest

from porttool.cli import COMMANDS, ancestor, cli, invoke

SMOOTH = "convert gpt2 -o out -sq 0.5 -t float16"
LINES = {
    "convert -i gpt2 -o ./c-model/gpt2 --tensor-parallelism 1 --storage-type float16": [
        "-i: the source is given by its path alone",
        "--tensor-parallelism: leave it out, a checkpoint is not divided; `porttool build --tp`",
        "--storage-type: here it is --dtype",
    ],
    "convert -o out -i models/1558M/model.ckpt -g 1": ["-i: the source", "-g: leave it out"],
    SMOOTH: ["-s: there is no quantisation yet", "-t: here it is --dtype"],
    "convert -p 8 -i gpt2 --calibrate-kv-cache": [
        "-p: here it is --processes", "--calibrate-kv-cache: there is no quantisation yet",
    ],
    "build --model_dir=c/1-gpu --world_size=8 --use_gemm_plugin --output_dir=out": [
        "--model-dir: the checkpoint is given", "--world-size: here it is --tp",
        "--use-gemm-plugin: leave it out, an engine takes its fastest", "--output-dir: here it is",
    ],
    "run --max_output_len=8 --engine_dir=gpt_175b --vocab_file t.model": [
        "--engine-dir: the engine is given", "--vocab-file: leave it out, the tokenizer travels",
    ],
    "summarize --engine_dir e --test_hf --test_trt_llm --hf_model_location=gpt2 --check_accuracy "
    "--tensorrt_llm_rouge1_threshold=14": [
        "--test-trt-llm: here it is --test-engine", "--hf-model-location: here it is --hf-model",
        "--tensorrt-llm-rouge1-threshold: here it is --rouge1-threshold",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_options_of_another_tool_are_all_explained_at_once(capsys, line):
    assert invoke(shlex.split(line)) == 2
    said = capsys.readouterr().err
    assert "options of another tool:" in said
    for told in LINES[line]:
        assert f"\n  {told}" in said


def test_what_is_no_ancestors_stays_as_it_was(capsys):
    assert invoke(["run", "e", "--topp", "0.9"]) == 2
    assert "No such option '--topp'. (Did you mean one of:" in capsys.readouterr().err
    assert invoke(["run", "e", "--hf-model-location", "x"]) == 2  # another command's
    assert "No such option '--hf-model-location'." in capsys.readouterr().err
    assert invoke(["summarize", "e", "--max-new-tokens", "5", "--max_ite", "9"]) == 2
    assert "--max-new-tokens" not in capsys.readouterr().err  # it is this command's, too


def test_options_are_taken_with_underscores(tmp_path, capsys, engine_folder):
    (tmp_path / "ids.csv").write_text("5,9,2\n")
    options = ["--input_tokens", str(tmp_path / "ids.csv"), "--max_output_len=3", "--ignore_eos"]
    assert invoke(["run", str(engine_folder), *options, "--output_json", "-"]) == 0
    assert '"finish": "length"' in capsys.readouterr().out


def test_what_is_said_to_be_here_is():
    """Every option that another's is said to be called is one of some command."""
    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    ours = {o for command in commands if command for p in command.params for o in p.opts}
    named = {here.split()[0] for here in ancestor.CALLED.values() if here.startswith("--")}
    assert named <= ours
    told = {o for o, here in ancestor.CALLED.items() if o[:2] != "--" or here[0] != "-"}
    assert not told & ours  # nor is one of ours said to be another's
