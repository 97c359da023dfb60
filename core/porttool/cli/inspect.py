"""porttool inspect: what a folder is."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click

from porttool.cli import console
from porttool.cli.options import json_option
from porttool.progress import format_bytes


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, an engine, or a source and who can read it.

    A gzipped archive of a model is unpacked for it, into the system's temporary folder ($TMPDIR).
    """
    found = examine(path)
    if as_json:
        console.say_json(found)
        return
    rows = [(key, value if isinstance(value, str) else json.dumps(value))
            for key, value in found.items()]  # fmt: skip
    console.table(str(path), ("what", "value"), rows)


def examine(path: Path) -> dict[str, Any]:
    """Return the facts of a folder, verified where it is ours."""
    from porttool.checkpoint import Checkpoint, kind_of
    from porttool.engine import Engine
    from porttool.prompt_table import PromptTable

    kind = kind_of(path)
    if kind is None:
        return examine_source(path)
    openers: dict[str, type[Checkpoint | Engine | PromptTable]] = {
        "a checkpoint": Checkpoint, "an engine": Engine, "a prompt table": PromptTable,
    }  # fmt: skip
    manifest = openers[kind].open(path).manifest.model_dump(mode="json")
    return facts(kind.split(" ", 1)[1], manifest)


def facts(kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Shorten a manifest to what a person reads."""
    files = manifest.pop("files")
    manifest.pop("tensors", None)
    size = sum(record["bytes"] for record in files.values())
    verified = f"{len(files)} files, {format_bytes(size)}, every SHA-256 as recorded"
    return {"is": f"porttool {kind}", "verified": verified, **manifest}


def examine_source(path: Path) -> dict[str, Any]:
    """Say which family reads a source, and its config and tensors.

    What has to be unpacked for that is unpacked into the system's temporary folder.
    """
    from porttool.errors import naming
    from porttool.plugins import choose_converter, load_registry
    from porttool.prompt_table import choose_table_converter

    registry = load_registry()
    if table := choose_table_converter(registry, path, None):
        tasks = {task: list(rows.shape) for task, rows in table.open(path).items()}
        return {"is": f"source of {table.name}: {table.source_format}", "tasks": tasks}
    converter = choose_converter(registry, path)
    progress = console.ConsoleProgress()
    with naming(path), converter.prepare(path, Path(gettempdir()), progress) as readable:
        source = converter.open(readable)
        infos = source.tensors.infos()
        return {
            "is": f"source of {converter.name}: {converter.source_format}",
            "tensors": len(infos),
            "bytes": sum(i.nbytes for i in infos.values()),
            "types": sorted({i.dtype for i in infos.values()}),
            "config": source.config.model_dump(mode="json"),
            "tokens": source.tokens.model_dump(mode="json"),
            "tokenizer": [*(f.name for f in source.tokenizer), *source.tokenizer_data],
        }
