"""Reading a folder of raw arrays: every file there, of the right size, and no other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.config import ITEMSIZE, Dtype, ModelConfig
from porttool.converter import Source
from porttool.errors import SourceError
from porttool.fastertransformer.config_file import CONFIG, read_folder_config
from porttool.fastertransformer.layout import BinFile, Region, bin_files, check_parallel
from porttool.sources.safetensors_file import read_exactly
from porttool.sources.tokenizer_files import tokenizer_paths
from porttool.weights import TensorInfo, TensorSource, listing

if TYPE_CHECKING:
    from torch import Tensor

UNFUSED = "unfusedQKV-"
"""How a folder is called whose arrays have the same sizes in another order."""

SCALES = ("*.scale_*", "*.int8.*")
"""SmoothQuant's and the int8 cache's files, which lie beside the weights in full."""


def find_folder(source: Path) -> Path:
    """Return the folder with config.ini: the source itself or its one `<n>-gpu` folder."""
    if (source / CONFIG).is_file():
        return source
    found = sorted(f.parent for f in source.glob(f"*-gpu/{CONFIG}"))
    if not found:
        raise SourceError(
            f"{source}: there is no {CONFIG} here, and none in a folder like 1-gpu; "
            "FasterTransformer 4 wrote none: write a section [gpt] with n_layer, n_head, n_embd, "
            "n_positions, vocab_size and storage_dtype"
        )
    if len(found) > 1:
        raise SourceError(
            f"{source}: holds {listing([f.name for f in found])}; give the path of one of them"
        )
    return found[0]


def open_folder(source: Path) -> Source:
    """Read config.ini and check that every file is there, whole, and that there are no others."""
    from porttool.nn import canonical_shapes

    folder = find_folder(source)
    if folder.resolve().name.startswith(UNFUSED):  # also of `.`
        raise SourceError(
            f"{folder}: has queries, keys and values apart, by its name, as FasterTransformer "
            "converts with -fused_qkv 0; convert again with -fused_qkv 1"
        )
    has_head = (folder / "model.lm_head.weight.bin").is_file()
    read = read_folder_config(folder / CONFIG, has_head=has_head)
    tp = count_ranks(folder, read.tensor_parallel)
    check_parallel(read.config, tp)
    names = canonical_shapes(read.config)
    return Source(
        config=read.config,
        tokens=read.tokens,
        tensors=BinFolder(folder, read.config, read.dtype, tp, names),
        tokenizer=tokenizer_paths(folder),
    )


def count_ranks(folder: Path, declared: int | None) -> int:
    """Return the number of ranks; the folder's name, config.ini and the files must agree."""
    stem = "model.layers.0.attention.query_key_value.weight."
    counts = {f"its {stem}*.bin files": len(list(folder.glob(f"{stem}[0-9]*.bin")))}
    if match := re.fullmatch(r"(\d+)-gpu", folder.resolve().name):
        counts["its name"] = int(match[1])
    if declared:
        counts[CONFIG] = declared
    if len(set(counts.values())) != 1 or 0 in counts.values():
        said = ", ".join(f"{n} ranks by {where}" for where, n in counts.items())
        raise SourceError(f"{folder}: {said}; files are missing, or of another conversion")
    return counts.popitem()[1]


class BinFolder(TensorSource):
    """A folder's arrays, whole and under canonical names."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: Dtype,
        tp: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._tp = tp
        self._width = ITEMSIZE[dtype]
        self._files = {name: bin_files(name, config) for name in shapes}
        self._infos = {
            name: TensorInfo(shape, dtype, math.prod(shape) * self._width, files[0].name(0))
            for (name, shape), files in zip(shapes.items(), self._files.values(), strict=True)
        }
        self._check_files([f for files in self._files.values() for f in files])

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor as it will be when joined."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Join one tensor, holding no more of it than the result and one rank's part."""
        import torch

        first, *others = self._files[name]
        if not others and first.parts(self._tp) == 1:
            return self._read(first, 0)
        result = torch.empty(self._infos[name].shape, dtype=getattr(torch, self._dtype))
        for file in self._files[name]:
            for rank in range(file.parts(self._tp)):
                local = self._read(file, rank)
                for region in file.regions(rank, self._tp):
                    self._place(result, local, file, rank, region)
        return result

    def _place(
        self, result: Tensor, local: Tensor, file: BinFile, rank: int, region: Region
    ) -> None:
        target = result[region.canonical]
        if file.columns is not None:
            target = target[:, file.span(rank, self._tp)]
        part = local[region.local]
        if region.shared and rank and not target.equal(part):
            raise SourceError(
                f"{self._folder / file.name(rank)}: its keys and values are not those of rank 0; "
                "the files are of different conversions"
            )
        target.copy_(part)

    def _read(self, file: BinFile, rank: int) -> Tensor:
        import torch

        shape = file.shape(self._tp)
        buffer = torch.empty(math.prod(shape) * self._width, dtype=torch.uint8)
        read_exactly(self._folder / file.name(rank), buffer, 0)
        tensor = buffer.view(getattr(torch, self._dtype))
        return tensor.view(*reversed(shape)).t() if file.transposed else tensor.view(shape)

    def _check_files(self, files: Sequence[BinFile]) -> None:
        expected = {f.name(rank): f for f in files for rank in range(f.parts(self._tp))}
        for name, file in expected.items():
            path = self._folder / name
            if not path.is_file():
                raise SourceError(f"{path}: the file is missing; convert again, or copy it here")
            nbytes = math.prod(file.shape(self._tp)) * self._width
            if path.stat().st_size != nbytes:
                raise SourceError(
                    f"{path}: has {path.stat().st_size} bytes, but {list(file.shape(self._tp))} "
                    f"in {self._dtype} needs {nbytes}; {CONFIG} is of another model, or the file "
                    "is truncated"
                )
        found = {f.name for f in self._folder.glob("model.*.bin")} - expected.keys()
        extra = sorted(n for n in found if not any(fnmatchcase(n, s) for s in SCALES))
        if extra:
            raise SourceError(
                f"{self._folder}: files that {CONFIG} does not account for: {listing(extra)}; "
                "they are of another conversion, or the config is"
            )
