"""One tiny source taken all the way to a loaded float64 engine, and prompts for it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.checkpoint import Checkpoint
from porttool.config import ModelConfig, Sampling
from porttool.converter import Converter, Source, convert
from porttool.engine import Engine, build, choose_limits
from porttool.errors import CheckFailed
from porttool.plugins import choose_converter, load_registry
from porttool.progress import SILENT
from porttool.runner import Runner, load_runner

if TYPE_CHECKING:
    from torch import Tensor

ATOL = 1e-9
"""Largest difference of two logits in float64 that rounding explains."""

PROMPT_LENGTHS = (7, 1, 11, 4)
N_NEW = 8


class Specimen:
    """A source, its converter, and, when first asked for, its checkpoint, engine and runner."""

    def __init__(self, source: Path, folder: Path, options: Mapping[str, Any]) -> None:
        self.source = source
        self.folder = folder
        self.options = options
        self.registry = load_registry()
        self._prepared = ExitStack()

    def close(self) -> None:
        """Take away what reading the source in place needed."""
        self._prepared.close()

    @cached_property
    def opened(self) -> Source:
        """The source indexed; its tensors can be read until `close`."""
        ready = self.converter.prepare(self.source, self.folder, SILENT)
        return self.converter.open(self._prepared.enter_context(ready))

    @cached_property
    def converter(self) -> Converter:
        """The one converter that recognises the source."""
        return choose_converter(self.registry, self.source, None, self.options)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source converted in its own type."""
        return self.convert("checkpoint")

    @cached_property
    def runner(self) -> Runner:
        """The canonical decoder in float64 on the CPU."""
        return self.load(self.build("engine"))

    @property
    def config(self) -> ModelConfig:
        """The shape that the converter read."""
        return self.checkpoint.config

    @property
    def prompts(self) -> list[list[int]]:
        """Prompts of unequal lengths, drawn from the whole vocabulary."""
        longest = max(PROMPT_LENGTHS) + N_NEW
        if self.config.n_positions < longest:
            raise CheckFailed(
                f"the source has {self.config.n_positions} positions, the kit needs {longest}"
            )
        draw = random.Random(0)
        return [[draw.randrange(self.config.vocab_size) for _ in range(n)] for n in PROMPT_LENGTHS]

    def convert(self, name: str, source: Path | None = None, **options: Any) -> Checkpoint:
        """Convert the source, or a damaged copy of it, into a folder of this name."""
        plugin = self.registry.record(self.registry.converters, self.converter.name)
        where = source or self.source
        return convert(self.converter, where, self.folder / name, plugin=plugin, **options)

    def build(self, name: str) -> Engine:
        """Build the checkpoint as a float64 engine into a folder of this name."""
        limits = choose_limits(
            self.config,
            max_batch_size=len(PROMPT_LENGTHS),
            max_input_len=max(PROMPT_LENGTHS),
            max_output_len=N_NEW,
        )
        return build(
            self.checkpoint,
            self.registry.builders.get("torch")(),
            self.folder / name,
            plugin=self.registry.record(self.registry.builders, "torch"),
            limits=limits,
            dtype="float64",
        )

    def load(self, engine: Engine) -> Runner:
        """Load an engine into the canonical decoder on the CPU."""
        return load_runner(engine, self.registry, {"device": "cpu", "canonical": True})

    def prefill(self, prompt: list[int]) -> Tensor:
        """Logits [len(prompt), vocab_size] of one prefill in slot 0."""
        from porttool.nn import Step

        return self.runner.step(Step.prefill([prompt]), all_positions=True)[0]

    def feed(self, prompt: list[int], widths: Sequence[int], slot: int = 0) -> Tensor:
        """Logits [len(prompt), vocab_size] when the prompt is fed in steps of these widths."""
        import torch

        from porttool.nn import Step

        start, found = 0, []
        for width in widths:
            part = Step.prefill([prompt[start : start + width]], [slot])
            step = Step(part.slots, part.tokens, torch.tensor([start]), part.lengths)
            found.append(self.runner.step(step, all_positions=True)[0])
            start += width
        return torch.cat(found)

    def batch(self, padding: int) -> list[Tensor]:
        """Logits [len(prompt), vocab_size] of every prompt, fed as one batch to shuffled slots."""
        import torch

        from porttool.nn import Step

        step = Step.prefill(self.prompts, list(range(len(self.prompts)))[::-1])
        real = torch.arange(step.tokens.shape[1]) < step.lengths[:, None]  # [n, width]
        tokens = step.tokens.where(real, padding)
        fed = Step(step.slots, tokens, step.starts, step.lengths)
        logits = self.runner.step(fed, all_positions=True)  # [n, width, vocab_size]
        return [row[: len(prompt)] for row, prompt in zip(logits, self.prompts, strict=True)]

    def greedy(self, prompts: list[list[int]], runner: Runner | None = None) -> list[list[int]]:
        """Return the greedy continuation of every prompt, run as one batch."""
        from porttool.generate import generate

        asked = Sampling(max_new_tokens=N_NEW, ignore_eos=True)
        found = generate(runner or self.runner, prompts, asked, eos=())
        return [list(completions[0].tokens) for completions in found]


def require_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise CheckFailed unless two float64 tensors agree within 1e-9 everywhere."""
    import torch

    if found.dtype != torch.float64 or expected.dtype != torch.float64:
        raise CheckFailed(f"{what}: {found.dtype} beside {expected.dtype}; compute both in float64")
    if found.shape != expected.shape:
        raise CheckFailed(f"{what}: {list(found.shape)} beside {list(expected.shape)}")
    apart = (found - expected).abs()
    if not bool((apart <= ATOL).all()):
        row = int(apart.amax(-1).argmax())
        raise CheckFailed(f"{what}: {float(apart.max()):.3g} apart at position {row}, not {ATOL:g}")
