"""Hardware counters of kernels, read from the CSV that ncu writes, and written as plain numbers.

ncu's file begins with messages. Then a header, and a line for each counter of each launch; a line
of advice has no counter. Numbers have commas between thousands.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from porttool.errors import EngineError

PHASE = re.compile(r"porttool\.([\w-]+)")
MISSING = frozenset({"", "n/a", "nan", "inf"})
"""What stands for a number that could not be measured."""


@dataclass(frozen=True)
class Counter:
    """One counter of one launch of a kernel. `phase` is empty where ncu was not told of ranges."""

    launch: int
    kernel: str
    phase: str
    block: str
    grid: str
    section: str
    name: str
    unit: str
    value: float


@dataclass(frozen=True)
class KernelCounters:
    """A kernel of a phase: how often it was launched, and the mean of every counter by name."""

    phase: str
    kernel: str
    launches: int
    means: dict[str, float]


def read_counters(path: Path) -> list[Counter]:
    """Return the counters of ncu's CSV; EngineError with its own messages if there are none."""
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows = [] if header is None else list(csv.DictReader(lines[header:], restval=""))
    found = [made for row in rows if (made := read_row(row)) is not None]
    if not found:
        said = "; ".join(line for line in lines[:header] if line.startswith("==")) or "nothing"
        raise EngineError(
            f"{path}: ncu wrote no counters. It said: {said}. It needs a GPU whose counters this "
            "user may read, and a run that launches kernels"
        )
    return found


def read_row(row: dict[str, str]) -> Counter | None:
    """Return a line's counter; None for advice and for what could not be measured."""
    value = row["Metric Value"].replace(",", "").lower()
    if not row["Metric Name"] or value in MISSING:
        return None
    ranges = [text for name, text in row.items() if name and "Push/Pop_Range" in name]
    phase = PHASE.search(" ".join(ranges))
    return Counter(
        int(row["ID"]), row["Kernel Name"], phase.group(1) if phase else "", row["Block Size"],
        row["Grid Size"], row["Section Name"], row["Metric Name"], row["Metric Unit"],
        float(value),
    )  # fmt: skip


def write_counters(counters: Iterable[Counter], path: Path) -> None:
    """Write the counters as CSV, a line each."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Counter))
        rows.writerows(map(astuple, counters))


def by_kernel(counters: Sequence[Counter]) -> list[KernelCounters]:
    """Return means over a kernel's launches, most launched first."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    launches: dict[tuple[str, str], set[int]] = defaultdict(set)
    for counter in counters:
        key = counter.phase, counter.kernel
        values[key][counter.name].append(counter.value)
        launches[key].add(counter.launch)
    found = [
        KernelCounters(*key, len(launches[key]), {n: sum(v) / len(v) for n, v in named.items()})
        for key, named in values.items()
    ]
    return sorted(found, key=lambda kernel: -kernel.launches)
