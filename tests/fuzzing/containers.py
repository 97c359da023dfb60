"""Every container that porttool reads: how a whole one is written, damaged, and read."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tiny
from fuzzing import formats, opinions
from fuzzing.files import damage_file, damage_json, mutated_file
from fuzzing.mutate import mutate_bytes, mutate_numbers, mutate_tree
from fuzzing.onnx_graph import mutate_graph
from fuzzing.opinions import Opinion
from fuzzing.specimens import (
    SHAPE,
    registry,
    write_bundle_folder,
    write_checkpoint,
    write_engine,
    write_fastertransformer,
    write_legacy,
    write_megatron,
    write_nemo,
    write_nemo_gz,
    write_npy,
    write_old_fastertransformer,
    write_onnx_engine,
    write_safetensors,
    write_sharded,
    write_table,
    write_token_csv,
    write_token_npy,
    write_torch_zip,
)
from porttool import api
from porttool.checkpoint import Checkpoint, seal_of
from porttool.config import Sampling
from porttool.engine import Engine
from porttool.folder import hash_file
from porttool.generate import generate
from porttool.memory import digest
from porttool.nn import Step
from porttool.prompt_table import PromptTable
from porttool.runner import load_runner, load_verified
from porttool.token_files import read_tokens

Values = dict[str, str]


@dataclass(frozen=True)
class Damage:
    """What was done to an input; `sealed` when its checksums were made right again afterwards."""

    text: str
    sealed: bool = False


@dataclass(frozen=True)
class Container:
    """One kind of input.

    write(folder) makes a whole one in an empty folder, always the same bytes; damage(rng, folder)
    changes it; read(folder, output) takes it through the front door and returns every value by
    name. `checked`: a checksum covers every byte that a value depends on. `opinion` compares what
    was read with what the format's own library reads.
    """

    name: str
    write: Callable[[Path], None]
    damage: Callable[[Random, Path], Damage]
    read: Callable[[Path, Path], Values]
    checked: bool = False
    opinion: Opinion | None = None


# ---- reading ----------------------------------------------------------------------------------


def convert(folder: Path, output: Path) -> Values:
    """Convert a source with whatever converter recognises it."""
    return checkpoint_values(api.convert(folder, output / "made", registry=registry()))


def convert_megatron(folder: Path, output: Path) -> Values:
    options = {"n_head": SHAPE["n_head"], "vocab_size": SHAPE["vocab_size"]}
    made = api.convert(folder, output / "made", options=options, registry=registry())
    return checkpoint_values(made)


def convert_archive(folder: Path, output: Path) -> Values:
    return convert(folder / "model.nemo", output)


def open_checkpoint(folder: Path, output: Path) -> Values:
    return checkpoint_values(Checkpoint.open(folder))


def checkpoint_values(checkpoint: Checkpoint) -> Values:
    """Every tensor, the config, the tokens and the tokenizer of a checkpoint."""
    manifest = checkpoint.manifest
    values = {n: digest(checkpoint.file_of(n).load(n)).hex() for n in checkpoint.names()}
    values |= {"config": manifest.config.model_dump_json(), "dtype": manifest.dtype,
               "tokens": manifest.tokens.model_dump_json()}  # fmt: skip
    return values | tokenizer_values(checkpoint.tokenizer)


def tokenizer_values(folder: Path) -> Values:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run_engine(folder: Path, output: Path) -> Values:
    """Open an engine, load it into the canonical decoder and run one step of it."""
    engine = Engine.open(folder, registry())
    runner = load_runner(engine, registry(), {"device": "cpu", "canonical": True})
    logits = tiny.full_logits(runner, [1, 5, 2])
    manifest = engine.manifest
    return {"logits": digest(logits).hex(), "limits": manifest.limits.model_dump_json(),
            "tokens": manifest.tokens.model_dump_json()}  # fmt: skip


def run_onnx_engine(folder: Path, output: Path) -> Values:
    """Open an engine, load it into ONNX Runtime, run a step, continue a prompt, trace a step."""
    runner = load_verified(folder, registry(), {"device": "cpu", "threads": 1})
    manifest = runner.engine.manifest
    logits = tiny.full_logits(runner, [1, 5, 2])
    chosen = generate(runner, [[1, 5, 2]], Sampling(max_new_tokens=3, ignore_eos=True), eos=())
    trace = runner.trace(Step.prefill([[1, 5, 2]]))
    return {"logits": digest(logits).hex(), "chosen": str(chosen[0][0].tokens),
            **{name: digest(value).hex() for name, value in trace.items() if name != "logits"},
            "limits": manifest.limits.model_dump_json(),
            "tokens": manifest.tokens.model_dump_json()}  # fmt: skip


def open_table(folder: Path, output: Path) -> Values:
    return table_values(PromptTable.open(folder))


def convert_table(folder: Path, output: Path) -> Values:
    table = api.convert_prompts(
        folder / "table.npy", output / "made", model="prompt_tuning", registry=registry()
    )
    assert table is not None
    return table_values(table)


def table_values(table: PromptTable) -> Values:
    return {"rows": digest(table.tensor()).hex(), "config": table.config.model_dump_json()}


def read_npy_tokens(folder: Path, output: Path) -> Values:
    return {"tokens": json.dumps(read_tokens(folder / "tokens.npy"))}


def read_csv_tokens(folder: Path, output: Path) -> Values:
    return {"tokens": json.dumps(read_tokens(folder / "tokens.csv"))}


# ---- damaging ---------------------------------------------------------------------------------


def damage_bundle(rng: Random, folder: Path) -> Damage:
    if rng.random() < 0.5:
        return Damage(formats.mutate_bundle(rng, folder / "model.ckpt.index"), sealed=True)
    if rng.random() < 0.2:
        return Damage(damage_json(rng, folder, "hparams.json", "encoder.json"), sealed=True)
    names = ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint")
    return Damage(damage_file(rng, folder, *names))


def damage_ini(rng: Random, folder: Path) -> Damage:
    if rng.random() < 0.6:
        return Damage(mutated_file(rng, folder / "config.ini", formats.mutate_ini))
    return Damage(damage_file(rng, folder, *sorted(f.name for f in folder.iterdir())))


def damage_packed(rng: Random, folder: Path) -> Damage:
    """Change a compressed archive, or one that is compressed afterwards, twice or with zeros."""
    file = folder / "model.nemo"
    if rng.random() < 0.5:
        return Damage(damage_file(rng, folder, file.name))
    tar, said = formats.mutate_tar(rng, gzip.decompress(file.read_bytes()))
    tar += rng.choice((b"", b"", b"", bytes(30_000_000)))
    parts = [tar] if rng.random() < 0.8 else [tar[:700], tar[700:]]
    file.write_bytes(b"".join(gzip.compress(p, compresslevel=1, mtime=0) for p in parts))
    return Damage(f"packed again: {said}", sealed=True)


def damaging(structured: Callable[[Random, bytes], tuple[bytes, str]], file: str) -> Any:
    """Change one file, half of the time by its structure."""

    def damage(rng: Random, folder: Path) -> Damage:
        if rng.random() < 0.6:
            return Damage(mutated_file(rng, folder / file, structured))
        return Damage(damage_file(rng, folder, file))

    return damage


def damage_configs(rng: Random, folder: Path) -> Damage:
    names = sorted(f.name for f in folder.glob("*.json"))
    if rng.random() < 0.8:
        return Damage(damage_json(rng, folder, *names))
    return Damage(damage_file(rng, folder, *names))


def damaging_own(manifest: str) -> Any:
    """Change a folder of ours: behind its manifest's back, or manifest and all."""

    def damage(rng: Random, folder: Path) -> Damage:
        file = folder / manifest
        names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        choice = rng.random()
        if choice < 0.4:
            return Damage(damage_file(rng, folder, *names))
        values = json.loads(file.read_text())
        if choice < 0.55:
            weights = rng.choice([n for n in names if n.endswith(".safetensors")])
            said = mutated_file(rng, folder / weights, formats.mutate_safetensors)
            values["files"][weights] = hash_file(folder / weights).model_dump()
        else:
            values, said = rng.choice((mutate_numbers, mutate_tree))(rng, values)
        if choice < 0.45 or 0.55 <= choice < 0.65:
            file.write_text(json.dumps(values))
            return Damage(f"unsealed: {said}")
        write_sealed(file, values)
        return Damage(f"sealed: {said}", sealed=True)

    return damage


def damage_onnx_engine(rng: Random, folder: Path) -> Damage:
    """Change the folder like any other of ours, or graph or weights and the manifest to fit."""
    if rng.random() < 0.4:
        return damaging_own("engine.json")(rng, folder)
    change = rng.choice((mutate_graph, mutate_graph, mutate_bytes, formats.mutate_values))
    name = f"rank0/model.{'safetensors' if change is formats.mutate_values else 'onnx'}"
    said = mutated_file(rng, folder / name, change)
    values = json.loads((folder / "engine.json").read_text())
    values["files"][name] = hash_file(folder / name).model_dump()
    write_sealed(folder / "engine.json", values)
    return Damage(f"sealed: {said}", sealed=True)


def write_sealed(file: Path, values: Any) -> None:
    """Write a manifest as someone would who knows how it is sealed."""
    rest = {k: v for k, v in values.items() if k != "seal"}
    text = json.dumps({"seal": "", **rest})
    seal = seal_of(text.encode())
    file.write_text(text.replace('"seal": ""', f'"seal": "{seal}"', 1))


CONTAINERS = {
    c.name: c
    for c in (
        Container("safetensors", write_safetensors,
                  damaging(formats.mutate_safetensors, "model.safetensors"), convert,
                  opinion=opinions.of_safetensors),
        Container("configs", write_sharded, damage_configs, convert),
        Container("torch_zip", write_torch_zip,
                  damaging(formats.mutate_zip, "pytorch_model.bin"), convert,
                  opinion=opinions.of_torch),
        Container("torch_legacy", write_legacy,
                  damaging(formats.mutate_legacy, "pytorch_model.bin"), convert,
                  opinion=opinions.of_torch),
        Container("megatron", write_megatron,
                  damaging(formats.mutate_zip, "mp_rank_00/model_optim_rng.pt"), convert_megatron),
        Container("nemo_tar", write_nemo, damaging(formats.mutate_tar, "model.nemo"),
                  convert_archive, opinion=opinions.of_tar),
        Container("nemo_tar_gz", write_nemo_gz, damage_packed, convert_archive,
                  checked=True, opinion=opinions.of_tar),
        Container("tf_bundle", write_bundle_folder, damage_bundle, convert, checked=True),
        Container("fastertransformer", write_fastertransformer, damage_ini, convert),
        Container("fastertransformer_old", write_old_fastertransformer, damage_ini, convert),
        Container("npy_table", write_npy, damaging(formats.mutate_npy, "table.npy"), convert_table,
                  opinion=opinions.of_npy("table.npy")),
        Container("npy_tokens", write_token_npy, damaging(formats.mutate_npy, "tokens.npy"),
                  read_npy_tokens, opinion=opinions.of_npy("tokens.npy")),
        Container("csv_tokens", write_token_csv, damaging(mutate_bytes, "tokens.csv"),
                  read_csv_tokens),
        Container("checkpoint", write_checkpoint, damaging_own("checkpoint.json"),
                  open_checkpoint, checked=True),
        Container("engine", write_engine, damaging_own("engine.json"), run_engine, checked=True),
        Container("onnx_engine", write_onnx_engine, damage_onnx_engine, run_onnx_engine,
                  checked=True),
        Container("prompt_table", write_table, damaging_own("prompt_table.json"), open_table,
                  checked=True),
    )
}  # fmt: skip
