"""A disk that is full, or may not be written: the file is named, and what stood there stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from porttool.cli import invoke as porttool
from porttool.errors import PorttoolError, explain_os_error, said_by_system
from porttool.folder import pending_folder
from porttool.scaffold import write_plugin
from porttool.standing import made_folder, whole_file


def test_what_stood_there_is_kept_until_the_new_file_is_whole(tmp_path):
    file = tmp_path / "out.csv"
    file.write_text("old")
    file.chmod(0o600)
    said = r"out\.csv: the disk is full; free some space"
    with pytest.raises(PorttoolError, match=said), whole_file(file) as place:
        place.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "old"
    with whole_file(file) as place:
        place.write_text("new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


def test_links_and_devices_are_written_to_as_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with whole_file(tmp_path / "link") as place:
        place.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    said = r"^/dev/full: the disk is full"
    with pytest.raises(PorttoolError, match=said), whole_file(Path("/dev/full")) as place:
        place.write_text("new")


@pytest.mark.parametrize("flag", ["--output-csv", "--output-json", "--output-npy"])
def test_run_names_the_file(tmp_path, capsys, engine_folder, flag):
    (tmp_path / "ids.csv").write_text("1,2\n")
    run = ["run", str(engine_folder), "--input-tokens", str(tmp_path / "ids.csv")]
    assert porttool([*run, "--max-output-len", "2", flag, "/dev/full"]) == 1
    said = capsys.readouterr().err
    assert "error: /dev/full: the disk is full; free some space" in said
    assert "OSError" not in said


def test_a_place_that_may_not_be_written_is_said_before_anything_runs(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for command in (["bench", "nothing"], ["run", "nothing", "--input-text", "a"]):
        assert porttool([*command, "--output-json", str(tmp_path / "out.json")]) == 2
        assert "out.json cannot be written: choose another place" in capsys.readouterr().err


def test_a_plugin_is_begun_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, text, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(PorttoolError, match="porttool-odd: the disk is full"):
        write_plugin("odd", tmp_path)
    assert not any(tmp_path.iterdir())


def test_nothing_is_said_to_be_kept_where_nothing_is(tmp_path):
    left, target = tmp_path / ".o.partial", tmp_path / "o"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "kept" not in explain_os_error(full, target, left)
    left.mkdir()
    assert f"the complete files are kept in {left}" in explain_os_error(full, target, left)


def test_a_full_disk_is_said_of_the_folder(tmp_path):
    with pytest.raises(OSError) as caught, made_folder(tmp_path / "report"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert said_by_system(caught.value).startswith(f"{tmp_path / 'report'}: the disk is full")


def test_a_read_only_place_says_what_to_do():
    error = OSError(errno.EROFS, "Read-only file system", "/ro/report")
    assert said_by_system(error) == (
        "/ro/report: Read-only file system; choose another place for what is written"
    )


def test_half_a_file_does_not_stay_on_the_full_disk(tmp_path):
    """There is nothing to go on from, and it would hold the room that is missing."""

    def write(*whole):
        with pending_folder(tmp_path / "o", "w", manifest="manifest.json") as folder:
            for name in whole:
                folder.add_bytes(name, b"1")
            (folder.path / "half").write_text("1" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PorttoolError, match="o: the disk is full; free some space"):
        write()
    assert not any(tmp_path.iterdir())
    with pytest.raises(PorttoolError, match="the complete files are kept in"):
        write("whole")
    assert (tmp_path / ".o.partial" / "whole").is_file()


def test_the_verdicts_of_a_report_without_room_are_told(tmp_path, engine_folder, capsys):
    """They may be an hour's work."""
    (tmp_path / "report.json").symlink_to("/dev/full")
    verify = ["verify", str(engine_folder), "--output", str(tmp_path), "--set", "prompt_len", "8"]
    assert porttool([*verify, "--set", "new_tokens", "4"]) == 1
    said = capsys.readouterr().err
    assert "pass: weights: 41 of 41 tensors, bound all, exactly\n" in said
    assert "\npass: greedy tokens: 6 of 6 prompts" in said
    assert said.endswith("report.json: the disk is full; free some space and run the same command "
                         "again\n")  # fmt: skip
