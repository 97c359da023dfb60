"""Tiles that were measured when an engine was loaded, kept in the user's cache folder.

One sealed JSON file for each GPU, shape, type and set of batch sizes. Nothing depends on it: a
file that cannot be read or written costs the time to measure again, and is said.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from porttool.builder import BuildRequest
from porttool.checkpoint import Manifest, read_manifest
from porttool.config import Closed, Dtype, ModelConfig
from porttool.engines.torch.cuda_balanced import BLOCK, COPIED, group
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import Tuning
from porttool.errors import CheckpointError
from porttool.folder import cache_folder

KERNELS = 9
"""To be raised when the kernels change so that other tiles are the fastest."""

Say = Callable[[str], None]


class TileKey(Closed):
    """What measured tiles hold for. Two models of one shape share them.

    Programs that wait for each other are as many as the GPU has multiprocessors.
    """

    gpu: str
    multiprocessors: int
    dtype: Dtype
    config: ModelConfig
    batch_sizes: tuple[int, ...]
    context: int
    triton: str
    kernels: int

    @classmethod
    def of(
        cls,
        request: BuildRequest,
        *,
        gpu: str,
        multiprocessors: int,
        batch_sizes: tuple[int, ...],
        triton: str,
    ) -> TileKey:
        """Return the key of a model's steps; what is only a number to the kernels is left out."""
        numbers = {"n_positions": 1, "norm_eps": 1.0, "rotary_base": 1.0, "attention_scale": 1.0}
        return cls(
            gpu=gpu,
            multiprocessors=multiprocessors,
            dtype=request.dtype,
            config=request.config.model_copy(update=numbers),
            batch_sizes=batch_sizes,
            context=request.limits.max_input_len,
            triton=triton,
            kernels=KERNELS,
        )

    @property
    def file_name(self) -> str:
        """Return the name of the file with these tiles."""
        return f"tiles-{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]}.json"


class TileFile(Manifest):
    """The file: what the tiles hold for, and the tiles as `Tuning.as_dict` gives them."""

    format: Literal["porttool-tiles"] = "porttool-tiles"
    key: TileKey
    tuning: dict[str, Any]


def read_tuning(data: Mapping[str, Any], config: ModelConfig) -> Tuning | None:
    """Return what `Tuning.as_dict` gave; None if it is not for these kernels or this model."""
    try:
        tuning = Tuning.from_dict(data)
    except ValidationError:
        return None
    tiles = [tile for tile in tuning.wide_attention.values() if tile.balanced]
    if group(config) > 1 and any(tile.block_t == COPIED for tile in tiles):
        return None  # when slots had one size, this stood for a copy's
    if group(config) == 1 and any(tile.block_t < tile.warps * BLOCK for tile in tiles):
        return None  # warps would have nothing to do: they took other positions once
    return tuning if outline(tuning) == outline(default_tuning(config, "cpu")) else None


def outline(tuning: Tuning) -> list[object]:
    """Return the names of the matrices and the row counts that a tuning has tiles for."""
    wide = {rows: sorted(tiles) for rows, tiles in tuning.wide.items()}
    return [sorted(tuning.stream), wide, sorted(tuning.wide_attention)]


def read_tiles(key: TileKey, say: Say) -> Tuning | None:
    """Return tiles that were kept earlier; None where there are none, or none that are whole."""
    try:
        file = cache_folder() / key.file_name
        if not file.exists():
            return None
        found = read_manifest(file.parent, file.name, TileFile)
    except (CheckpointError, OSError, RuntimeError) as error:
        say(f"tiles that were measured before cannot be read: {error}")
        return None
    tuning = read_tuning(found.tuning, key.config)
    if found.key != key or tuning is None:
        say(f"{file}: is of another GPU, model or version; it is measured again")
        return None
    return tuning


def keep_tiles(key: TileKey, tuning: Tuning, say: Say) -> None:
    """Keep tiles for the next time, in a file that appears whole or not at all."""
    text = TileFile(key=key, tuning=tuning.as_dict()).sealed()
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            written = Path(made) / key.file_name
            written.write_text(text, encoding="utf-8")
            written.replace(folder / key.file_name)
    except (OSError, RuntimeError) as error:
        say(f"the measured tiles could not be kept for the next time: {error}")
    else:
        say(f"the measured tiles are kept in {folder / key.file_name}")
