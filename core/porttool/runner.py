"""The contract of a runner: one loaded engine, token ids in, logits out."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from porttool.component import Component
from porttool.errors import EngineError, SourceError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from porttool.engine import Engine
    from porttool.nn import Step
    from porttool.plugins import Registry

_log = logging.getLogger(__name__)

Choose = Callable[["Tensor", int], "Tensor"]
"""From logits [n, vocab_size] to the next tokens [n], both on the device; see `Runner.decode`."""


@dataclass(frozen=True)
class TimedNode:
    """One operation that an engine's own profiler saw, in microseconds.

    `run` counts the steps from 0; `name` begins with the canonical module that it belongs to.
    """

    name: str
    operator: str
    run: int
    begin: float
    duration: float


class Runner(Component):
    """A loaded engine. It owns a KV cache of `n_slots` rows of `max_len` tokens each.

    The caller says which slot a row lives in and how many of its tokens the cache holds, so rows
    may join, leave, or go back to an earlier length at any step without telling the runner.
    A runner never samples, never sees text and never stops by itself.
    """

    decodes_on_device: ClassVar[bool] = False
    """True when `decode` is implemented: several greedy tokens without leaving the device."""

    tokens_at_once: int = 16
    """Tokens of a row that `decode` gives at most, where it is implemented."""

    prompt_rows: int = 0
    """Rows of the prompt table that is loaded; `load_prompt_table` keeps it."""

    traces: ClassVar[bool] = False
    """True when `trace` is implemented."""

    hashes_weights: ClassVar[bool] = False
    """True when loading reads every file of `Engine.weight_files`, hashes what it reads and refuses
    one that is not the manifest's: nobody else hashes these then."""

    def __init__(self, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.engine = engine
        self.config = engine.manifest.config
        self.n_slots = engine.manifest.limits.max_batch_size
        self.max_len = engine.manifest.limits.max_len
        self._told_of_overflow = False

    @abstractmethod
    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; return logits [n, vocab_size] of each row's last real token.

        They are float32, of a float64 engine float64. With `all_positions` the result is
        [n, width, vocab_size]; rows past their length are undefined. The tensors of `step` are on
        the CPU; the result is on the runner's device.
        """

    def prefill(self, prompts: list[list[int]], slots: list[int]) -> Tensor:
        """Feed whole prompts to slots; return logits [n, vocab_size] of their last tokens.

        That some are NaN or infinite is told once, through this module's logger: what is chosen by
        them means nothing.
        """
        from porttool.nn import Step

        logits = self.step(Step.prefill(prompts, slots))
        if not self._told_of_overflow and not bool(logits.isfinite().all()):
            self._told_of_overflow = True
            _log.warning(
                "%s: logits are NaN or infinite, and what follows them means nothing; numbers "
                "beyond what %s holds are the likeliest cause: build in another type, and see "
                "what `porttool verify` says",
                self.engine.path, self.engine.manifest.dtype,
            )  # fmt: skip
        return logits

    @abstractmethod
    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy whole cache rows, as if at once: beams are re-ordered by it."""

    def decode(self, step: Step, n_tokens: int, choose: Choose | None = None) -> Tensor:
        """Feed one token a row, then what was chosen: [n, 1 to n_tokens] on the runner's device.

        `choose` gets the logits of each token and how many came before in this call; it may keep
        neither them nor the device waiting. None takes the likeliest. Rows run on past an end
        token, the caller cuts. A runner that comes back to the host for every token chooses one.
        """
        logits = self.step(step)
        tokens = logits.argmax(-1) if choose is None else choose(logits, 0)
        return tokens[:, None]

    def trace(self, step: Step) -> dict[str, Tensor]:
        """Feed tokens; return what went into and came out of every weight-bearing operation.

        Keys are `<canonical module>.in` and `.out`, for example `layers.0.attention.qkv.out`.
        Only called when `traces`.
        """
        raise EngineError(f"the {self.name} runner does not trace")

    def profiled(self, work: Callable[[], None]) -> list[TimedNode]:
        """Run `work`, which calls `step`; return what the engine's own profiler saw of it.

        An engine whose operations torch's profiler sees has nothing to add.
        """
        work()
        return []

    def layer_information(self) -> Mapping[str, str]:
        """Return what the engine's library says of the layers that it built, as its own JSON.

        By phase (`prefill`, `decode`), after `profiled`. Empty where a library says nothing.
        """
        return {}

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use rows of [n_rows, d_model] for token ids from vocab_size on; None takes it away."""
        raise EngineError(f"the {self.name} runner has no room for a prompt table")

    def require_room(self, table: Tensor | None) -> None:
        """Refuse a prompt table [n_rows, d_model] larger than the room reserved at build."""
        room = self.engine.manifest.limits.max_prompt_rows
        if table is not None and len(table) > room:
            raise UsageError(
                f"the prompt table has {len(table)} rows, the engine has room for {room}; "
                f"build it with --max-prompt-embedding-table-size {len(table)}"
            )

    @property
    def description(self) -> str:
        """Where and how it runs, in a few words: shown to the user and kept in reports."""
        return self.name

    def check(self, step: Step) -> None:
        """Refuse a step that the cache or the model cannot hold, with the numbers."""
        reach = int((step.starts + step.lengths).max())
        if reach > self.max_len:
            raise UsageError(
                f"a row would reach {reach} tokens, but the engine holds {self.max_len}; "
                "build it with larger --max-input-len or --max-output-len"
            )
        if int(step.slots.max()) >= self.n_slots:
            raise UsageError(
                f"slot {int(step.slots.max())} asked for, but the engine has {self.n_slots}; "
                "build it with a larger --max-batch-size"
            )


def load_runner(
    engine: Engine, registry: Registry, options: Mapping[str, Any] | None = None
) -> Runner:
    """Load an opened engine with the runner of its kind; an EngineError names the engine."""
    runner = registry.runners.get(engine.manifest.kind)
    try:
        return runner(engine, options)
    except EngineError as error:
        if str(engine.path) in str(error):
            raise
        raise EngineError(f"{engine.path}: {error}") from error


def load_verified(
    path: Path, registry: Registry, options: Mapping[str, Any] | None = None
) -> Runner:
    """Open an engine, check every file's hash and load it with the runner of its kind.

    A runner may hash weights as it reads them. A wrong file is reported as such, also where the
    loader stopped before its hash was known, and no runner is returned before every hash was right.
    """
    from porttool.engine import Engine

    opened = Engine.open(path, registry, verify=False)
    hashed = registry.runners.get(opened.manifest.kind).hashes_weights
    opened.verify(but=opened.weight_files() if hashed else ())
    try:
        return load_runner(opened, registry, options)
    except SourceError:  # of a file that cannot be read as what it should be
        if hashed:
            opened.verify()
        raise
