"""porttool run: prompts in, completions out, as text or as token ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.completions import Stream, write_results
from porttool.cli.options import (
    FILE,
    FOLDER,
    ModelCommand,
    OptionTable,
    as_settings,
    explaining,
    flags_in,
    model_options,
    names_in,
    set_option,
    spelling,
    table_options,
)
from porttool.errors import CheckpointError, UsageError
from porttool.standing import require_writable

if TYPE_CHECKING:
    from porttool.api import LoadedEngine
    from porttool.config import Sampling

SAMPLING: OptionTable = (
    ("--max-output-len", {"type": int,
                          "help": "Most new tokens [64, or what the engine holds]."}),
    ("--min-output-len", {"type": int, "default": 0, "help": "Fewest new tokens."}),
    ("--ignore-eos", {"is_flag": True, "help": "Go on after an end token."}),
    ("--temperature", {"type": float, "default": 0.0, "help": "Sample; 0 is greedy."}),
    ("--top-k", {"type": int, "default": 0,
                 "help": "With a temperature: sample among the k likeliest."}),
    ("--top-p", {"type": float, "default": 1.0,
                 "help": "With a temperature: sample in this much probability."}),
    ("--min-p", {"type": float, "default": 0.0,
                 "help": "With a temperature: least share of the likeliest."}),
    ("--seed", {"type": int, "default": 0,
                "help": "Seed of the first prompt's sampling; greedy decoding draws nothing."}),
    ("--repetition-penalty", {"type": float, "default": 1.0, "help": "Divides seen logits."}),
    ("--presence-penalty", {"type": float, "default": 0.0, "help": "Off a logit seen once."}),
    ("--frequency-penalty", {"type": float, "default": 0.0, "help": "Off for every time seen."}),
    ("--bad-words", {"multiple": True, "help": "Text that must not appear; repeatable."}),
    ("--stop", {"multiple": True, "help": "Text to stop before, repeatable; not with beams."}),
    ("--num-beams", {"type": int, "default": 1, "help": "Beam search with so many beams."}),
    ("--num-return-sequences", {"type": int, "default": 1, "help": "Completions a prompt."}),
    ("--length-penalty", {"type": float, "default": 1.0,
                          "help": "With beams: exponent of their length."}),
    ("--early-stopping", {"is_flag": True, "help": "With beams: end when enough have ended."}),
    ("--logprobs", {"is_flag": True, "help": "With --output-json: every token's log-probability."}),
)  # fmt: skip

INPUTS: OptionTable = (
    ("--input-text", {"multiple": True, "help": "A prompt; repeatable. `-` reads standard input."}),
    ("--input-file", {"type": FILE, "help": "Text file, one prompt a line, blank ones skipped."}),
    ("--input-tokens", {"type": FILE, "help": "Token ids: .csv, one prompt a row, or .npy."}),
    ("--instruction", {"help": "Ask through the model's instruction template."}),
    ("--prefix", {"help": "Text before a gap that the model is to fill in."}),
    ("--suffix", {"help": "Text after the gap."}),
    ("--tokenizer", {"type": FOLDER, "help": "Folder of another tokenizer."}),
    ("--prompt-table", {"type": FOLDER, "help": "Virtual tokens that go before the prompts."}),
    ("--task", {"multiple": True,
                "help": "Task of the table, by name or number: one, or one a prompt. Without it "
                        "ids from vocab_size on are the table's rows."}),
    ("--tasks", {"help": "The same, separated by commas."}),
)  # fmt: skip

OUTPUTS: OptionTable = (
    ("--stream", {"is_flag": True,
                  "help": "Show text as it is made: one prompt, no beams. With `--output-json -` "
                          "on standard error."}),
    ("--output-json", {"type": FILE, "help": "JSON lines, one prompt each; `-` prints them."}),
    ("--output-csv", {"type": FILE, "help": "Ids, prompt and completion in a row."}),
    ("--output-npy", {"type": FILE, "help": "The same, padded, with a file of lengths."}),
    ("--output-logits-npy", {"type": FILE, "help": "float32 [prompts, new tokens, vocabulary]."}),
)  # fmt: skip


INPUT_CHOICES: tuple[set[str], ...] = (
    {"input_text"}, {"input_file"}, {"input_tokens"}, {"instruction"},
    {"instruction", "input_text"}, {"instruction", "input_file"},
    {"prefix"}, {"suffix"}, {"prefix", "suffix"},
)  # fmt: skip


@click.command("run", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@table_options(INPUTS, SAMPLING, OUTPUTS)
@model_options
@set_option
@click.pass_context
def command(context: click.Context, /, engine: Path | None, **_: Any) -> None:
    """Continue prompts with ENGINE, or with the engine of --model."""
    from porttool.api import load
    from porttool.generate import generate
    from porttool.workspace import Workspace

    asked = context.params
    check_texts(asked)
    check_inputs(asked)
    check_places(asked)
    read_sampling(asked)  # what is wrong with it is said before anything is loaded
    loaded = load(
        engine,
        model=asked["model"],
        tokenizer=asked["tokenizer"],
        options=as_settings(asked["settings"]),
        workspace=Workspace.choose(asked["workdir"]),
    )
    if loaded.engine.manifest.dummy:
        console.note("the weights of this engine are random (build --dummy): so is what it says")
    prompts = with_virtual_tokens(asked, loaded, read_prompts(asked, loaded))
    sampling = read_sampling(asked, loaded)
    beside = str(asked["output_json"]) == "-"
    stream = Stream(loaded, len(prompts), sampling, beside=beside) if asked["stream"] else None
    results = generate(
        loaded.runner,
        prompts,
        sampling,
        eos=loaded.engine.manifest.tokens.eos,
        tokenizer=loaded.tokenizer,
        on_token=stream.push if stream else None,
    )
    if stream:
        stream.finish()
    write_results(asked, loaded, prompts, results, shown=stream is not None)


def check_texts(asked: dict[str, Any]) -> None:
    """Refuse text of the command line that is not UTF-8: it came as surrogates."""
    for name in ("input_text", "instruction", "prefix", "suffix", "stop", "bad_words"):
        given = asked[name] or ()
        for text in (given,) if isinstance(given, str) else given:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"--{name.replace('_', '-')} {text!r}: not UTF-8 text") from error


def check_inputs(asked: dict[str, Any]) -> None:
    """Refuse other than one input, and files that are not there, before anything is loaded."""
    given = {k for k in set().union(*INPUT_CHOICES) if asked[k]}
    if given not in INPUT_CHOICES:
        raise UsageError(
            "give one of --input-text, --input-file, --input-tokens, --instruction and --prefix"
        )
    for path in (asked["input_file"], asked["input_tokens"]):
        if path is not None and not path.exists():
            hint = "; only --input-text reads standard input" if str(path) == "-" else ""
            raise UsageError(f"{path}: there is no such file{hint}")


def check_places(asked: dict[str, Any]) -> None:
    """Refuse places that no result can be written to, before anything runs."""
    from porttool.token_files import LENGTHS

    names = list(names_in(OUTPUTS[1:]))
    for name in names[1:]:
        if str(asked[name]) == "-":
            raise UsageError("only --output-json writes to standard output: name a file")
    npy = asked["output_npy"]
    places = [asked[name] for name in names if str(asked[name]) != "-"]
    require_writable(*places)
    require_writable(*places, npy and npy.with_suffix(LENGTHS))  # which is written beside it
    if asked["logprobs"] and not asked["output_json"]:
        raise UsageError("--logprobs are written with --output-json alone: add it; `-` prints them")


def read_prompts(asked: dict[str, Any], loaded: LoadedEngine) -> list[list[int]]:
    """Return the prompts' ids, from whichever one input was given."""
    from porttool.text import fill_template, infill_prompt
    from porttool.token_files import read_tokens

    if asked["input_tokens"]:
        return read_tokens(asked["input_tokens"])
    if loaded.tokenizer is None:
        raise UsageError("this engine has no tokenizer: give --input-tokens, or --tokenizer DIR")
    texts = read_texts(asked)
    if asked["instruction"]:
        template = loaded.engine.manifest.prompt
        texts = [fill_template(template, asked["instruction"], text) for text in texts or [""]]
    if asked["prefix"] or asked["suffix"]:
        infill = loaded.engine.manifest.infill
        texts = [infill_prompt(infill, asked["prefix"] or "", asked["suffix"] or "")]
    try:
        return [loaded.tokenizer.encode(text) for text in texts]
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or give token ids with --input-tokens") from error


def with_virtual_tokens(
    asked: dict[str, Any], loaded: LoadedEngine, prompts: list[list[int]]
) -> list[list[int]]:
    """Return the prompts with their tasks' virtual tokens, and load the table they are rows of."""
    from porttool.prompt_table import PromptTable, use_table

    tasks = [*asked["task"], *(t.strip() for t in (asked["tasks"] or "").split(",") if t.strip())]
    if asked["prompt_table"]:
        return use_table(PromptTable.open(asked["prompt_table"]), loaded.runner, prompts, tasks)
    if tasks:
        raise UsageError("--task and --tasks need --prompt-table")
    return prompts


TEXT = "utf-8-sig"
"""UTF-8, after a byte order mark if there is one: it is no part of the first prompt."""


def read_texts(asked: dict[str, Any]) -> list[str]:
    """Return the texts of a file, of standard input, or of the command line."""
    try:
        if asked["input_file"]:
            if lines := read_lines(asked["input_file"].read_bytes().decode(TEXT)):
                return lines
            raise UsageError(f"{asked['input_file']}: there is no prompt in it")
        return [
            sys.stdin.buffer.read().decode(TEXT) if text == "-" else text
            for text in asked["input_text"]
        ]
    except UnicodeDecodeError as error:
        name = asked["input_file"] or "standard input"
        raise UsageError(f"{name}: not UTF-8 text: {error}") from error


def read_lines(text: str) -> list[str]:
    """Return the lines that are not blank; only a newline ends one. Say how many were blank."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    kept = [line for line in lines if line.strip()]
    if skipped := len(lines) - len(kept):
        console.note(f"blank lines skipped: {skipped}")
    return kept


FLAGS = flags_in(SAMPLING) | {"temperature": "--temperature", "seed": "--seed"}
FLAGS |= {"max_new_tokens": "--max-output-len", "min_new_tokens": "--min-output-len"}


@spelling(FLAGS)
def read_sampling(asked: dict[str, Any], loaded: LoadedEngine | None = None) -> Sampling:
    """Return the sampling that the options ask for; without an engine, as far as that goes."""
    from porttool.config import Sampling

    values = {name: asked[name] for name in names_in(SAMPLING)}
    least, most = values.pop("min_output_len"), values.pop("max_output_len")
    values |= {"min_new_tokens": least, "max_new_tokens": most}
    if most is None:
        usual = min(64, loaded.engine.manifest.limits.max_output_len) if loaded else max(least, 1)
        values["max_new_tokens"] = usual
    if asked["bad_words"] and loaded and loaded.tokenizer is None:
        raise UsageError("--bad-words needs a tokenizer: add --tokenizer DIR")
    # Without an engine the bytes of a word stand for its ids: an empty one is found at once.
    encode = loaded.tokenizer.encode if loaded and loaded.tokenizer else str.encode
    values["bad_words"] = tuple(tuple(encode(word)) for word in asked["bad_words"])
    values["keep_logits"] = asked["output_logits_npy"] is not None
    with explaining():
        return Sampling.model_validate(values)
