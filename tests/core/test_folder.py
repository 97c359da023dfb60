from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from porttool import folder as folder_module
from porttool import standing
from porttool.errors import CheckpointError, PorttoolError, UsageError, intact
from porttool.folder import (
    FileRecord,
    hash_file,
    pending_folder,
    verify_files,
)
from porttool.sources.places import SourceFiles
from porttool.standing import occupied, require_free, require_space

MANIFEST = "manifest.json"


def fill(target, fingerprint="work", *, replace=False, names=("one", "two")):
    with pending_folder(target, fingerprint, manifest=MANIFEST, replace=replace) as folder:
        for name in names:
            if name not in folder.files:
                folder.add_bytes(name, name.encode())
        folder.finish("manifest.json", "{}")


def test_it_appears_whole(tmp_path):
    with pending_folder(tmp_path / "out", "work", manifest=MANIFEST) as folder:
        folder.add_bytes("sub/one", b"1")
        assert not (tmp_path / "out").exists()
        folder.finish("manifest.json", "{}")
    names = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"one", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_run_leaves_no_target_and_the_next_goes_on(tmp_path):
    with (
        pytest.raises(RuntimeError),
        pending_folder(tmp_path / "o", "w", manifest=MANIFEST) as folder,
    ):
        folder.add_bytes("one", b"1")
        raise RuntimeError
    assert not (tmp_path / "o").exists()
    with pending_folder(tmp_path / "o", "w", manifest=MANIFEST) as folder:
        assert folder.files == {"one": FileRecord(bytes=1, sha256=hashlib.sha256(b"1").hexdigest())}


def test_refused_work_leaves_only_what_can_be_taken_over(tmp_path):
    def refused(*names):
        with pending_folder(tmp_path / "sub" / "o", "w", manifest=MANIFEST) as folder:
            for name in names:
                folder.add_bytes(name, b"1")
            (folder.path / "half").write_bytes(b"1")
            raise UsageError("no")

    for names, left in (((), []), (("one",), [".o.partial"]), ((), [".o.partial"])):
        with pytest.raises(UsageError, match="no"):
            refused(*names)
        assert [p.name for p in tmp_path.glob("sub/.*")] == left
    with pending_folder(tmp_path / "sub" / "o", "w", manifest=MANIFEST) as folder:
        assert list(folder.files) == ["one"]


def test_refused_work_leaves_no_folder_that_it_made(tmp_path):
    target = tmp_path / "new" / "sub" / "o"
    with pytest.raises(UsageError), pending_folder(target, "w", manifest=MANIFEST):
        raise UsageError("no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    ["other work", "cut journal", "cut file", "lost file", "flipped bit", "no journal",
     "journal of nonsense", "flipped journal"],
)  # fmt: skip
def test_what_is_not_the_same_work_is_not_taken_over(tmp_path, damage):
    with (
        pytest.raises(RuntimeError),
        pending_folder(tmp_path / "o", "w", manifest=MANIFEST) as folder,
    ):
        folder.add_bytes("one", b"1234")
        raise RuntimeError
    partial = tmp_path / ".o.partial"
    if damage == "cut journal":
        journal = partial / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
    if damage == "no journal":
        (partial / "journal.jsonl").unlink()
    if damage == "journal of nonsense":
        (partial / "journal.jsonl").write_bytes(b"\xff\n[]\n")
    if damage == "flipped journal":  # "name" is no longer "name"
        journal = partial / "journal.jsonl"
        journal.write_bytes(journal.read_bytes().replace(b'"name"', b'"oame"'))
    if damage == "flipped bit":
        (partial / "one").write_bytes(b"1235")
    if damage == "cut file":
        (partial / "one").write_bytes(b"12")
    if damage == "lost file":
        (partial / "one").unlink()
    work = "x" if damage == "other work" else "w"
    with pending_folder(tmp_path / "o", work, manifest=MANIFEST) as folder:
        assert folder.files == {}


def test_a_journal_that_was_cut_off_is_mended(tmp_path):
    """What is noted after the cut line must not be lost to the run after that."""
    for name in ("one", "two", "three"):
        with (
            pytest.raises(RuntimeError),
            pending_folder(tmp_path / "o", "w", manifest=MANIFEST) as folder,
        ):
            folder.add_bytes(name, b"1234")
            with (tmp_path / ".o.partial" / "journal.jsonl").open("a") as journal:
                journal.write('{"bytes":4,"sha')
            raise RuntimeError
    with pending_folder(tmp_path / "o", "w", manifest=MANIFEST) as folder:
        assert list(folder.files) == ["one", "two", "three"]


def test_who_comes_after_the_finish_replaces_nothing(tmp_path, monkeypatch):
    """The target appears between the question whether it is there and the lock."""
    fill(tmp_path / "o")
    asked = []

    def not_yet(target: Path) -> bool:
        asked.append(target)
        return len(asked) > 1 and occupied(target)

    for module in (folder_module, standing):
        monkeypatch.setattr(module, "occupied", not_yet)
    with pytest.raises(UsageError, match="o exists already"):
        fill(tmp_path / "o", names=("three",))
    assert len(asked) > 1
    assert {p.name for p in tmp_path.rglob("*")} == {"o", "one", "two", "manifest.json"}


def test_a_source_is_known_by_more_than_its_times(tmp_path):
    """Rewritten and given its old time back; put aside and brought back."""
    file = tmp_path / "source" / "model.bin"
    file.parent.mkdir()
    file.write_bytes(b"1234")
    seen = [SourceFiles.of(file.parent).fingerprint]
    assert SourceFiles.of(file.parent).fingerprint == seen[0]
    status = file.stat()
    time.sleep(0.02)  # a kernel's clock ticks every 4 ms or so
    file.write_bytes(b"4321")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(SourceFiles.of(file.parent).fingerprint)
    time.sleep(0.02)
    file.rename(tmp_path / "aside")
    (tmp_path / "aside").rename(file)
    seen.append(SourceFiles.of(file.parent).fingerprint)
    assert len(set(seen)) == 3


def test_an_existing_target_is_not_touched_without_being_told(tmp_path):
    fill(tmp_path / "o")
    with pytest.raises(UsageError, match=r"o exists already; choose another --output, or add --f"):
        fill(tmp_path / "o")
    fill(tmp_path / "o", names=("three",), replace=True)
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"three", "manifest.json"}


def test_two_writers(tmp_path):
    """Another process holds the folder: this one says so and touches nothing."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom porttool.folder import pending_folder\n"
        "with pending_folder(Path(sys.argv[1]), 'w', manifest='m') as folder:\n"
        "    folder.add_bytes('one', b'1')\n    print('ready', flush=True)\n    input()\n"
    )
    pipe = subprocess.PIPE
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "o")], stdin=pipe, stdout=pipe
    )
    try:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(PorttoolError, match=r"o is being written by another process"):
            fill(tmp_path / "o", "other")
        assert (tmp_path / ".o.partial" / "one").read_bytes() == b"1"
    finally:
        other.kill()
        other.communicate()
    fill(tmp_path / "o", "other")  # the lock died with its process
    assert (tmp_path / "o" / "two").is_file()


def test_a_writer_that_finishes_before_the_lock(tmp_path, monkeypatch):
    """What is locked then is the finished folder, and nobody's to write to."""
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / ".o.partial").rename(tmp_path / "o")
        lock(descriptor, how)

    monkeypatch.setattr("porttool.folder.fcntl.flock", late)
    with pytest.raises(PorttoolError, match="o was finished by another process meanwhile"):
        fill(tmp_path / "o")
    assert not any((tmp_path / "o").iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is not a folder; choose another place"):
        fill(tmp_path / "file" / "o")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount")
def test_a_full_disk_and_a_read_only_one(tmp_path):
    """On real file systems; where mounting is not allowed the next test stands in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(PorttoolError) as caught:  # noqa: SIM117
            with pending_folder(disk / "o", "w", manifest=MANIFEST) as folder:
                folder.add_bytes("small", b"1")
                folder.add_bytes("large", b"1" * 100_000)
        assert "the disk is full; the complete files are kept in" in str(caught.value)
        assert "run the same command again" in str(caught.value)
        assert not (disk / "o").exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        with pending_folder(disk / "o", "w", manifest=MANIFEST) as folder:
            assert list(folder.files) == ["small"]
            folder.finish("manifest.json", "{}")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(PorttoolError, match="Read-only file system"):
            fill(disk / "another")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_as_the_system_reports_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PorttoolError, match="the disk is full; the complete files are kept in"):
        fill(tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_space_is_checked_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1_500_000_000))
    require_space(tmp_path / "a" / "b", 1_500_000_000)
    with pytest.raises(PorttoolError, match=r"b: 2\.00 GB are needed, 1\.50 GB are free; free s"):
        require_space(tmp_path / "a" / "b", 2_000_000_000)


def test_what_an_interrupted_run_left_has_its_room(tmp_path, monkeypatch):
    """Else a run that the disk was just large enough for could never go on."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 100))
    left = tmp_path / ".b.partial" / "part"
    left.mkdir(parents=True)
    (left / "file").write_bytes(bytes(900))
    require_space(tmp_path / "b", 1000)
    with pytest.raises(PorttoolError, match=r"b: 1\.00 kB are needed, 1\.00 kB are free"):
        require_space(tmp_path / "b", 1001)
    with pytest.raises(PorttoolError, match=r"c: 101 bytes are needed, 100 bytes are free"):
        require_space(tmp_path / "c", 101)


def test_verifying(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    files = {"a": hash_file(tmp_path / "a")}
    assert files["a"].sha256 == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    verify_files(tmp_path, files)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(4_999_999)
        file.write(b"y")
    with pytest.raises(CheckpointError, match=r"a: its SHA-256 is not the manifest's"):
        verify_files(tmp_path, files)
    verify_files(tmp_path, files, but=["a"])  # but its size
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a: has 1 bytes, the manifest says 5000000"):
        verify_files(tmp_path, files, but=["a"])
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match=r"a: the file is missing"):
        verify_files(tmp_path, files)


def test_verifying_names_the_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a").symlink_to("/proc/self/mem")  # opens, of no size, and fails at its first byte
    with pytest.raises(CheckpointError, match=r"a: Input/output error$"):
        verify_files(tmp_path, {"a": FileRecord(bytes=0, sha256="")})
    with pytest.raises(CheckpointError, match=r"^b: Is a directory$"), intact(Path("b")):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "b")
    with pytest.raises(CheckpointError, match=r"^b: Is a directory: b/c$"), intact(Path("b")):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "b/c")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "sub/../../a"])
def test_a_manifest_that_points_outside(tmp_path, name):
    with pytest.raises(CheckpointError, match="the manifest names a file outside"):
        verify_files(tmp_path, {name: FileRecord(bytes=1, sha256="0")})


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["somebody's folder", "another kind", "a file", "a link", "dots"])
def test_force_takes_away_nothing_but_what_was_finished_there(tmp_path, what, monkeypatch):
    target, kept = tmp_path / "out", tmp_path / "out" / "thesis.txt"
    if what == "a link":
        (tmp_path / "real").mkdir()
        target.symlink_to("real")
        fill(tmp_path / "real")
        kept = tmp_path / "real" / "manifest.json"
    elif what == "a file":
        kept = target
    else:
        target.mkdir()
    kept.write_text("years of work")
    if what == "another kind":
        (target / "other.json").write_text("{}")
    if what == "dots":
        monkeypatch.chdir(target)
        target = Path()
    why = "is a symbolic link" if what == "a link" else r"has no manifest\.json, and --force"
    with pytest.raises(UsageError, match=why):
        fill(target, replace=True)
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize("above", ["checkpoint.json", "engine.json", "prompt_table.json"])
@pytest.mark.parametrize("place", ["engine", "some/where/else"])
def test_nothing_is_put_into_a_finished_folder(tmp_path, monkeypatch, above, place):
    """It would be lost with it; a relative path or a link is no way in."""
    (tmp_path / "made" / "some").mkdir(parents=True)
    (tmp_path / "made" / above).write_text(
        json.dumps({"seal": "0" * 64, "format": "porttool-engine"}, indent=1)
    )
    (tmp_path / above).write_text('{"format":"somebody else\'s"}')
    (tmp_path / "link").symlink_to(tmp_path / "made" / "some")
    monkeypatch.chdir(tmp_path / "made")
    for target in (tmp_path / "made" / place, Path(place), tmp_path / "link" / place):
        with pytest.raises(UsageError, match=r"lies in .*made, which is .*an --output beside it"):
            require_free(target, "engine.json", replace=True)
    for beside in (tmp_path / "beside", Path("../beside"), Path("../link/../../beside")):
        require_free(beside, "engine.json", replace=False)


def test_force_takes_away_nothing_that_is_being_read(tmp_path):
    target = tmp_path / "out"
    fill(target)
    source = target / "one"
    with (
        pytest.raises(UsageError, match="is being read"),
        pending_folder(target, "w", manifest=MANIFEST, replace=True, sources=[source]),
    ):
        pass
    assert source.is_file()
