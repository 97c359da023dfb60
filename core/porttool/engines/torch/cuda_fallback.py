"""What of a tuning runs here, where it was not made here."""

from __future__ import annotations

from dataclasses import replace

import torch

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_balanced, cuda_cluster, cuda_hopper
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_tuning import Tuning, default_tuning


def usable(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[Tuning, str]:
    """Return a tuning that can run here, and what to say of kernels that it has or goes without."""
    tuning, clusters = _clusters(tuning, config, dtype, device)
    tuning, attention = _attention(tuning, config, dtype, device)
    return tuning, clusters + attention


def _clusters(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[Tuning, str]:
    if not tuning.cluster:
        return tuning, ""
    reason = cuda_cluster.unsuited(config, dtype, device)
    if reason is None:
        rows, tiles = next(iter(tuning.cluster.items()))
        defined = cuda_cluster.macros(config, dtype, "out", tiles["out"], int(rows))
        reason = _refused(cuda_cluster.KERNEL, defined, cuda_cluster.threads(tiles["out"]), device)
    if reason:
        return replace(tuning, cluster={}), f", no products in clusters: {reason}"
    return tuning, ", products of several rows in clusters"


def _attention(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[Tuning, str]:
    balanced = {rows: tile for rows, tile in tuning.wide_attention.items() if tile.balanced}
    if not balanced:
        return tuning, ""
    reason = cuda_balanced.unsuited(config, dtype, device)
    for tile in [] if reason else balanced.values():
        defined, threads = cuda_balanced.macros(config, dtype, tile), cuda_balanced.threads
        reason = reason or _refused(
            cuda_balanced.kernel(config), defined, threads(config, tile), device
        )
    if reason:
        others = default_tuning(config, device).wide_attention
        kept = {**tuning.wide_attention, **{rows: others[rows] for rows in balanced}}
        return replace(tuning, wide_attention=kept), f", no balanced attention: {reason}"
    return tuning, ", balanced attention of several rows"


def _refused(name: str, defined: dict[str, object], threads: int, device: str) -> str | None:
    """Say why a kernel cannot be made ready here, or None."""
    try:
        cuda_hopper.load(name, defined, threads=threads, device=device)
    except CompilerUnavailable as error:
        return str(error)
    return None
