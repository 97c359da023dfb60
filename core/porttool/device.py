"""The device that torch runs on."""

from __future__ import annotations

from typing import Literal

from porttool.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]


def choose_device(wanted: Device) -> str:
    """Return cpu or cuda; a GPU that was asked for and is not there is a UsageError."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("device cuda was asked for, but torch sees no GPU; use device cpu")
    return ("cuda" if available else "cpu") if wanted == "auto" else wanted
