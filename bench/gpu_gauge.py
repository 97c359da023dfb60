"""Milliseconds, clock and power of work on the GPU that torch uses, by the driver's gauges."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

BETWEEN = 0.005
"""Seconds between two looks at the gauges."""


@dataclass(frozen=True)
class Sample:
    """What the driver says at a time in seconds, None where it does not know.

    millijoules: since the driver was loaded.
    """

    at: float
    millijoules: int | None
    milliwatts: int | None
    megahertz: int | None


class Gauge:
    """The driver's gauges (NVML); OSError where there are none."""

    def __init__(self) -> None:
        self._nvml, self._device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        status = self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(
            uuid.encode(), ctypes.byref(self._device)
        )
        if status:
            raise OSError(f"NVML does not open {uuid}: status {status}")

    def read(self, name: str, *given: int, kind: Any = ctypes.c_uint) -> int | None:
        """Return a value, None if this GPU or driver does not know it."""
        value = kind()
        function = getattr(self._nvml, f"nvmlDeviceGet{name}")
        unknown = function(self._device, *given, ctypes.byref(value))
        return None if unknown else int(value.value)

    def sample(self) -> Sample:
        """Return what is known now; clock 1 is the multiprocessors'."""
        energy = self.read("TotalEnergyConsumption", kind=ctypes.c_ulonglong)
        at = time.perf_counter()
        return Sample(at, energy, self.read("PowerUsage"), self.read("ClockInfo", 1))


def watts(samples: list[Sample]) -> tuple[float, str]:
    """Return the mean power and what it is from; OSError if nothing says."""
    counted = [(s.at, s.millijoules) for s in samples if s.millijoules is not None]
    ticks = [now for last, now in pairwise(counted) if now[1] != last[1]]
    if len(ticks) >= 3:
        (begun, first), (ended, last) = ticks[0], ticks[-1]
        return (last - first) / 1000 / (ended - begun), "counter"
    shown = by_the_gauge(samples)
    if shown is None:
        raise OSError("the driver tells neither power nor energy")
    return shown, "gauge"


def by_the_gauge(samples: list[Sample]) -> float | None:
    """Return the mean of the driver's own averages, in watts."""
    shown = [s.milliwatts for s in samples if s.milliwatts is not None]
    return statistics.mean(shown) / 1000 if shown else None


@dataclass(frozen=True)
class Case:
    """Work for the GPU: `run` does it `calls` times; bytes and operations are of one call."""

    run: Callable[[], object]
    calls: int
    nbytes: int = 0
    operations: int = 0


def repeated(case: Case, seconds: float) -> list[float]:
    """Return milliseconds of single calls, run for some seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        case.run()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / case.calls)
    return times


def measure(case: Case, gauge: Gauge, seconds: float, base: float) -> dict[str, Any]:
    """Return a case's figures after as long a warm-up; `base`: see `figures`."""
    repeated(case, seconds)
    samples, over = [gauge.sample()], threading.Event()

    def watch() -> None:
        while not over.wait(BETWEEN):
            samples.append(gauge.sample())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            times = repeated(case, seconds)
        finally:
            over.set()
        watching.result()
    return figures(case, statistics.median(times), samples, base)


def figures(case: Case, ms: float, samples: list[Sample], base: float) -> dict[str, Any]:
    """Return what follows from milliseconds of a call and what the gauges said meanwhile.

    base: watts that are left out of `J above` and of what a byte and an operation take.
    """
    power, origin = watts(samples)
    above = ms / 1000 * (power - base)
    clocks = [s.megahertz for s in samples if s.megahertz is not None]
    shown = by_the_gauge(samples)
    found: dict[str, Any] = {
        "ms": round(ms, 4), "SM MHz": statistics.median(clocks) if clocks else None,
        "W": round(power, 1), "W from": origin,
        "W by the gauge": None if shown is None else round(shown, 1),
        "J": round(ms / 1000 * power, 4), "J above": round(above, 4),
    }  # fmt: skip
    if case.nbytes:
        found["bytes"] = case.nbytes
        found["TB/s"] = round(case.nbytes / ms / 1e9, 3)
        found["pJ a byte"] = round(above / case.nbytes * 1e12, 1)
    if case.operations:
        found["operations"] = case.operations
        found["TFLOP/s"] = round(case.operations / ms / 1e9, 1)
        found["pJ an operation"] = round(above / case.operations * 1e12, 4)
    return found
