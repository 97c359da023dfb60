"""Kills, doubles and flipped bits; each makes the fault, judges what is left, and runs again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.stage import Outcome
from faults.works import (
    Place,
    Work,
    is_whole,
    judge_again,
    judge_left,
    last_line,
    partial_of,
)


@dataclass
class Case:
    """What one fault did. `findings` is empty when porttool did what it should."""

    fault: str
    work: str
    where: str
    then: str = ""
    again: str = ""
    findings: list[str] = field(default_factory=list)


def ended(outcome: Outcome) -> str:
    """Say how a command ended."""
    if outcome.status == 0:
        return "completed"
    if outcome.status == -signal.SIGKILL:
        return "killed"
    kind = "refused" if outcome.refused else f"ended with {outcome.status}"
    return f"{kind}: {last_line(outcome.said)}"


def fresh(place: Place, work: Work) -> Path:
    """Return an output in an empty folder."""
    folder = place.folder / "outputs" / work.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder / "out"


def run_again(place: Place, work: Work, output: Path, case: Case) -> Case:
    """Run the same command once more, where it has not completed, and judge its result."""
    if output.exists():
        case.again = "not needed"
        return case
    outcome = place.stage.run(place.arguments(work, output))
    case.again = ended(outcome)
    case.findings += judge_again(place, work, output, outcome)
    return case


def kill_at_event(place: Place, work: Work, at: int) -> Case:
    """SIGKILL before the at-th thing that is done to a file of the output."""
    output = fresh(place, work)
    outcome = place.stage.run(place.arguments(work, output), watch=output.parent, at=at)
    case = Case("kill -9 at a file event", work.name, f"event {at}", ended(outcome))
    case.findings += judge_left(place, work, output)
    return run_again(place, work, output, case)


def kill_at_moment(place: Place, work: Work, seconds: float) -> Case:
    """SIGKILL to the command line itself, so many seconds after it was started."""
    output = fresh(place, work)
    child = subprocess.Popen(
        [Path(sys.executable).with_name("porttool"), *place.arguments(work, output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
    status = child.wait()
    case = Case("kill -9 at a moment", work.name, f"{seconds:.2f} s")
    case.then = f"{ended(Outcome(status, ''))}, {state(output)}"
    case.findings += judge_left(place, work, output)
    return run_again(place, work, output, case)


def state(output: Path) -> str:
    """Say how far a command had come."""
    partial = partial_of(output)
    if output.exists():
        return "whole"
    if not partial.exists():
        return "nothing written"
    return f"{sum(f.stat().st_size for f in partial.rglob('*') if f.is_file()) / 1e6:.0f} MB there"


def two_at_once(place: Place, work: Work, delay: float) -> Case:
    """Two of the same command into one output, the second a little later."""
    output = fresh(place, work)
    first = place.stage.start(place.arguments(work, output))
    time.sleep(delay)
    second = place.stage.start(place.arguments(work, output))
    outcomes = [first.wait(), second.wait()]
    case = Case("two at once", work.name, f"{delay:.3f} s apart")
    case.then = "; ".join(ended(o) for o in outcomes)
    if sorted(o.status == 0 for o in outcomes) != [False, True]:
        case.findings.append("not exactly one of the two has completed")
    if any(o.status != 0 and not o.refused for o in outcomes):
        case.findings.append("one of the two has crashed")
    completed = Outcome(0, "")
    case.findings += judge_again(place, work, output, completed)
    return case


def flip_bit(place: Place, work: Work, file: Path, rng: Random) -> Case:
    """One bit of one file of a whole output: every reader must refuse it, naming the file.

    The file is put back afterwards. Files that are shared by hard links are copied first.
    """
    output = next(p for p in file.parents if p.name == "out")
    data = file.read_bytes()
    at = rng.randrange(8 * len(data))
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    replace(file, bytes(flipped))
    case = Case("one flipped bit", work.name, f"bit {at} of {file.relative_to(output)}")
    for reader in work.readers:
        outcome = place.stage.run(place.fill(reader, output))
        case.then = ended(outcome)
        if not outcome.refused:
            case.findings.append(f"{reader}: {ended(outcome)}")
        elif file.name not in outcome.said.replace("\n", ""):
            case.findings.append(f"{reader}: does not name the file: {last_line(outcome.said)}")
    replace(file, data)
    return case


def replace(file: Path, data: bytes) -> None:
    """Write a file anew, under another inode."""
    file.unlink()
    file.write_bytes(data)
    os.sync()


def all_files(place: Place, work: Work) -> list[Path]:
    """Make a work's output and return its files."""
    output = fresh(place, work)
    outcome = place.stage.run(place.arguments(work, output))
    assert outcome.status == 0, outcome.said
    assert is_whole(output, place.undisturbed(work))
    return sorted(f for f in output.rglob("*") if f.is_file())
