"""How long work tells of itself, without knowing who listens; sizes as people read them."""

from __future__ import annotations


class Progress:
    """Receives the steps of long work. This one says nothing; the console has one that does."""

    def start(self, label: str, total: int, *, unit: str = "B") -> None:
        """Begin a piece of work of so many bytes, or of another unit that is named."""

    def advance(self, amount: int) -> None:
        """Report what was done since the last call."""

    def finish(self) -> None:
        """End the piece of work."""

    def note(self, text: str) -> None:
        """Say one thing that the user should see, once."""


SILENT = Progress()


def format_bytes(n: float) -> str:
    """Write a number of bytes in the decimal unit that fits, as in "64 bytes" or "3.25 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} bytes"


def format_tera(number: float) -> str:
    """Return a rate in units of 1e12, with two digits or more: a CPU's halves are a thousandth."""
    return f"{number / 1e12:.0f}" if number >= 1e14 else f"{number / 1e12:.2g}"
