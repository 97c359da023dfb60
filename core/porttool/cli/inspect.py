"""porttool inspect: what a folder is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.options import (
    UNTOLD,
    Place,
    flags_in,
    json_option,
    options_of,
    set_option,
    spelling,
    table_options,
)
from porttool.errors import UntoldError, UsageError, naming
from porttool.progress import format_bytes

if TYPE_CHECKING:
    from porttool.engine import EngineManifest
    from porttool.weights import TensorSource


@click.command("inspect")
@click.argument("path", type=Place(exists=True))
@table_options(UNTOLD)
@set_option
@json_option
@click.pass_context
@spelling(flags_in(UNTOLD))
def command(context: click.Context, /, path: Path, as_json: bool, **_: Any) -> None:
    """Say what PATH is: a checkpoint, an engine or a source.

    A gzipped archive of a model is unpacked for it, into the system's temporary folder ($TMPDIR).
    """
    found = examine(path, options_of(UNTOLD, context.params, context.params["settings"]))
    if as_json:
        console.say_json(found)
        return
    rows = [(key, value if isinstance(value, str) else json.dumps(value))
            for key, value in found.items()]  # fmt: skip
    console.table(str(path), ("what", "value"), rows)


def examine(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a folder, verified where it is ours; `options` are for a converter."""
    from porttool.checkpoint import Checkpoint
    from porttool.engine import Engine, EngineManifest
    from porttool.prompt_table import PromptTable
    from porttool.standing import kind_of

    kind = kind_of(path)
    if kind is None:
        return examine_source(path, options)
    if options:
        raise UsageError(f"{path} is {kind}: {', '.join(options)} would change nothing")
    openers: dict[str, type[Checkpoint | Engine | PromptTable]] = {
        "a checkpoint": Checkpoint, "an engine": Engine, "a prompt table": PromptTable,
    }  # fmt: skip
    made = openers[kind].open(path).manifest
    found = facts(kind.split(" ", 1)[1], made.model_dump(mode="json"))
    return {**found, "memory": memory_of(made)} if isinstance(made, EngineManifest) else found


def memory_of(engine: EngineManifest) -> str:
    """Say how much memory an engine's weights and cache take, on each rank."""
    from porttool.config import ITEMSIZE
    from porttool.sharding import rank_config

    n_ranks, limits = engine.world_size, engine.limits
    weights = sum(f.bytes for name, f in engine.files.items() if name.startswith("rank"))
    config = rank_config(engine.config, n_ranks)
    token = 2 * config.n_layer * config.n_kv_head * config.head_dim
    cache = limits.max_batch_size * limits.max_len * token * ITEMSIZE[engine.dtype]
    return (
        f"{format_bytes(weights // n_ranks)} of weights and {format_bytes(cache)} of cache "
        f"({limits.max_batch_size} rows of {limits.max_len} tokens)"
        + " on each rank" * (n_ranks > 1) + ", and what a step needs"
    )  # fmt: skip


def facts(kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Shorten a manifest to what a person reads."""
    files = manifest.pop("files")
    manifest.pop("tensors", None)
    size = sum(record["bytes"] for record in files.values())
    verified = f"{len(files)} files, {format_bytes(size)}, every SHA-256 as recorded"
    return {"is": f"porttool {kind}", "verified": verified, **manifest}


def examine_source(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Say which family reads a source, and its config and tensors, or what is missing for that.

    What has to be unpacked for that is unpacked into the system's temporary folder.
    """
    from porttool.plugins import choose_converter, load_registry
    from porttool.prompt_table import choose_table_converter, read_tables

    registry, progress = load_registry(), console.ConsoleProgress()
    if table := choose_table_converter(registry, path, None, options):
        found = read_tables(table, path, progress)
        tasks = {task: list(rows.shape) for task, rows in found.items()}
        return {"is": f"source of {table.name}: {table.source_format}", "tasks": tasks}
    converter = choose_converter(registry, path, None, options)
    what = {"is": f"source of {converter.name}: {converter.source_format}"}
    with naming(path), converter.prepare(path, Path(gettempdir()), progress) as readable:
        try:
            source = converter.open(readable)
        except UntoldError as error:
            known = {"config": dict(error.known), "missing": str(error)}
            return {**what, **tensor_facts(error.tensors), **known}
        return {
            **what,
            **tensor_facts(source.tensors),
            "config": source.config.model_dump(mode="json"),
            "tokens": source.tokens.model_dump(mode="json"),
            "tokenizer": [*(f.name for f in source.tokenizer), *source.tokenizer_data],
        }


def tensor_facts(tensors: TensorSource) -> dict[str, Any]:
    """Return how many tensors a source has, their size and their types."""
    infos = tensors.infos()
    return {
        "tensors": len(infos),
        "bytes": sum(i.nbytes for i in infos.values()),
        "types": sorted({i.dtype for i in infos.values()}),
    }
