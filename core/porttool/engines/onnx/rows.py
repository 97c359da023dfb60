"""Which row of the cache holds which slot, kept so that a step's rows lie side by side.

A graph has no input for slots: it sees a run of cache rows as its batch. A step's slots nearly
always lie together already; where one has left from the middle, a row is moved, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrangement:
    """Where a step's rows lie: the first, and for each row from there on, its place in the step.

    `moves` are the cache rows to copy before, as if at once: (from, to).
    """

    first: int
    order: list[int]
    moves: list[tuple[int, int]]


class RowMap:
    """A permutation of cache rows, one for each slot."""

    def __init__(self, n_slots: int) -> None:
        self.row_of = list(range(n_slots))

    def arrange(self, slots: Sequence[int]) -> Arrangement:
        """Bring the slots' rows together; the caller carries out the moves."""
        rows = [self.row_of[slot] for slot in slots]
        moves: list[tuple[int, int]] = []
        if max(rows) - min(rows) + 1 != len(rows):
            moves = self._gather(rows)
            rows = [self.row_of[slot] for slot in slots]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return Arrangement(min(rows), order, moves)

    def _gather(self, rows: list[int]) -> list[tuple[int, int]]:
        """Exchange rows so that the given ones come first; return the copies it takes."""
        n = len(rows)
        slot_at = {row: slot for slot, row in enumerate(self.row_of)}
        outside = [row for row in rows if row >= n]
        free = [row for row in range(n) if row not in rows]
        moves = []
        for far, near in zip(outside, free, strict=True):
            moves += [(far, near), (near, far)]
            self.row_of[slot_at[far]], self.row_of[slot_at[near]] = near, far
        return moves
