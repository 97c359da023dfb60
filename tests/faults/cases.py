"""The faults, one function a kind; each makes the fault, judges what is left, and runs again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.stage import Outcome
from faults.works import (
    Place,
    Work,
    digests,
    is_whole,
    judge_again,
    judge_left,
    last_line,
    partial_of,
    taken_for_whole,
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


SPOIL = """
import os, shutil, sys

def spoil(path):
    with open(path, "r+b") as file:
        file.seek(-4000, 2)
        file.write(b"0" * 4000)

path = sys.argv[1]
"""
CHANGES = {
    "rewritten in place": "spoil(path)",
    "rewritten, its time set back": (
        "s = os.stat(path); spoil(path); os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))"
    ),
    "cut to half": "os.truncate(path, os.path.getsize(path) // 2)",
    "replaced": "shutil.copy2(path, path + '.n'); spoil(path + '.n'); os.rename(path + '.n', path)",
    "removed": "os.remove(path)",
    "grown": "open(path, 'ab').write(b'0' * 4000)",
}


def change_source(place: Place, work: Work, at: int, how: str, name: str) -> Case:
    """Another process changes a file that the work reads, at an event of the output."""
    folder = place.source if work.reads == "source" else place.checkpoint
    whole = place.undisturbed(work)
    kept = folder.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    shutil.copytree(kept, folder)
    try:
        output = fresh(place, work)
        action = [sys.executable, "-c", SPOIL + CHANGES[how], str(folder / name)]
        outcome = place.stage.run(
            place.arguments(work, output), watch=output.parent, at=at, action=action
        )
        case = Case(f"{name} {how}", work.name, f"event {at}", ended(outcome))
        case.findings += judge_changed(place, work, output, outcome, whole)
        if not output.exists():
            again = place.stage.run(place.arguments(work, output))
            case.again = ended(again)
            case.findings += judge_new(place, work, output, again)
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    return case


def judge_changed(
    place: Place, work: Work, output: Path, outcome: Outcome, whole: dict[str, str]
) -> list[str]:
    """A work whose source changed is refused, or had read it all before."""
    if outcome.crashed:
        return [f"ended with {outcome.status}: {last_line(outcome.said)}"]
    if outcome.status == 0:
        same = weights_of(digests(output)) == weights_of(whole)
        refused = not same and not taken_for_whole(place, work, output)
        return [] if same or refused else ["what was read is neither the old source nor refused"]
    wrong = ["an output is there although it was refused"] if output.exists() else []
    return wrong + taken_for_whole(place, work, output)


def judge_new(place: Place, work: Work, output: Path, again: Outcome) -> list[str]:
    """After a change the second run refuses, or gives what the changed source gives."""
    if again.status != 0:
        return [] if again.refused else [f"the second run ended with {again.status}"]
    other = output.with_name("fresh")
    outcome = place.stage.run(place.arguments(work, other))
    same = outcome.status == 0 and digests(other) == digests(output)
    return [] if same else ["the second run's result is not what the changed source gives"]


def weights_of(found: dict[str, str]) -> dict[str, str]:
    """Return the hashes of all but manifests, which hold their sources' times."""
    return {name: h for name, h in found.items() if name not in ("checkpoint.json", "engine.json")}


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


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes. Raises PermissionError where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise PermissionError("mounting is not allowed here") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


FILL = """
import sys

with open(sys.argv[1], "wb", 0) as file:
    try:
        while file.write(b"0" * 4096):
            pass
    except OSError:
        pass
"""


def full_disk(place: Place, work: Work, at: int) -> Case:
    """Another process fills the output's disk at an event; later there is room again."""
    with small_disk(place.folder / "disk", 64 << 20) as disk:
        output, filler = disk / "out", disk / "filler"
        outcome = place.stage.run(
            place.arguments(work, output), watch=disk, at=at,
            action=[sys.executable, "-c", FILL, str(filler)],
        )  # fmt: skip
        case = Case("full disk", work.name, f"event {at}", ended(outcome))
        if outcome.crashed:
            case.findings.append(f"ended with {outcome.status}: {last_line(outcome.said)}")
        case.findings += judge_left(place, work, output)
        filler.unlink(missing_ok=True)
        return run_again(place, work, output, case)


def too_small_disk(place: Place, work: Work) -> Case:
    """A disk that has no room from the beginning."""
    with small_disk(place.folder / "disk", 1 << 20) as disk:
        outcome = place.stage.run(place.arguments(work, disk / "out"))
        case = Case("disk too small", work.name, "from the beginning", ended(outcome))
        if not outcome.refused:
            case.findings.append("not refused")
        case.findings += judge_left(place, work, disk / "out")
        return case


def read_only(place: Place, work: Work) -> Case:
    """An output on a read-only file system, which is writable the next time."""
    with small_disk(place.folder / "disk", 64 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        output = disk / "out"
        outcome = place.stage.run(place.arguments(work, output))
        case = Case("read-only output", work.name, "from the beginning", ended(outcome))
        if not outcome.refused:
            case.findings.append("not refused")
        case.findings += judge_left(place, work, output)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return run_again(place, work, output, case)


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
