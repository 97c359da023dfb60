"""Puts faults in the way of conversions and builds, and judges what they leave behind.

    python bench/faults.py --seed 1 --output bench/results/faults.json
    python bench/faults.py --only "full disk" --output bench/results/faults.json    one kind again
    python bench/faults.py --tables bench/results/faults.json

The faults are in tests/faults. Those that depend on a moment are drawn from the seed; kills at
file events are made at every one of them. Kills at random moments go to the command line itself
and a model of 1.2 GB, the others to a small trained one in many shards. Full and read-only disks
need the right to mount a tmpfs. Exits with 1 when there is a finding. `--tables` prints the tables
of docs/reliability.md from a result.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faults.cases import (
    Case,
    all_files,
    flip_bit,
    fresh,
    kill_at_event,
    kill_at_moment,
    two_at_once,
)
from faults.sources import with_pickled_weights, write_large
from faults.stage import SHARD_BYTES, Stage
from faults.surroundings import CHANGES, change_source, full_disk, read_only, too_small_disk
from faults.works import DEMO, WORKS, Place, Work
from porttool.shards import MAX_SHARD_BYTES

LARGE = ("convert", "build torch", "build onnx")


def kills_at_events(place: Place, rng: Random) -> Iterator[Case]:
    """Every event of every work."""
    for work in WORKS.values():
        place.undisturbed(work)
        for at in range(1, place.events[work.name] + 1):
            yield kill_at_event(place, work, at)


def kills_at_moments(place: Place, rng: Random) -> Iterator[Case]:
    """Moments of each work, spread over an undisturbed run's time, until twenty have hit it."""
    for name in LARGE:
        work = WORKS[name]
        place.undisturbed(work)
        seconds = min(undisturbed_seconds(place, work) for _ in range(2))
        n_killed = 0
        while n_killed < 20:
            case = kill_at_moment(place, work, rng.uniform(0, seconds))
            case.where += f" of {seconds:.2f} s"
            n_killed += case.then.startswith("killed")
            yield case


def undisturbed_seconds(place: Place, work: Work) -> float:
    """How long the command line takes when it is left alone."""
    began = time.monotonic()
    command = [
        Path(sys.executable).with_name("porttool"),
        *place.arguments(work, fresh(place, work)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began


def changes(place: Place, rng: Random) -> Iterator[Case]:
    """Every change of a weight file, and one of a tokenizer's, at three events of every work."""
    for work in WORKS.values():
        place.undisturbed(work)
        folder = place.source if work.reads == "source" else place.checkpoint
        names = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
        cases = [(how, rng.choice(names)) for how in CHANGES]
        tokenizer = "tokenizer.json" if work.reads == "source" else "tokenizer/tokenizer.json"
        for how, name in [*cases, ("rewritten in place", tokenizer)]:
            for _ in range(3):
                at = rng.randint(1, place.events[work.name])
                yield change_source(place, work, at, how, name)


def changes_of_pickles(place: Place, rng: Random) -> Iterator[Case]:
    """The same where the source is a pickled file."""
    work = WORKS["convert"]
    place.undisturbed(work)
    for how in CHANGES:
        for _ in range(5):
            at = rng.randint(1, place.events[work.name])
            yield change_source(place, work, at, how, "pytorch_model.bin")


def full_disks(place: Place, rng: Random) -> Iterator[Case]:
    """A disk that fills up at five events of every work, and one that never had room."""
    for work in WORKS.values():
        place.undisturbed(work)
        yield too_small_disk(place, work)
        for _ in range(5):
            yield full_disk(place, work, rng.randint(1, place.events[work.name]))


def read_only_disks(place: Place, rng: Random) -> Iterator[Case]:
    """A read-only disk for every work."""
    for work in WORKS.values():
        yield read_only(place, work)


def doubles(place: Place, rng: Random) -> Iterator[Case]:
    """Ten pairs of every work, up to half a second apart."""
    for work in WORKS.values():
        for _ in range(10):
            yield two_at_once(place, work, rng.uniform(0, 0.5))


def flips(place: Place, rng: Random) -> Iterator[Case]:
    """Three bits of every file of every work's output."""
    for work in WORKS.values():
        for file in all_files(place, work):
            for _ in range(3):
                yield flip_bit(place, work, file, rng)


KINDS = {
    "kill -9 at a file event": (kills_at_events, "demo"),
    "kill -9 at a moment": (kills_at_moments, "large"),
    "changed source": (changes, "demo"),
    "changed pickle": (changes_of_pickles, "pickled"),
    "full disk": (full_disks, "demo"),
    "read-only output": (read_only_disks, "demo"),
    "two at once": (doubles, "demo"),
    "one flipped bit": (flips, "demo"),
}


def make_place(folder: Path, stage: Stage, kind: str) -> Place:
    """Return a place with a source of a kind."""
    if kind == "large":
        return Place(folder, stage, write_large(folder / "large"), prove_readers=False)
    source = DEMO if kind == "demo" else with_pickled_weights(folder / "pickled")
    return Place(folder, stage, source)


def run(kinds: list[str], seed: int) -> dict[str, list[Case]]:
    """Make every fault of the kinds; print what is found."""
    found: dict[str, list[Case]] = {}
    for kind in kinds:
        make_cases, source = KINDS[kind]
        size = MAX_SHARD_BYTES if source == "large" else SHARD_BYTES
        with tempfile.TemporaryDirectory() as name, Stage(Path(name) / "logs", size) as stage:
            place = make_place(Path(name) / source, stage, source)
            found[kind] = []
            for case in make_cases(place, Random(f"{kind} {seed}")):
                found[kind].append(without(case, name))
                if case.findings:
                    print(json.dumps(asdict(case), indent=1), flush=True)
        print(
            f"{kind}: {len(found[kind])} cases, {count_findings(found[kind])} findings", flush=True
        )
    return found


def without(case: Case, folder: str) -> Case:
    """Return a case without this run's temporary folder in its texts."""
    values = json.loads(json.dumps(asdict(case)).replace(folder, "."))
    return Case(**values)


def count_findings(cases: list[Case]) -> int:
    """How many cases have findings."""
    return sum(bool(case.findings) for case in cases)


def kind_of_end(text: str) -> str:
    """Shorten how a command ended to one word."""
    return next((w for w in ("killed", "completed", "refused", "ended") if text.startswith(w)), "")


def tables(record: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of docs/reliability.md."""
    lines = [
        "| fault | work | cases | first run: killed / refused / completed "
        "| again: completed / refused | findings |",
        "|---|---|---|---|---|---|",
    ]
    for kind, values in record.items():
        cases = [Case(**value) for value in values]
        for work in dict.fromkeys(case.work for case in cases):
            mine = [case for case in cases if case.work == work]
            lines.append(
                f"| {kind} | {work} | {len(mine)} | {shares([c.then for c in mine], 'killed')} | "
                f"{shares([c.again for c in mine])} | {count_findings(mine)} |"
            )
    return "\n".join(lines)


def shares(ends: list[str], *before: str) -> str:
    """Count how commands ended."""
    words = [*before, "refused", "completed"] if before else ["completed", "refused"]
    return " / ".join(str(sum(kind_of_end(e) == word for e in ends)) for word in words)


def write(output: Path, cases: dict[str, list[dict[str, Any]]], seed: int, seconds: float) -> None:
    """Write the cases; of an older result the kinds that were not made again are kept."""
    older = json.loads(output.read_text())["kinds"] if output.exists() else {}
    facts = {
        "seed": seed, "python": platform.python_version(), "torch": version("torch"),
        "system": platform.system(), "minutes": round(seconds / 60, 1),
    }  # fmt: skip
    kinds = older | {kind: {**facts, "cases": made} for kind, made in cases.items()}
    kinds = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    output.write_text(json.dumps({"script": "bench/faults.py", "kinds": kinds}, indent=1) + "\n")


def main() -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(KINDS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tables", type=Path, help="print the tables of a result")
    asked = parser.parse_args()
    if asked.tables:
        kinds = json.loads(asked.tables.read_text())["kinds"]
        print(tables({kind: found["cases"] for kind, found in kinds.items()}))
        return 0
    began = time.monotonic()
    found = run(asked.only or list(KINDS), asked.seed)
    cases = {kind: [asdict(case) for case in found[kind]] for kind in found}
    if asked.output:
        write(asked.output, cases, asked.seed, time.monotonic() - began)
    print(tables(cases))
    return int(any(count_findings(group) for group in found.values()))


if __name__ == "__main__":
    sys.exit(main())
