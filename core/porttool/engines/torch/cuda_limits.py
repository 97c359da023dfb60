"""What the kernels and the GPU can take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda_tuning import SHARED_BYTES
from porttool.errors import EngineError
from porttool.nn import meta_decoder
from porttool.progress import format_bytes


def unsupported(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run a model, or None."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"they compute in float16, bfloat16 and float32, not in {str(dtype)[6:]}"
    if config.head_dim > 256:
        return f"they hold a head of up to 256 elements, and these have {config.head_dim}"
    return None


def overlaps(device: str) -> bool:
    """True where kernels can be launched before their predecessor ends: from Hopper on."""
    return device != "cpu" and (
        not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (9, 0)
    )


def stageable(dtype: torch.dtype, device: str) -> bool:
    """True where the Gluon kernels run: 16-bit types on GPUs that copy to shared memory alone."""
    return (
        dtype != torch.float32
        and device.startswith("cuda")
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def shared_bytes(device: str) -> int:
    """Shared memory that one program may take: 99 KB of many GPUs, 163 of an A100, 227 of Hopper.

    Hopper's is not taken whole, so that what a kernel needs beside its tiles has room.
    """
    if not device.startswith("cuda"):
        return SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return min(SHARED_BYTES, getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES))


def require_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    limits: Limits,
    device: str,
    *,
    given: Mapping[str, Tensor],
) -> None:
    """Refuse a model that the GPU cannot hold, and say which batch it could.

    Of the weights that are `given`, those that lie on the GPU need no room any more.
    """
    if not device.startswith("cuda"):
        return
    size = dtype.itemsize
    slot = 2 * config.n_layer * config.n_kv_head * limits.max_len * config.head_dim * size
    weights = sum(t.numel() for t in meta_decoder(config).state_dict().values()) * size
    free, _ = torch.cuda.mem_get_info(device)
    free += sum(w.nbytes for w in given.values() if w.device.type == "cuda")
    if weights + slot * limits.max_batch_size > free:
        fits = max(int((free * 0.94 - weights) // slot), 0)
        raise EngineError(
            f"the GPU has {format_bytes(free)} for it; the weights need {format_bytes(weights)} "
            f"and each row of {limits.max_len} tokens {format_bytes(slot)}: "
            + (f"build with --max-batch-size {fits}" if fits else "use a larger GPU or --tp")
        )
