"""What the kernels and the GPU can take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig, dtype_name
from porttool.engines.torch.cuda_prefill import prefill_bytes
from porttool.engines.torch.cuda_tuning import SHARED_BYTES
from porttool.errors import EngineError
from porttool.nn import n_parameters
from porttool.progress import format_bytes

LIBRARY_BYTES = 64 << 20
"""What the library for matrix products takes, on the stream that runs and the one that captures."""


def unsupported(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run a model, or None."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"they compute in float16, bfloat16 and float32, not in {dtype_name(dtype)}"
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
    """Refuse a model that the GPU cannot hold and feed, and say which batch it could.

    Of the weights that are `given`, those that lie on the GPU need no room any more.
    """
    if not device.startswith("cuda"):
        return
    size: int = dtype.itemsize
    slot: int = 2 * config.n_layer * config.n_kv_head * limits.max_len * config.head_dim * size
    weights = size * n_parameters(config)
    free: int = torch.cuda.mem_get_info(device)[0]
    free += sum(w.nbytes for w in given.values() if w.device.type == "cuda")

    def passing(rows: int) -> int:
        prompts = prefill_bytes(config, weights + rows * slot, size, rows, rows * limits.max_len)
        return prompts + 2 * 4 * rows * config.vocab_size + LIBRARY_BYTES

    def fits(rows: int) -> bool:
        return weights + rows * slot + passing(rows) <= free

    if fits(limits.max_batch_size):
        return
    most = min(limits.max_batch_size, max(free - weights, 0) // slot)
    rows = next((n for n in range(most, 0, -1) if fits(n)), 0)
    raise EngineError(
        f"the GPU has {format_bytes(free)} for it; the weights need {format_bytes(weights)}, each "
        f"row of {limits.max_len} tokens {format_bytes(slot)}, and a step of "
        f"{limits.max_batch_size} rows {format_bytes(passing(limits.max_batch_size))} for a while: "
        + (f"build with --max-batch-size {rows}" if rows else "use a larger GPU or --tp")
    )
