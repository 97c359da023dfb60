"""Engines without a checkpoint: a shape from a family, a config or knobs, and random weights.

For measuring speed and memory. The weights are drawn tensor by tensor into a checkpoint beside the
engine, which any builder reads like every other, and which is gone when the engine is built.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt, ValidationError

from porttool.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointManifest,
    PluginRecord,
    SourceRecord,
)
from porttool.component import explain
from porttool.config import Activation, Closed, Dtype, ModelConfig, SpecialTokens
from porttool.engine import MANIFEST as ENGINE
from porttool.errors import PorttoolError, UsageError
from porttool.folder import pending_folder
from porttool.gpt2_layout import ACTIVATIONS, GATED
from porttool.hookspecs import API_VERSION
from porttool.plugins import Registry, choose_converter, load_registry, named_converters
from porttool.progress import SILENT, Progress
from porttool.shards import TensorJob, plan_shards, work_key, write_shards
from porttool.sources.json_file import read_json
from porttool.standing import require_free, require_space
from porttool.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

DUMMY = "dummy"
PLAIN: dict[str, Activation] = {**ACTIVATIONS, "gelu_tanh": "gelu_tanh", "squared-relu": "relu2"}


class Knobs(Closed):
    """What of a shape is asked for; None leaves the base's, or what follows from the others.

    `bias` is of the linear maps; norms keep theirs. `rotary_pct` 0 means learned positions.
    """

    n_layer: PositiveInt | None = None
    n_embd: PositiveInt | None = None
    n_head: PositiveInt | None = None
    n_kv_head: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    inter_size: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    n_positions: PositiveInt | None = None
    hidden_act: str | None = None
    rotary_pct: float | None = Field(default=None, ge=0, le=1)
    bias: bool | None = None


def dummy_config(base: ModelConfig | None, knobs: Knobs) -> ModelConfig:
    """Return a shape: a base, changed by knobs, or knobs alone.

    Raises UsageError for what is missing, and for what the decoder cannot express.
    """
    if base is None:
        needed = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
        if missing := [n for n in needed if getattr(knobs, n) is None]:
            flags = ", ".join(f"--{n.replace('_', '-')}" for n in missing)
            raise UsageError(f"a dummy build without --model and --config also needs {flags}")
    values = {**(base.model_dump() if base else {}), **sizes(base, knobs), **kinds(base, knobs)}
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"the decoder cannot have this shape: {explain(error)}") from error


def sizes(base: ModelConfig | None, knobs: Knobs) -> dict[str, Any]:
    """Return every dimension, those not asked for in proportion to the others."""
    d_model = knobs.n_embd or (base.d_model if base else 0)
    n_head = knobs.n_head or (base.n_head if base else 0)
    kept = base is not None and (base.d_model, base.n_head) == (d_model, n_head)
    head_dim = knobs.head_dim or (base.head_dim if base and kept else quotient(d_model, n_head))
    same_width = base is not None and base.d_model == d_model
    multi_head = base is None or base.n_kv_head == base.n_head
    found: dict[str, Any] = {
        "d_model": d_model,
        "n_head": n_head,
        "head_dim": head_dim,
        "n_kv_head": knobs.n_kv_head or (n_head if multi_head or not base else base.n_kv_head),
        "d_ff": knobs.inter_size or (base.d_ff if base and same_width else 4 * d_model),
    }
    for name in ("n_layer", "vocab_size", "n_positions"):
        if (value := getattr(knobs, name)) is not None:
            found[name] = value
    if base is None or base.attention_scale == base.head_dim**-0.5:
        found["attention_scale"] = head_dim**-0.5
    return found


def kinds(base: ModelConfig | None, knobs: Knobs) -> dict[str, Any]:
    """Return activation, positions and biases where they are asked for."""
    found: dict[str, Any] = {}
    if knobs.hidden_act is not None or base is None:
        found["activation"], found["gated"] = read_activation(knobs.hidden_act or "gelu")
    if knobs.rotary_pct is not None:
        found["position"] = "rotary" if knobs.rotary_pct else "learned"
        found["rotary_fraction"] = knobs.rotary_pct or 1.0
    if knobs.bias is not None:
        found |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), knobs.bias)
    return found


def quotient(d_model: int, n_head: int) -> int:
    """Return a head's width where the heads share d_model."""
    if d_model % n_head:
        raise UsageError(
            f"--n-embd {d_model} is not a multiple of --n-head {n_head}; give --head-dim"
        )
    return d_model // n_head


def read_activation(name: str) -> tuple[Activation, bool]:
    """Return what a name computes, and whether it gates a second projection."""
    if name in GATED:
        return GATED[name], True
    if name in PLAIN:
        return PLAIN[name], False
    raise UsageError(f"--hidden-act {name}: porttool knows {', '.join(sorted(PLAIN | GATED))}")


def find_shape(registry: Registry, model: str | None, config: Path | None) -> ModelConfig | None:
    """Return the shape of a config file, else of a family's published model, else None."""
    if config is not None:
        return read_shape(registry, config, model)
    if model is None:
        return None
    shapes = [registry.converters.get(n).shape for n in named_converters(registry, model)]
    if found := next((shape for shape in shapes if shape), None):
        return found
    raise UsageError(f"the family {model!r} names no shape of its own: give --config FILE")


def read_shape(registry: Registry, path: Path, model: str | None) -> ModelConfig:
    """Read config.json of any installed family, a manifest of ours, or a bare ModelConfig."""
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file)
    if str(values.get("format", "")).startswith("porttool-"):
        values = values["config"]
    if "attention_scale" in values:
        try:
            return ModelConfig.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"{file}: not a decoder's shape: {explain(error)}") from error
    with TemporaryDirectory() as folder:
        copy = shutil.copyfile(file, Path(folder) / "config.json")
        try:
            return choose_converter(registry, Path(folder), model).config(Path(folder))
        except PorttoolError as error:  # which names the copy
            error.args = (str(error).replace(str(copy), str(file)).replace(folder, str(file)),)
            raise


def dummy_checkpoint(
    output: Path | None = None,
    *,
    model: str | None = None,
    config: Path | None = None,
    knobs: Knobs | None = None,
    dtype: Dtype = "float16",
    seed: int = 0,
    force: bool = False,
    workspace: Workspace | None = None,
    progress: Progress = SILENT,
) -> AbstractContextManager[Checkpoint]:
    """Draw a checkpoint for `api.build` to read; it is taken away when the context ends.

    The shape is that of a config file or of a family's published model, changed by knobs. Raises
    UsageError, before anything is drawn, where the engine's folder is taken.
    """
    if output is None and model is None:
        raise UsageError("name the engine's folder with --output, or a model with --model")
    target = output or (workspace or Workspace.choose()).engine(str(model))
    require_free(target, ENGINE, replace=force)
    base = find_shape(load_registry(), model, config)
    shape = dummy_config(base, knobs or Knobs())
    return drawn_checkpoint(
        shape, target, dtype=dtype, seed=seed, family=model or DUMMY, progress=progress
    )


@contextmanager
def drawn_checkpoint(
    config: ModelConfig,
    output: Path,
    *,
    dtype: Dtype = "float16",
    seed: int = 0,
    family: str = DUMMY,
    progress: Progress = SILENT,
) -> Iterator[Checkpoint]:
    """Draw a checkpoint beside where the engine is to be; take it away in the end.

    The same seed gives the same weights. Memory holds two of the largest tensor at most.
    """
    from porttool.nn import canonical_shapes

    target = output.absolute().with_name(f".{output.absolute().name}.weights")
    shapes = canonical_shapes(config)
    jobs = [
        TensorJob(name, shape, dtype, 0, partial(draw, name, shape, dtype, seed, config))
        for name, shape in shapes.items()
    ]
    n_bytes = sum(job.nbytes for job in jobs)
    require_space(target, n_bytes)
    manifest = describe(config, shapes, dtype, seed, family)
    shards = plan_shards(jobs, "model")
    key = work_key(manifest.model_dump_json(), shards)
    with pending_folder(target, key, manifest=MANIFEST, replace=True) as folder:
        progress.start("random weights", n_bytes)
        workers = min(8, cpu_count() or 1)
        write_shards(folder, shards, workers=workers, progress=progress)
        folder.finish(MANIFEST, manifest.sealed(files=folder.files))
        progress.finish()
    try:
        yield Checkpoint.open(target, verify=False)
    finally:
        shutil.rmtree(target)


def describe(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, seed: int, family: str
) -> CheckpointManifest:
    """Return the manifest of random weights, marked as such."""
    return CheckpointManifest(
        porttool_version=version("porttool"),
        family=family,
        plugin=PluginRecord(
            component=DUMMY,
            distribution="porttool",
            version=version("porttool"),
            api_version=API_VERSION,
        ),
        source=SourceRecord(path=f"random weights, seed {seed}", fingerprint=""),
        config=config,
        tokens=SpecialTokens(),
        prompt=None,
        dtype=dtype,
        dummy=True,
        tensors=dict(shapes),
        files={},
    )


def draw(name: str, shape: tuple[int, ...], dtype: Dtype, seed: int, config: ModelConfig) -> Tensor:
    """Draw one canonical tensor, whose numbers depend on its name and the seed alone."""
    import torch

    from porttool.memory import empty
    from porttool.nn import randomise

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return randomise(empty(shape, getattr(torch, dtype)), name, config, generator)
