"""A few of each fault of bench/faults.py: nothing that looks whole may be left that is not."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from faults.cases import (
    Case,
    all_files,
    flip_bit,
    fresh,
    kill_at_event,
    two_at_once,
)
from faults.stage import Stage
from faults.surroundings import change_source, full_disk, read_only, too_small_disk
from faults.works import WORKS, Place, digests, judge_left, partial_of, taken_for_whole
from porttool.checkpoint import Checkpoint
from porttool.engine import Engine
from porttool.errors import CheckpointError
from scripts import imported

CONVERT, TORCH = WORKS["convert"], WORKS["build torch"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with Stage(folder / "logs") as stage:
        yield Place(folder, stage, prove_readers=False)


def events(place, work):
    place.undisturbed(work)
    return place.events[work.name]


@pytest.mark.parametrize("name", ["convert", "build torch", "build onnx"])
def test_killed_in_the_middle_and_while_it_finishes(place, name):
    work = WORKS[name]
    n_events = events(place, work)
    middle = Random(name).randint(5, n_events - 12)
    for at in (middle, n_events - 2, n_events) if work is CONVERT else (middle, n_events - 2):
        case = kill_at_event(place, work, at)
        assert case.then == "killed"
        assert not case.findings


@pytest.mark.parametrize("before_the_end", [14, 13, 12])
def test_killed_while_it_replaces_an_older_one(place, before_the_end):
    """Around the two renames there is the old output, the new one or none; none is half of each."""
    place.undisturbed(CONVERT)
    output = fresh(place, CONVERT)
    arguments = [*place.arguments(CONVERT, output), "--force"]
    old = [*arguments, "--dtype", "float16"]
    assert place.stage.run(old).status == 0
    n_events = place.stage.run(arguments, watch=output.parent).events
    assert place.stage.run(old).status == 0
    killed = place.stage.run(arguments, watch=output.parent, at=n_events - before_the_end)
    assert killed.status == -signal.SIGKILL
    if output.exists():
        Checkpoint.open(output)
    else:
        assert taken_for_whole(place, CONVERT, output) == []
    assert place.stage.run(arguments).status == 0
    assert digests(output) == place.undisturbed(CONVERT)
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_the_command_line_killed(place, share):
    output = fresh(place, CONVERT)
    command = [Path(sys.executable).with_name("porttool"), *place.arguments(CONVERT, output)]
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    took, whole = time.monotonic() - begin, digests(output)
    shutil.rmtree(output)
    with contextlib.suppress(subprocess.TimeoutExpired):  # which kills it
        subprocess.run(command, check=True, capture_output=True, timeout=share * took)
    if not output.exists():
        assert taken_for_whole(place, CONVERT, output) == []
        subprocess.run(command, check=True, capture_output=True)
    assert digests(output) == whole


@pytest.mark.parametrize("name", WORKS)
def test_one_flipped_bit_in_every_file(place, name):
    """Opened as every command opens it; two of the files also through the commands."""
    work = WORKS[name]
    files = all_files(place, work)
    opens = Checkpoint.open if work is CONVERT else Engine.open
    output = next(p for p in files[0].parents if p.name == "out")
    opens(output)
    rng = Random(name)
    for file in files:
        data = file.read_bytes()
        at = rng.randrange(len(data))
        file.unlink()
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=file.name):
            opens(output)
        file.write_bytes(data)
    opens(output)
    for file in (files[0], rng.choice(files[1:])):
        assert not flip_bit(place, work, file, rng).findings


@pytest.mark.parametrize("work", [CONVERT, TORCH], ids=lambda work: work.name)
def test_two_at_once(place, work):
    case = two_at_once(place, work, 0.05)
    assert not case.findings
    assert "refused: error: " in case.then


@pytest.mark.parametrize("how", ["rewritten, its time set back", "cut to half", "replaced"])
def test_a_source_that_changes_while_it_is_read(place, how):
    """When the second shard begins; the first one has been read already."""
    events(place, CONVERT)
    case = change_source(place, CONVERT, 12, how, "model.safetensors")
    assert not case.findings
    assert case.then.startswith("refused")
    assert "model.safetensors" in case.then or "changed while it was read" in case.then


@pytest.mark.parametrize("name", ["build torch", "build torch, shared files"])
def test_a_checkpoint_that_changes_while_it_is_built(place, name):
    work = WORKS[name]
    events(place, work)
    file = "model-00008-of-00008.safetensors"
    case = change_source(place, work, 6, "rewritten, its time set back", file)
    assert not case.findings
    assert case.then.startswith("refused")
    assert file in case.then


def test_disks_that_are_full_or_read_only(place):
    try:
        cases = [
            full_disk(place, CONVERT, events(place, CONVERT) // 2),
            too_small_disk(place, CONVERT),
            read_only(place, TORCH),
        ]
    except PermissionError:
        pytest.skip("mounting is not allowed here; tests/core/test_folder.py has a stand-in")
    assert [case.findings for case in cases] == [[], [], []]
    said = [case.then.replace("\n", " ") for case in cases]
    assert "the disk is full; the complete files are kept in" in said[0]
    assert "MB are needed" in said[1] or "GB are needed" in said[1]
    assert "Read-only file system" in said[2]
    assert (cases[0].again, cases[2].again) == ("completed", "completed")


def test_the_judge_sees_what_is_not_whole(place):
    files = all_files(place, CONVERT)
    output = files[0].parent
    assert len(taken_for_whole(place, CONVERT, output)) == len(CONVERT.readers)
    shutil.copytree(output, partial_of(output))
    assert judge_left(place, CONVERT, output) == []
    (output / "tokenizer" / "merges.txt").unlink()
    assert judge_left(place, CONVERT, output) == [
        "out is there and is not what an undisturbed run makes"
    ]
    assert Case("", "", "").findings == []


def test_the_page_shows_what_was_recorded():
    root = Path(__file__).parents[1]
    bench = imported("bench/faults.py")
    recorded = json.loads((root / "bench" / "results" / "faults.json").read_bytes())["kinds"]
    cases = {kind: found["cases"] for kind, found in recorded.items()}
    assert bench.tables(cases) in (root / "docs" / "reliability.md").read_text()
    assert list(cases) == list(bench.KINDS)
    assert [c for kind in cases.values() for c in kind if c["findings"]] == []
    for work in bench.LARGE:
        mine = [c for c in cases["kill -9 at a moment"] if c["work"] == work]
        assert len(mine) >= 20
        assert sum(c["then"].startswith("killed") for c in mine) > 10
