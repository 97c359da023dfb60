"""Megatron-LM's training checkpoints, of one rank or many.

A checkpoint is a folder of rank folders, each with one pickled file: a tree whose `model` holds
the weights and whose `args`, in all but the oldest, are the training's arguments.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.errors import SourceError
from porttool.sources.megatron_names import join_ranks
from porttool.sources.ranks import RANK, STACKED, find_ranks, require_ranks
from porttool.sources.torch_file import (
    TensorTree,
    check_zip,
    is_zip,
    load_tree,
    only_tensors,
    unpickling,
)

if TYPE_CHECKING:
    from porttool.weights import TensorSource

TRACKER = "latest_checkpointed_iteration.txt"
FILES = ("model_optim_rng.pt", "model_rng.pt")
MAX_DEPTH = 30

INERT = re.compile(r"_extra_state$|\.rotary_pos_emb\.inv_freq$")
"""Entries of a model's state that hold no weights."""


class Placeholder:
    """Stands for a class of Megatron's own, such as an enum among the arguments. Does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args


@dataclass(frozen=True)
class MegatronCheckpoint:
    """An indexed checkpoint, its tensors whole and under canonical names, its rows as stored.

    `args` is None and `version` 0 where the file says nothing; `file` is the first rank's.
    """

    file: Path
    args: Mapping[str, Any] | None
    version: float
    tensors: TensorSource


def open_megatron(source: Path) -> MegatronCheckpoint:
    """Open a checkpoint folder, the folder of one iteration or one file."""
    files = find_files(source)
    trees = {place: read_rank(file) for place, file in files.items()}
    first, file = trees[0, 0], files[0, 0]
    args = vars(first["args"]) if isinstance(first.get("args"), argparse.Namespace) else None
    version = float(first.get("checkpoint_version", 0))
    if args is not None:
        tp, pp = (max(place) + 1 for place in zip(*files, strict=True))
        tp = args.get("tensor_model_parallel_size", args.get("model_parallel_size", tp))
        pp = args.get("pipeline_model_parallel_size", pp)
        require_ranks({place: f.parent.name for place, f in files.items()}, tp, pp, str(source))
    parts = {place: rank_tensors(tree, files[place]) for place, tree in trees.items()}
    blocks = 3 if version < 1 else 1
    return MegatronCheckpoint(
        file, args, version, join_ranks(parts, up_blocks=1, qkv_blocks=blocks)
    )


def is_megatron(source: Path) -> bool:
    """Recognise a checkpoint by its files' names, even one with ranks missing."""
    if source.is_file():
        return source.suffix == ".pt"
    if (source / TRACKER).is_file():
        return True
    folders = [source, *source.iterdir()] if source.is_dir() else []
    return any(RANK.match(f.name) and (f / name).is_file() for f in folders for name in FILES)


def find_files(source: Path) -> dict[tuple[int, int], Path]:
    """Return every rank's file by (tensor-parallel rank, pipeline stage)."""
    if source.is_file():
        return {(0, 0): source}
    folder = source / latest(source / TRACKER) if (source / TRACKER).is_file() else source
    if RANK.match(folder.name):
        return {(0, 0): weight_file(folder)}
    names = [f.name for f in folder.iterdir() if f.is_dir()] if folder.is_dir() else []
    grid = find_ranks(names, str(folder))
    stacked = [name for name in STACKED if (folder / name).is_file()]
    if stacked:
        raise SourceError(
            f"{folder / stacked[0]}: of a distributed checkpoint, whose layers are stacked in one "
            "tensor; porttool does not read these: let Megatron-LM write it again with "
            "--ckpt-convert-format torch"
        )
    if not grid:
        raise SourceError(f"{folder}: there are no rank folders (mp_rank_00, …) here")
    return {place: weight_file(folder / name) for place, name in grid.items()}


def latest(tracker: Path) -> str:
    """Return the folder that the tracker file names."""
    with tracker.open("rb") as file:
        text = file.read(64).decode(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise SourceError(f"{tracker}: names no iteration: {text!r}")
    return text if text == "release" else f"iter_{int(text):07}"


def weight_file(folder: Path) -> Path:
    """Return the file of a rank folder."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(f"{folder}: there is neither of {' and '.join(FILES)} here")


def read_rank(file: Path) -> dict[str, Any]:
    """Unpickle one rank's tree."""
    tree = load_tree(file, safe=harmless(file))
    if isinstance(tree, dict) and "model0" in tree:
        raise SourceError(
            f"{file}: the layers are interleaved over virtual pipeline stages, which porttool "
            "cannot read; save it again without --num-layers-per-virtual-pipeline-stage"
        )
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise SourceError(f"{file}: there is no 'model' in it; not a Megatron-LM checkpoint")
    return tree


def harmless(file: Path) -> list[Any]:
    """Return what may be unpickled beside tensors: arguments, random states, and stand-ins."""
    import numpy as np
    import torch

    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    safe: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, type(np.dtype("u4"))]
    safe += [
        (getattr(multiarray, function), f"numpy.{core}.multiarray.{function}")
        for function in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    if is_zip(file, str(file)):
        check_zip(file)
        with unpickling(str(file)):
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        safe += [
            (type("Placeholder", (Placeholder,), {}), name)
            for name in wanted
            if name.startswith("megatron.")
        ]
    return safe


def rank_tensors(tree: dict[str, Any], file: Path) -> TensorSource:
    """Return the weights of one rank under dotted names."""
    flat = {k.replace("word_embeddings_for_head.", "word_embeddings."): v
            for k, v in flatten(tree["model"]) if not INERT.search(k)}  # fmt: skip
    return TensorTree(only_tensors(flat, file), str(file), mapped=True)


def flatten(tree: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries under dotted names."""
    if depth > MAX_DEPTH:
        raise SourceError(f"{prefix:.100}: dictionaries nested more than {MAX_DEPTH} deep")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.", depth + 1)
        elif value is not None:
            yield f"{prefix}{key}", value
