"""A few damaged inputs of every container, and proof that the judge sees what it looks for."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fuzzing import judge as judging
from fuzzing.containers import CONTAINERS, Damage
from fuzzing.judge import Judge, Watch
from porttool.errors import SourceError
from scripts import imported

SCRIPT = Path(__file__).parent.parent / "bench" / "fuzz.py"
RESULTS = SCRIPT.parent / "results" / "fuzz.json"


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_inputs(tmp_path, watch, name):
    judge = Judge(CONTAINERS[name], tmp_path, watch)
    verdicts = {index: judge.judge(2, index) for index in range(30)}
    assert {i: v for i, v in verdicts.items() if v.outcome == "finding"} == {}
    assert sum(v.outcome == "refused" for v in verdicts.values()) >= 8
    assert len({v.damage for v in verdicts.values()}) >= 15


@pytest.mark.parametrize("name", CONTAINERS)
def test_inputs_are_the_same_everywhere(tmp_path, name):
    """Else the seed and the index of a finding would not bring it back."""
    written = []
    for folder in (tmp_path / "one", tmp_path / "a longer name"):
        folder.mkdir()
        CONTAINERS[name].write(folder)
        written.append({f.relative_to(folder): f.read_bytes()
                        for f in folder.rglob("*") if f.is_file()})  # fmt: skip
    assert written[0] == written[1]


def test_the_recorded_run():
    recorded = json.loads(RESULTS.read_text())["containers"]
    assert recorded.keys() == CONTAINERS.keys()
    for name, found in recorded.items():
        assert found["inputs"] >= 2000, name
        assert found["findings"] == [], name
        assert found["finding"] == 0, name
        assert found["largest"]["bytes"] < judging.MAX_BYTES, name
        assert found["slowest"]["seconds"] < judging.MAX_SECONDS, name


def test_the_table_of_the_docs():
    recorded = json.loads(RESULTS.read_text())["containers"]
    text = (SCRIPT.parent.parent / "docs" / "reliability.md").read_text()
    assert driver().table(recorded) in text


def verdict(tmp_path, watch, read, *, checked=False, sealed=False):
    """What the judge says of a reader that does this with a damaged token file."""
    whole = CONTAINERS["csv_tokens"]

    def wrapped(folder, output):
        if b"damaged" in (folder / "tokens.csv").read_bytes():
            return read(folder, output)
        return whole.read(folder, output)

    def damage(rng, folder):
        (folder / "tokens.csv").write_bytes(b"damaged")
        return Damage("", sealed)

    container = replace(whole, damage=damage, read=wrapped, checked=checked)
    found = Judge(container, tmp_path, watch).judge(0, 0)
    return found.outcome, found.detail


def refuse(text):
    def read(folder, output):
        raise SourceError(text)

    return read


def doing(action):
    """A reader that does something before it refuses properly."""

    def read(folder, output):
        action(folder, output)
        raise SourceError("tokens.csv: damaged")

    return read


def keep_busy(folder, output):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        pass


BAD = {
    "another exception": (lambda f, o: {}["x"], "KeyError"),
    "no name": (refuse("something is wrong"), "names no file"),
    "a book": (refuse("tokens.csv" + "x" * 20_000), "a message of"),
    "a hang": (keep_busy, "Hang"),
    "memory": (doing(lambda f, o: bytearray(b"x" * 400_000_000)), "MB of memory"),
    "a file outside": (doing(lambda f, o: (f.parent / "evil").write_text("x")), "open"),
    "a file removed": (doing(lambda f, o: (f / "tokens.csv").unlink()), "os.remove"),
    "a file read": (doing(lambda f, o: (f.parent / "secret").read_text()), "secret"),
    "a program": (doing(lambda f, o: os.system("true")), "os.system"),
    "another program": (doing(lambda f, o: subprocess.run(["true"])), "subprocess.Popen"),
    "a pickle": (doing(lambda f, o: pickle.loads(pickle.dumps(Path()))), "pickle.find_class"),
    "a line": (doing(lambda f, o: sys.stdout.write("hello")), "printed 'hello"),
    "a result": (doing(lambda f, o: (o / "made").mkdir()), "left behind"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_judge_sees(tmp_path, watch, monkeypatch, name):
    monkeypatch.setattr(judging, "MAX_SECONDS", 0.5)
    read, said = BAD[name]
    outcome, detail = verdict(tmp_path, watch, read)
    assert outcome == "finding"
    assert said in detail


def test_a_call_home_is_seen(tmp_path, watch):
    def call(folder, output):
        with socket.socket() as caller:
            caller.settimeout(0.1)
            caller.connect_ex(("127.0.0.1", 9))

    outcome, detail = verdict(tmp_path, watch, doing(call))
    assert outcome == "finding"
    assert "socket.connect" in detail


def test_changed_values_are_a_matter_of_checksums(tmp_path, watch):
    def other(folder, output):
        return {"tokens": "others"}

    outcomes = [
        verdict(tmp_path / str(i), watch, other, checked=checked, sealed=sealed)[0]
        for i, (checked, sealed) in enumerate([(False, False), (True, True), (True, False)])
    ]
    assert outcomes == ["changed", "changed", "finding"]
    whole = CONTAINERS["csv_tokens"].read
    CONTAINERS["csv_tokens"].write(tmp_path)
    values = whole(tmp_path, tmp_path)
    assert verdict(tmp_path / "x", watch, lambda f, o: values)[0] == "equal"


WORKER = """
import json, os, signal, sys, time
for index in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
    print(json.dumps({"begun": index}), flush=True)
    if index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == 2:
        os._exit(0)
    if index == 3:
        print("last words", file=sys.stderr, flush=True)
        time.sleep(60)
    print(json.dumps({"index": index, "outcome": "equal"}), flush=True)
"""


def driver():
    return imported("bench/fuzz.py")


def test_the_driver_survives_its_workers():
    """Crashes and what no alarm can interrupt: found, with the index, and the rest is judged."""

    def command(first, count):
        return [sys.executable, "-c", WORKER, str(first), str(count)]

    found = list(driver().supervised(command, 0, 5, patience=1.5))
    assert [v["index"] for v in found] == list(range(5))
    assert [v["outcome"] for v in found] == ["equal", *["finding"] * 3, "equal"]
    assert ["(-11)" in found[1]["detail"], "(0)" in found[2]["detail"]] == [True, True]
    assert "(-9): last words" in found[3]["detail"]


def test_a_worker_that_cannot_start_is_no_verdict():
    with pytest.raises(SystemExit, match="No module named 'gone'"):
        list(driver().supervised(lambda *_: [sys.executable, "-c", "import gone"], 0, 5))
