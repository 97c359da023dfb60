"""Which tiles an engine's kernels run in on a GPU: measured, now or earlier, or the rule's."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from porttool.builder import BuildRequest
from porttool.config import ITEMSIZE, ModelConfig
from porttool.engine import Engine
from porttool.engines.torch.cuda_tuning import Tuning, gpu_name, multiprocessors
from porttool.engines.torch.tile_cache import Say, TileKey, keep_tiles, read_tiles, read_tuning
from porttool.errors import EngineError, UsageError
from porttool.nn import n_parameters

Wish = bool | Literal["auto"]

WORTH_BYTES = 64 << 20
"""Smaller models stay in a GPU's cache: their steps are launches, and no tile makes those faster.

An H200's holds 50 MB.
"""


LATER = "on a GPU this engine runs in the rule's, until it is loaded there with `--set retune true`"

ROOM = 128
"""Positions that measured steps take after the context, at most."""


@dataclass(frozen=True)
class Tiles:
    """`tuning` None is the rule's choice; `reason` says why nothing measured is there."""

    tuning: Tuning | None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Return what an engine's manifest keeps."""
        return {"tuning": self.tuning.as_dict()} if self.tuning else {"not_tuned": self.reason}


def tiles_at_build(request: BuildRequest, tune: Wish, say: Say) -> Tiles:
    """Measure the tiles of one rank's shape, or take those measured here before.

    `tune` true measures whatever is known, and is a UsageError where that is impossible; "auto"
    says why it is not done.
    """
    if tune is False:
        return Tiles(None, "tune was false")
    reason = obstacle(request)
    if tune is True and reason:
        raise UsageError(f"tune was asked for, but {reason}; build with tune auto or false")
    if reason and not small(request):
        say(f"the kernels' tiles are not measured, for {reason}: {LATER}")
    if tune == "auto" and (reason or small(request)):
        return Tiles(None, reason or "so small a model gains nothing")
    key = key_of(request, "cuda")
    known = read_tiles(key, say) if tune == "auto" else None
    if known is None:
        tiles = measure(request, key, "cuda", say)
        if tune is True and not tiles.tuning:
            raise EngineError(f"the kernels' tiles: {tiles.reason}; build with tune auto or false")
        if not tiles.tuning:
            say(f"the kernels' tiles: {tiles.reason}; {LATER}")
        return tiles
    say(f"tiles as measured on {key.gpu} before; tune true measures them again")
    for n in key.batch_sizes:
        say(f"{n} rows: {known.described(n)}")
    return Tiles(known)


def tiles_at_load(engine: Engine, device: str, retune: Wish, say: Say) -> Tiles:
    """Return the engine's own tiles if they are this GPU's, else the user's, else measure.

    `retune` "auto" measures where the engine was tuned elsewhere, true also where it never was;
    false takes nothing that was not measured at build. Whatever is not the engine's own is said.
    """
    made = engine.manifest
    request = BuildRequest(made.dtype, made.limits, made.config)
    key = key_of(request, device)
    own = own_tiles(made.built[0], key)
    if own.tuning:
        return own
    if retune is not False and (known := read_tiles(key, say)):
        say(f"{engine.path}: {own.reason}; taking the tiles measured on {key.gpu} before")
        return Tiles(known)
    was_tuned = "tuning" in made.built[0]
    if retune is True or (retune == "auto" and was_tuned):
        say(f"{engine.path}: {own.reason}; `--set retune false` does without measuring")
        tiles = measure(request, key, device, say)
    else:
        hint = "retune is false" if retune is False else "`--set retune true` measures them, once"
        tiles = Tiles(None, f"{own.reason}; {hint}")
    if not tiles.tuning and (was_tuned or retune is True or not small(request)):
        say(f"{engine.path}: it runs in the rule's tiles: {tiles.reason}")
    return tiles


def own_tiles(record: dict[str, Any], key: TileKey) -> Tiles:
    """Return an engine's tiles if they were measured on this kind of GPU, else why they are not."""
    found = record.get("tuning")
    if found is None:
        why = record.get("not_tuned", "it was not asked for")
        return Tiles(None, f"its tiles were not measured at build ({why})")
    if found.get("gpu") != key.gpu:
        return Tiles(None, f"it was tuned on {found.get('gpu')}, and this is {key.gpu}")
    tuning = read_tuning(found, key.config)
    if tuning and tuning.multiprocessors not in (0, key.multiprocessors):
        why = f"with {tuning.multiprocessors} multiprocessors, and this one has"
        return Tiles(None, f"it was tuned on {key.gpu} {why} {key.multiprocessors}")
    return Tiles(tuning, "" if tuning else "its tiles are of another version of the kernels")


def measure(request: BuildRequest, key: TileKey, device: str, say: Say) -> Tiles:
    """Measure tiles now, which takes minutes and the engine's memory, 2 GB at least; keep them."""
    from triton import TritonError

    from porttool.engines.torch.cuda_tune import tune

    say(
        f"measuring the kernels' tiles on {key.gpu} for batches of "
        f"{', '.join(map(str, key.batch_sizes))}; each takes from half a minute to several"
    )
    failure = ""
    try:
        found = tune(
            roomy(request),
            dtype=getattr(torch, request.dtype),
            batch_sizes=key.batch_sizes,
            context=key.context,
            device=device,
            report=say,
        )
    except (RuntimeError, TritonError, EngineError) as error:  # most often too little memory
        failure = f"they could not be measured: {str(error).strip() or type(error).__name__:.300}"
    release(device)
    if failure:
        return Tiles(None, failure)
    tuning = Tuning.from_dict(found)
    keep_tiles(key, tuning, say)
    return Tiles(tuning)


def release(device: str) -> None:
    """Give back what was measured in, before an engine's weights come."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def obstacle(request: BuildRequest) -> str | None:
    """Say why nothing can be measured in this process, or None."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    from porttool.engines.torch.cuda_limits import unsupported  # needs Triton

    return unsupported(request.config, getattr(torch, request.dtype))


def small(request: BuildRequest) -> bool:
    """Return true for a model that is not worth the minutes."""
    return n_parameters(request.config) * ITEMSIZE[request.dtype] < WORTH_BYTES


def key_of(request: BuildRequest, device: str) -> TileKey:
    """Return what measured tiles would hold for."""
    import triton

    from porttool.engines.torch.cuda_tune import tuned_rows

    sizes = tuned_rows(request.limits.max_batch_size)
    return TileKey.of(
        request,
        gpu=gpu_name(device),
        multiprocessors=multiprocessors(device),
        batch_sizes=sizes,
        triton=triton.__version__,
    )


def roomy(request: BuildRequest) -> ModelConfig:
    """Return a model that has positions enough for steps measured at the longest prompt."""
    n_positions = max(request.config.n_positions, request.limits.max_input_len + ROOM)
    return request.config.model_copy(update={"n_positions": n_positions})
