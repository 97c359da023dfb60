"""Sources that change while they are read, and disks that are full or may not be written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.cases import Case, ended, fresh, run_again
from faults.stage import Outcome
from faults.works import Place, Work, digests, judge_left, last_line, taken_for_whole

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
