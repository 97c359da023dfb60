"""Readers of prompt tables. Each returns tables as they are used: the encoder's output, not it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from porttool import SourceConfig
from porttool.reading import (
    CONFIG,
    WEIGHTS,
    Archive,
    Options,
    SourceError,
    TableConverter,
    flatten,
    listing,
    load_bytes,
    only_tensors,
    open_weight_file,
    read_json,
    read_nemo_config,
    read_npy,
    tunes_prompts,
)

if TYPE_CHECKING:
    from torch import Tensor

MAX_WEIGHTS = 1 << 31
"""Bytes of a prompt archive's weights: some thousand tokens of some ten thousand numbers."""

TABLE = re.compile(r"^(?:prompt_table\.)+(?P<task>.+)\.prompt_embeddings\.weight$")
ADAPTER = "*adapter_layer.ptuning_adapter.inference_table"
UNUSED = (
    "*prompt_table.*.indices", "*embeddings.weight", "*tpmlp.*", "*mlp_head.*", "*lstm_head.*",
    "*prompt_encoder.*", "*ptuning_adapter.*",
)  # fmt: skip
"""Which rows a table has, and the encoder that it was made by."""


class NemoConverter(TableConverter):
    """A `.nemo` of NeMo's prompt learning, of any version, or the folder it was unpacked to."""

    name = "prompt_tuning/nemo"
    family = "prompt_tuning"
    source_format = "NeMo prompt-learning archive"

    def matches(self, source: Path) -> bool:
        """Tell it from a model's archive by its YAML."""
        try:
            return tunes_prompts(read_nemo_config(source))
        except SourceError:
            return False

    def open(self, source: Path) -> Mapping[str, Tensor]:
        """Read the tasks of the YAML that have a table, in its order."""
        config = read_nemo_config(source)
        if not tunes_prompts(config):
            raise SourceError(f"{source}: {CONFIG} has no virtual_prompt_style; this is a model")
        if "virtual_prompt_style" in config:
            lengths = template_lengths(config.get("task_templates"), source)
        else:  # one table for all that the model was tuned to, and no name of it
            section = config["peft"].get("p_tuning")
            known = isinstance(section, dict)
            lengths = {"prompt": section.get("virtual_tokens") if known else None}
        found = read_tables(source, next(iter(lengths), "prompt"))
        if unknown := found.keys() - lengths.keys():
            raise SourceError(
                f"{source}: {CONFIG} has no task_templates for {listing(sorted(unknown))}, of "
                "which there are tables; the two are of different trainings"
            )
        for task, table in found.items():
            if (wanted := lengths[task]) not in (None, len(table)):
                raise SourceError(
                    f"{source}: {CONFIG} says {wanted} virtual tokens for {task!r}, its table has "
                    f"{len(table)}"
                )
        return {task: found[task] for task in lengths if task in found}


def template_lengths(templates: Any, source: Path) -> dict[str, int | None]:
    """Return the tasks of the YAML and how many virtual tokens each is to have."""
    if not isinstance(templates, list) or not all(isinstance(t, dict) for t in templates):
        raise SourceError(f"{source}: task_templates in {CONFIG} should be a list of mappings")
    return {str(t.get("taskname")): t.get("total_virtual_tokens") for t in templates}


def read_tables(source: Path, adapter_task: str) -> dict[str, Tensor]:
    """Read the first rank's weights: every rank of the first stage has the same tables."""
    archive = None if source.is_dir() else Archive(source)
    names = archive.names() if archive else [f.relative_to(source).as_posix()
                                             for f in source.rglob(WEIGHTS)]  # fmt: skip
    weights = sorted(name for name in names if PurePosixPath(name).name == WEIGHTS)
    if not weights:
        raise SourceError(f"{source}: there is no {WEIGHTS} in it")
    name = weights[0]
    data = archive.read(name, MAX_WEIGHTS) if archive else (source / name).read_bytes()
    tree = load_bytes(data, f"{source}: {name}")
    if not isinstance(tree, dict):
        raise SourceError(f"{source}: {name} holds {type(tree).__name__}, not a dictionary")
    tensors = only_tensors(dict(flatten(tree)), source / name)
    found = [(m["task"], n) for n in tensors if (m := TABLE.match(n))]
    found += [(adapter_task, n) for n in tensors if fnmatchcase(n, ADAPTER)]
    tables = {task: tensors[n] for task, n in found}
    if len(tables) < len(found):
        raise SourceError(
            f"{source}: {name} has two tables for one task: {listing([n for _, n in found])}"
        )
    rest = [n for n in tensors if not any(fnmatchcase(n, p) for p in UNUSED) and not TABLE.match(n)]
    if rest or not tables:
        raise SourceError(
            f"{source}: {name} holds {'no prompt table' if not tables else listing(sorted(rest))}; "
            "only archives of trained virtual prompts can be read"
        )
    return tables


class PeftConverter(TableConverter):
    """A PEFT adapter folder: adapter_config.json and adapter_model.safetensors or .bin."""

    name = "prompt_tuning/peft"
    family = "prompt_tuning"
    source_format = "PEFT adapter folder"

    def matches(self, source: Path) -> bool:
        """Return true for a folder with an adapter's config."""
        try:
            return "peft_type" in read_json(source / "adapter_config.json")
        except SourceError:
            return False

    def open(self, source: Path) -> Mapping[str, Tensor]:
        """Read the one table, which PEFT stores as the encoder's output."""
        config = SourceConfig(
            read_json(source / "adapter_config.json"), source / "adapter_config.json"
        )
        kind = config.take("peft_type")
        if kind not in ("PROMPT_TUNING", "P_TUNING"):
            raise SourceError(
                f"{config.file}: porttool reads PROMPT_TUNING and P_TUNING, tokens before the "
                f"prompt; {kind!r:.80} is another kind of adapter. One that changes weights, as "
                "LORA does, is first merged into its model: PEFT's merge_and_unload(), then "
                "save_pretrained(), and convert that folder"
            )
        if config.take("task_type", "CAUSAL_LM") != "CAUSAL_LM":
            raise SourceError(f"{config.file}: was tuned for {config.take('task_type')!r}")
        if config.integer("num_transformer_submodules", 1) != 1:
            raise SourceError(f"{config.file}: has tables for two models, an encoder and a decoder")
        shape = (config.integer("num_virtual_tokens"), config.integer("token_dim"))
        safe = source / "adapter_model.safetensors"
        weights = open_weight_file(safe if safe.is_file() else source / "adapter_model.bin")
        found = {name: info.shape for name, info in weights.infos().items()}
        if found != {"prompt_embeddings": shape}:
            raise SourceError(
                f"{config.file}: says {list(shape)} virtual tokens, the weights hold "
                f"{ {n: list(s) for n, s in found.items()} }"
            )
        return {task_of(source.resolve()): weights.load("prompt_embeddings")}


def task_of(folder: Path) -> str:
    """Return the folder's name; one in the hub's cache is a commit's, so the repository's name."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


class ArrayOptions(Options):
    """Names for the tasks of an array; their numbers where none are given."""

    tasks: tuple[str, ...] | None = None


class ArrayConverter(TableConverter):
    """An array of the early TensorRT-LLM: [tasks, longest, width], shorter tasks padded with 0."""

    name = "prompt_tuning/npy"
    family = "prompt_tuning"
    source_format = ".npy table"
    Options = ArrayOptions
    options: ArrayOptions

    def matches(self, source: Path) -> bool:
        """Go by the suffix."""
        return source.suffix == ".npy" and source.is_file()

    def open(self, source: Path) -> Mapping[str, Tensor]:
        """Read the array without unpickling; rows of zeros at a task's end are its padding."""
        import torch

        array = read_npy(source)
        if array.ndim not in (2, 3) or array.dtype.kind != "f":
            raise SourceError(
                f"{source}: should be numbers [tasks, virtual tokens, width], it is {array.dtype} "
                f"{list(array.shape)}"
            )
        stacked = torch.from_numpy(array.reshape(-1, *array.shape[-2:]))
        names = self.options.tasks or tuple(map(str, range(len(stacked))))
        if len(names) != len(stacked) or len(set(names)) != len(names):
            raise SourceError(f"{source}: {len(stacked)} tasks, but the names {list(names)}")
        return {name: unpadded(table) for name, table in zip(names, stacked, strict=True)}


def unpadded(table: Tensor) -> Tensor:
    """Return a table without the rows of zeros at its end; one of zeros alone is left whole."""
    used = table.any(1).nonzero()
    return table[: int(used[-1]) + 1] if len(used) else table
