"""How much memory one of several sides in a process holds at most."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Linux, Documentation/filesystems/proc.rst: sets the peak to what is resident now."""


class Counter(ABC):
    """Reads the bytes in use, and the most since the last reset."""

    name: str

    @abstractmethod
    def reset(self) -> None:
        """Begin a new peak."""

    @abstractmethod
    def read(self) -> tuple[int, int]:
        """Return bytes in use now, and at most since the reset."""


class TorchMemory(Counter):
    """Device memory in torch's tensors, CUDA graphs' included; its cache of free blocks is not."""

    name = "torch's allocator"

    def reset(self) -> None:
        """Begin a new peak."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int, int]:
        """Return allocated bytes."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


class DeviceMemory(Counter):
    """What the device has no longer free: for libraries that do not allocate through torch."""

    name = "the device's free memory, before and after"

    def reset(self) -> None:
        """There is no peak to reset."""

    def read(self) -> tuple[int, int]:
        """Return the bytes in use, by whomever."""
        free, total = torch.cuda.mem_get_info()
        return total - free, total - free


class ResidentMemory(Counter):
    """The process's resident memory."""

    name = "resident memory"

    def reset(self) -> None:
        """Begin a new peak."""
        CLEAR.write_text(RESET_PEAK)

    def read(self) -> tuple[int, int]:
        """Return resident bytes."""
        found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", STATUS.read_text()))
        return 1024 * int(found["VmRSS"]), 1024 * int(found["VmHWM"])


class Meter:
    """Follows what one side holds, by what changes while it is at work.

    `peak` is the most that it held since `reset`: what earlier work left, and the rise above that.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.held = 0
        self.peak = 0

    def reset(self) -> None:
        """Begin a new peak at what is held."""
        self.peak = self.held

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what happens inside for this side."""
        self.counter.reset()
        before, _ = self.counter.read()
        yield
        after, most = self.counter.read()
        self.peak = max(self.peak, self.held + most - before)
        self.held = max(0, self.held + after - before)  # what others left may be given back here


def choose_counter(*, cuda: bool, through_torch: bool) -> Counter | None:
    """Return what reads a side's memory; None where the system has no such counter."""
    if cuda:
        return TorchMemory() if through_torch else DeviceMemory()
    resident = ResidentMemory()
    try:
        resident.reset()
    except OSError:  # not Linux, or a container that keeps it read-only
        return None
    return resident
