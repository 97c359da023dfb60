"""Measuring every side in every cell, in turn, with the device's own speed beside each round."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from porttool.benchmark.memory import (
    Counter,
    DeviceMemory,
    Meter,
    TorchMemory,
    choose_counter,
)
from porttool.benchmark.results import (
    BenchmarkResult,
    Ceiling,
    Cell,
    Failure,
    Machine,
    Measurement,
    Method,
    Round,
    SideRecord,
)
from porttool.benchmark.roofline import decode_cost, measure_ceiling, peak_of, prefill_cost
from porttool.benchmark.side import Prompts, Side, SideFailed, Timing
from porttool.config import ModelConfig
from porttool.errors import EngineError, PorttoolError
from porttool.progress import Progress

BASE = "HF eager"
PAUSE = 0.25
"""Seconds between sides on a CPU: threads of some libraries go on spinning after their work."""


@dataclass
class Entry:
    """A loaded side, its memory, and what was measured of it in the cell at hand."""

    side: Side
    meter: Meter | None
    record: SideRecord
    timings: list[Timing] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    def watched(self) -> AbstractContextManager[None]:
        """Count what its memory does inside, where the system says."""
        return self.meter.watch() if self.meter is not None else nullcontext()


class Benchmark:
    """A run over a grid. Sides that fail are named with the reason; the others go on."""

    def __init__(self, config: ModelConfig, method: Method, progress: Progress) -> None:
        self.config = config
        self.method = method
        self.progress = progress
        self.entries: list[Entry] = []
        self.failures: list[Failure] = []
        self.measurements: list[Measurement] = []

    def load(self, side: Side) -> None:
        """Load a side, with its time and memory."""
        self.progress.note(f"loading {side.name}")
        meters = {c.name: Meter(c) for c in counters()}
        began = time.perf_counter()
        try:
            with ExitStack() as watching:
                for meter in meters.values():
                    watching.enter_context(meter.watch())
                side.load()
        except SideFailed as reason:
            self._fail(side, None, reason)
            return
        seconds = time.perf_counter() - began
        counter = choose_counter(cuda=side.device == "cuda", through_torch=side.through_torch)
        chosen = meters[counter.name] if counter else None
        for entry in self.entries:
            if chosen and entry.meter and entry.record.name == side.shares_with:
                chosen.held += entry.meter.held
        self.entries.append(Entry(side, chosen, record_of(side, seconds, counter)))

    def measure_all(self, cells: Sequence[Cell]) -> BenchmarkResult:
        """Measure every cell; return everything."""
        rounds = self.method.warmup + self.method.repeats
        self.progress.start("bench", len(cells) * rounds * len(self.entries), unit="runs")
        for cell in cells:
            self.measure(cell)
        self.progress.finish()
        if not self.measurements:
            reasons = "; ".join(f"{f.side}: {f.reason}" for f in self.failures)
            raise EngineError(f"nothing could be measured: {reasons}")
        return BenchmarkResult(
            machine=describe_machine(),
            method=self.method,
            model=self.config,
            sides=tuple(entry.record for entry in self.entries),
            measurements=tuple(self.measurements),
            failures=tuple(self.failures),
        )

    def measure(self, cell: Cell) -> None:
        """Warm every side up, then let them take turns."""
        prompts = draw_prompts(cell, self.config.vocab_size, self.method.seed)
        running = [entry for entry in self.entries if self._warm_up(entry, prompts, cell)]
        for _ in range(self.method.repeats):
            places = {(e.record.device, e.record.dtype) for e in running}
            try:
                ceilings = {place: measure_ceiling(*place) for place in places}
            except EngineError as reason:  # no room for it: other cells may leave some
                for entry in running:
                    self._fail(entry.side, cell, reason)
                return
            for entry in list(running):
                timing = self._run(entry, prompts, cell)
                if timing is None:
                    running.remove(entry)
                    continue
                ceiling = ceilings[entry.record.device, entry.record.dtype]
                entry.timings.append(timing)
                entry.rounds.append(round_of(timing, self.config, cell, entry.record, ceiling))
                if entry.record.device == "cpu" and len(running) > 1:
                    time.sleep(PAUSE)
        base = next((e.rounds for e in running if e.record.name == BASE), None)
        self.measurements += [summarize(entry, cell, base) for entry in running]

    def _warm_up(self, entry: Entry, prompts: Prompts, cell: Cell) -> bool:
        entry.timings, entry.rounds = [], []
        with entry.watched():  # what it forgets is no longer held
            entry.side.prepare()
        if entry.meter is not None:
            entry.meter.reset()
        return all(self._run(entry, prompts, cell) for _ in range(self.method.warmup))

    def _run(self, entry: Entry, prompts: Prompts, cell: Cell) -> Timing | None:
        with entry.watched():
            try:
                timing = entry.side.run(prompts, cell.output_len)
            except SideFailed as reason:
                self._fail(entry.side, cell, reason)
                return None
        self.progress.advance(1)
        return timing

    def _fail(self, side: Side, cell: Cell | None, reason: PorttoolError) -> None:
        self.progress.note(f"{side.name} does not run{f', {cell}' if cell else ''}: {reason}")
        self.failures.append(Failure(side=side.name, cell=cell, reason=str(reason)))


def draw_prompts(cell: Cell, vocab_size: int, seed: int) -> list[list[int]]:
    """Draw a cell's prompts: the same for every side and every time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cell.batch_size, cell.input_len)
    prompts: list[list[int]] = torch.randint(vocab_size, shape, generator=generator).tolist()
    return prompts


def round_of(
    timing: Timing, config: ModelConfig, cell: Cell, side: SideRecord, ceiling: Ceiling
) -> Round:
    """Set one run beside the ceiling that was measured just before."""
    token, peak = median(timing.later), peak_of(ceiling)
    return Round(
        first_token_ms=1e3 * timing.first,
        token_ms=1e3 * token,
        total_ms=1e3 * timing.total,
        prefill_roofline=prefill_cost(config, cell, side.dtype).seconds(peak) / timing.first,
        decode_roofline=decode_cost(config, cell, side.dtype).seconds(peak) / token,
        ceiling=ceiling,
    )


def summarize(entry: Entry, cell: Cell, base: Sequence[Round] | None) -> Measurement:
    """Return the medians over the rounds, and percentiles over every token of them."""
    rounds = entry.rounds
    tokens = [1e3 * t for timing in entry.timings for t in timing.later]
    made = cell.batch_size * cell.output_len
    faster = None
    if base is not None:
        faster = median(b.token_ms / r.token_ms for b, r in zip(base, rounds, strict=True))
    return Measurement(
        side=entry.record.name,
        cell=cell,
        first_token_ms=median(r.first_token_ms for r in rounds),
        token_ms=median(tokens),
        token_ms_p90=float(np.quantile(tokens, 0.9)),
        token_ms_p99=float(np.quantile(tokens, 0.99)),
        tokens_per_second=median(1e3 * made / r.total_ms for r in rounds),
        peak_memory_bytes=entry.meter.peak if entry.meter else None,
        prefill_roofline=median(r.prefill_roofline for r in rounds),
        decode_roofline=median(r.decode_roofline for r in rounds),
        times_as_fast=faster,
        rounds=tuple(rounds),
    )


def counters() -> list[Counter]:
    """Return every counter that works here: before a side is loaded nobody knows its device."""
    on_host = choose_counter(cuda=False, through_torch=True)
    found: list[Counter] = [on_host] if on_host else []
    return found + ([TorchMemory(), DeviceMemory()] if torch.cuda.is_available() else [])


def record_of(side: Side, seconds: float, counter: Counter | None) -> SideRecord:
    """Keep who a side is."""
    return SideRecord(
        name=side.name,
        description=side.description,
        device=side.device,
        dtype=side.dtype,
        random_weights=side.random_weights,
        bytes_on_disk=side.bytes_on_disk,
        load_seconds=round(seconds, 3),
        tokens_a_sample=side.tokens_a_sample,
        memory_counter=counter.name if counter else "none here",
    )


def describe_machine() -> Machine:
    """Say where this runs."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return Machine(
        porttool=version("porttool"),
        torch=torch.__version__,
        python=platform.python_version(),
        processor=names[0] if names else platform.machine(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
    )
