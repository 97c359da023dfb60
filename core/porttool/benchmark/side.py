"""What takes part in a benchmark: something that continues prompts, and tells when tokens came."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from porttool.errors import PorttoolError

Prompts = Sequence[Sequence[int]]


class SideFailed(PorttoolError):
    """A side cannot run here, or not in this cell; the others go on."""


@dataclass(frozen=True)
class Timing:
    """One run, in seconds: to the first token of every row, each later one, and all of it."""

    first: float
    later: tuple[float, ...]
    total: float


class Side(ABC):
    """An engine or a peer. `load` comes first; everything else may be asked for after it."""

    name: str
    through_torch: bool
    """True if torch allocates the device memory that it uses."""
    tokens_a_sample: int = 1
    shares_with: str | None = None
    """Another side, loaded before, whose weights this one runs too: it holds them as well."""
    random_weights: bool = False
    bytes_on_disk: int = 0

    @abstractmethod
    def load(self) -> None:
        """Get ready to run; SideFailed if that is impossible here."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What runs, where and in which type."""

    @property
    @abstractmethod
    def device(self) -> str:
        """`cpu` or `cuda`."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type of weights and cache."""

    def prepare(self) -> None:
        """Forget what was kept of another shape; called before the first run of a cell."""
        return

    @abstractmethod
    def run(self, prompts: Prompts, output_len: int) -> Timing:
        """Continue all prompts at once, greedily, by exactly `output_len` tokens."""
