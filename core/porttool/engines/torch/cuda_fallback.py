"""What of a tuning runs here, where it was not made here."""

from __future__ import annotations

from dataclasses import replace

import torch

from porttool.config import ModelConfig
from porttool.engines.torch import (
    cuda_balanced,
    cuda_cluster,
    cuda_hopper,
    cuda_prompt_attention,
)
from porttool.engines.torch.cuda_prompt_attention import PromptAttention
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_state import DeviceCache
from porttool.engines.torch.cuda_tuning import Tuning


def usable(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> tuple[Tuning, str]:
    """Return a tuning that can run here, and what to say of kernels that it has or goes without."""
    said = ""
    if tuning.cluster:
        reason = _clusters_refused(tuning, config, dtype, device)
        tuning = replace(tuning, cluster={}) if reason else tuning
        said += f", no products in clusters: {reason}" if reason else ""
        said += "" if reason else ", products of several rows in clusters"
    balanced = [rows for rows, tile in tuning.wide_attention.items() if tile.balanced]
    if balanced:
        reason = _attention_refused(tuning, config, dtype, device)
        if reason:
            others = default_tuning(config, device).wide_attention
            kept = {**tuning.wide_attention, **{rows: others[rows] for rows in balanced}}
            tuning = replace(tuning, wide_attention=kept)
        said += f", no balanced attention: {reason}" if reason else ""
        said += "" if reason else ", balanced attention of several rows"
    return tuning, said


def prompt_attention(
    config: ModelConfig, cache: DeviceCache, device: str
) -> tuple[PromptAttention | None, str]:
    """Return the attention of prompts for Hopper GPUs where it runs, and what to say of it."""
    dtype = cache.keys.dtype
    if cuda_prompt_attention.unsuited(config, dtype, device):
        return None, ""
    reason = cuda_prompt_attention.refusal(config, dtype, device)
    if reason:
        return None, f", no Hopper attention of prompts: {reason}"
    return PromptAttention(config, cache), ", Hopper attention of prompts"


def _clusters_refused(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> str | None:
    """Say why products in clusters do not run, by one of them, or None."""
    rows, tiles = next(iter(tuning.cluster.items()))
    tile = tiles["out"]
    return cuda_cluster.unsuited(config, dtype, device) or cuda_hopper.refusal(
        cuda_cluster.KERNEL, cuda_cluster.macros(config, dtype, "out", tile, int(rows)),
        threads=cuda_cluster.threads(tile), device=device,
    )  # fmt: skip


def _attention_refused(
    tuning: Tuning, config: ModelConfig, dtype: torch.dtype, device: str
) -> str | None:
    """Say why one of the balanced tiles does not run, as its steps will want it, or None."""
    reason = cuda_balanced.unsuited(config, dtype, device)
    for rows, tile in tuning.wide_attention.items():
        if reason or not tile.balanced:
            continue
        parts = 1 if rows in tuning.cluster else tuning.wide[rows]["qkv"].split
        defined = cuda_balanced.macros(config, dtype, tile, parts=parts,
                                       has_bias=parts > 1 and config.qkv_bias)  # fmt: skip
        reason = cuda_hopper.refusal(
            cuda_balanced.kernel(config), defined, threads=cuda_balanced.threads(config, tile),
            device=device,
        )  # fmt: skip
    return reason
