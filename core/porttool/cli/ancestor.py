"""Options of the tools that people come from: what they are called here, or why there are none."""

from __future__ import annotations

from collections.abc import Sequence

import click

GIVEN = "the {} is given by its path alone, without an option"
FASTEST = "leave it out, an engine takes its fastest kernels by itself"
UNQUANTISED = "there is no quantisation yet"
DIVIDED = "leave it out, a checkpoint is not divided; `porttool build --tp` divides an engine"

CALLED = {
    **dict.fromkeys(("-i", "--in-file"), GIVEN.format("source")),
    "--model-dir": GIVEN.format("checkpoint"),
    **dict.fromkeys(("--engine-dir", "--loadEngine"), GIVEN.format("engine")),
    **dict.fromkeys(("--out-dir", "--output-dir", "--saveEngine"), "--output"),
    **dict.fromkeys(("-t", "--storage-type", "--data-type"), "--dtype"),
    "--fp16": "--dtype float16",
    "-p": "--processes",
    **dict.fromkeys(("-g", "--tensor-parallelism"), DIVIDED),
    "--world-size": "--tp",
    **dict.fromkeys((
        "--use-gpt-attention-plugin", "--use-gemm-plugin", "--use-layernorm-plugin",
        "--use-lookup-plugin", "--use-rmsnorm-plugin", "--enable-context-fmha",
        "--enable-context-fmha-fp32-acc", "--remove-input-padding", "--parallel-build",
    ), FASTEST),
    **dict.fromkeys((
        "-s", "--smoothquant", "-k", "--calibrate-kv-cache", "--int8-kv-cache",
        "--use-smooth-quant", "--per-token", "--per-channel", "--use-weight-only",
    ), UNQUANTISED),
    "--multi-query-mode": "--n-kv-head 1",
    "--vocab-file": "leave it out, the tokenizer travels with the engine (--tokenizer for another)",
    "--hf-model-location": "--hf-model",
    "--test-trt-llm": "--test-engine",
    "--tensorrt-llm-rouge1-threshold": "--rouge1-threshold",
    "--dataset-path": "--dataset",
    "--max-ite": "--max-articles",
    "--max-new-tokens": "--max-output-len",
    **dict.fromkeys(("--log-level", "--verbose"), "leave it out"),
}  # fmt: skip
"""Option, with dashes between its words → what a user of it does here.

Of FasterTransformer's and TensorRT-LLM's converters, `build.py`, `run.py` and `summarize.py`, and
of trtexec. A short one may be the first letter of a longer: `-sq`, `-tp`.
"""


def with_dashes(word: str) -> str:
    """Return an option's name with dashes: the ancestors' have underscores, ours do not."""
    return word.replace("_", "-")


def explain(error: click.ClickException, arguments: Sequence[str]) -> click.ClickException:
    """Return the error, or for an unknown option that is an ancestor's one that says what to type.

    All of them in the command line are told at once.
    """
    if not isinstance(error, click.NoSuchOption):
        return error
    known = {o for p in error.ctx.command.params for o in p.opts} if error.ctx else set()
    found = [error.option_name, *(spelled(word) for word in arguments if word[:1] == "-")]
    told = {name: CALLED[name] for name in found if name in CALLED}
    lines = [
        f"\n  {name}: {f'here it is {here}' if here[0] == '-' else here}"
        for name, here in told.items()
        if here[0] != "-" or here.split()[0] in known
    ]
    if not lines:
        return error
    return click.UsageError(f"options of another tool:{''.join(lines)}", error.ctx)


def spelled(word: str) -> str:
    """Return an option's name as click would say it: without a value, a short one of one letter."""
    return with_dashes(word.partition("=")[0]) if word[:2] == "--" else word[:2]
