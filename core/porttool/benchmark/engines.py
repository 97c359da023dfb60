"""An engine as a side: through the generation loop, as `run` uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from porttool.benchmark.side import Prompts, Side, SideFailed, Timing
from porttool.config import Sampling
from porttool.engine import EngineManifest
from porttool.errors import EngineError
from porttool.generate import CHUNK, generate
from porttool.nn import Step
from porttool.runner import Runner


class EngineSide(Side):
    """A built engine of any kind; `load_runner` opens and loads it."""

    def __init__(
        self, name: str, manifest: EngineManifest, load_runner: Callable[[], Runner]
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.through_torch = manifest.kind == "torch"
        self.random_weights = manifest.dummy
        self.bytes_on_disk = sum(record.bytes for record in manifest.files.values())
        self._load_runner = load_runner

    def load(self) -> None:
        """Load the runner, and let one token say which device it runs on."""
        try:
            self._runner = self._load_runner()
            self._device = self._runner.step(Step.prefill([[0]])).device.type
        except torch.OutOfMemoryError as error:
            raise EngineError(f"{self.name} does not fit: {error}") from error
        runner = self._runner
        self.tokens_a_sample = min(CHUNK, runner.tokens_at_once) if runner.decodes_on_device else 1

    @property
    def description(self) -> str:
        """The runner's own words."""
        return self._runner.description

    @property
    def device(self) -> str:
        """Where the logits come out."""
        return self._device

    @property
    def dtype(self) -> str:
        """The engine's type."""
        return self.manifest.dtype

    def run(self, prompts: Prompts, output_len: int) -> Timing:
        """Generate, and note when the host has the first row's tokens."""
        times: list[float] = []

        def note(index: int, token: int) -> None:
            if index == 0:
                times.append(time.perf_counter())

        sampling = Sampling(max_new_tokens=output_len, ignore_eos=True)
        began = time.perf_counter()
        try:
            generate(self._runner, prompts, sampling, eos=(), on_token=note)
        except torch.OutOfMemoryError as error:
            raise SideFailed(f"out of memory: {error}") from error
        except EngineError as error:  # so does another library say that its memory ran out
            raise SideFailed(str(error)) from error
        total = time.perf_counter() - began
        later = spread(times, self.tokens_a_sample)
        return Timing(times[0] - began, later, total)


def spread(times: list[float], size: int) -> tuple[float, ...]:
    """Return seconds of each token after the first, where the host gets `size` at a time.

    Tokens of one chunk reach the host together; each took the same share of its time.
    """
    starts = [0, *range(1, len(times), size)]
    ends = [*starts[2:], len(times)]
    found: list[float] = []
    for (before, first), end in zip(pairwise(starts), ends, strict=True):
        n = end - first
        found += [(times[first] - times[before]) / n] * n
    return tuple(found)
