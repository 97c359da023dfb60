"""How long work tells of itself, without knowing who listens."""

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
