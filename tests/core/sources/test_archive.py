from __future__ import annotations

import fcntl
import gzip
import io
import os
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from porttool.errors import SourceError
from porttool.progress import SILENT
from porttool.sources.archive import Archive, peek, unpacked

FILES = {"./model_config.yaml": b"a: 1\n", "./mp_rank_00/model_weights.ckpt": bytes(range(256)) * 9}


def write_tar(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], mode="w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_are_read_in_place(tmp_path, mode):
    directory = special("./mp_rank_00", tarfile.DIRTYPE)
    path = write_tar(tmp_path / "a.nemo", [directory, *FILES.items()], mode)
    archive = Archive(path)
    assert archive.names() == ["model_config.yaml", "mp_rank_00/model_weights.ckpt"]
    for name, data in FILES.items():
        short = name.removeprefix("./")
        assert archive.size(short) == len(data)
        with archive.open(short) as file:
            assert file.read() == data
            assert file.seek(-4, io.SEEK_END) == len(data) - 4
            assert file.read(100) == data[-4:]
            file.seek(1)
            assert file.read(2) == data[1:3]
        offset = archive.offset(short)
        assert (offset is None) == (mode == "w:gz")
        if offset is not None:
            assert path.read_bytes()[offset : offset + len(data)] == data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (special("x", tarfile.SYMTYPE, "/etc/passwd"), "link, a device"),
        (special("x", tarfile.LNKTYPE, "model_config.yaml"), "link, a device"),
        (special("x", tarfile.CHRTYPE), "link, a device"),
        (special("x", tarfile.FIFOTYPE), "link, a device"),
        (("/abs", b"1"), "outside"),
        (("a/../../b", b"1"), "outside"),
        (special("../d", tarfile.DIRTYPE), "outside"),
        (("a\\b", b"1"), "outside"),
        (("model_config.yaml", b"1"), "twice"),
    ],
)
def test_hostile_members_are_refused(tmp_path, member, message):
    path = write_tar(tmp_path / "a.nemo", [*FILES.items(), member])
    with pytest.raises(SourceError, match=message):
        Archive(path)


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000"}
    info.size = 0
    with tarfile.open(tmp_path / "a.nemo", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(SourceError, match="sparse"):
        Archive(tmp_path / "a.nemo")


def test_a_size_beyond_the_file_is_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.size = 1 << 50
    (tmp_path / "a.nemo").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(SourceError, match="claims"):
        Archive(tmp_path / "a.nemo")
    (tmp_path / "b.nemo").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(SourceError, match="claims"):
        Archive(tmp_path / "b.nemo")


def test_a_huge_extended_header_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1 << 30
    (tmp_path / "a.nemo").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(SourceError, match="a header of"):
        Archive(tmp_path / "a.nemo")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archives_are_refused(tmp_path, mode):
    path = write_tar(tmp_path / "a.nemo", list(FILES.items()), mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2400 if mode == "w" else len(whole) // 2])
    with pytest.raises(SourceError, match=r"damaged|truncated"):
        Archive(path)


def test_garbage_between_members_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.nemo", list(FILES.items()))
    data = bytearray(path.read_bytes())
    data[1024:1040] = b"\xff" * 16
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged at byte 1024"):
        Archive(path)


def test_a_missing_end_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.nemo", [("a", b"1" * 512)])
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(SourceError, match="truncated"):
        Archive(path)


def header(name, kind, size, at=tarfile.GNU_FORMAT):
    info = special(name, kind)
    info.size = size
    return info.tobuf(at)


def old_sparse(n_blocks):
    """GNU's first sparse format: a map of any length before the data."""
    first = bytearray(special("x", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    return bytes(first) + ((b"%011o\0" % 1) * 42 + b"\1").ljust(512, b"\0") * n_blocks


DIGITS = b"1" * (1 << 20)
TRAPS = {
    "nested extended headers": header("x", b"x", 0) * 5000,
    "nested long names": (header("x", b"L", 10) + b"a" * 512) * 5000,
    "a megabyte of digits": header("x", b"x", len(DIGITS)) + DIGITS + header("a", b"0", 0),
    "an endless sparse map": old_sparse(10_000),
    "too many members": header("x", b"5", 0) * 17_000,
    "a negative size": header("x", b"0", -512),
    "a folder with data": header("x", b"5", 512) + bytes(512),
}


@pytest.mark.parametrize("data", TRAPS.values(), ids=TRAPS)
@pytest.mark.parametrize("packed", [False, True])
def test_traps_cost_neither_time_nor_memory(tmp_path, data, packed):
    """Each of these keeps tarfile busy for minutes, fills the memory or the stack."""
    path = tmp_path / "a.nemo"
    data += bytes(1024)
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        refused = r"(more than 16384 members|a header of|sparse|claims|damaged)"
        if not data.startswith((TRAPS["nested extended headers"], TRAPS["nested long names"])):
            with pytest.raises(SourceError, match=refused):
                Archive(path)
        else:
            assert Archive(path).names() == []
        assert time.perf_counter() - start < 5
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("pax", "said"),
    [({"path": "../x"}, "outside"), ({"path": "model_config.yaml"}, "twice"),
     ({"size": "99999999999999999999"}, "claims"), ({"size": "-1"}, "claims"),
     ({"size": "1e3"}, "claims"), ({"GNU.sparse.major": "1"}, "sparse")],
)  # fmt: skip
def test_extended_headers_that_lie(tmp_path, pax, said):
    path = write_tar(tmp_path / "a.nemo", list(FILES.items()))
    info = tarfile.TarInfo("x")
    info.pax_headers = pax
    whole = path.read_bytes()[: 512 * 8]  # without the blocks that end it
    path.write_bytes(whole.rstrip(b"\0").ljust(len(whole), b"\0"))
    with path.open("ab") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(SourceError, match=said):
        Archive(path)


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_style(tmp_path, style):
    name = "/".join(["folder" * 5] * 4) + "/model_weights.ckpt"
    names = [name, "f" * 98, "n\N{LATIN SMALL LETTER E WITH ACUTE}"]
    names += [] if style == tarfile.USTAR_FORMAT else ["x" * 3000]
    with tarfile.open(tmp_path / "a.nemo", "w", format=style) as tar:
        for number, each in enumerate(names):
            info = tarfile.TarInfo(each)
            info.size, info.mtime = number, 1.5 if style == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(number)))
    archive = Archive(tmp_path / "a.nemo")
    assert archive.names() == names
    assert [archive.size(n) for n in names] == list(range(len(names)))


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "a.nemo")
    for read in (Archive, lambda path: peek(path, "model_config.yaml", 100)):
        with pytest.raises(SourceError, match="is not a file"):
            read(tmp_path / "a.nemo")


def test_what_a_killed_run_unpacked_is_deleted(tmp_path):
    """Not what another run works on, or has just begun, or what is somebody else's."""
    path = write_tar(tmp_path / "a.nemo", list(FILES.items()), "w:gz")
    names = ("left", "locked", "new", "other")
    files = {name: tmp_path / f".a.nemo.{name}.tar" for name in names}
    files["other"] = tmp_path / ".b.nemo.x.tar"
    for name, file in files.items():
        file.write_bytes(b"x")
        if name != "new":
            os.utime(file, (1, 1))
    with files["locked"].open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with unpacked(path, tmp_path, SILENT) as plain:
            assert Archive(plain).names() == [name.removeprefix("./") for name in FILES]
            assert {p.name for p in tmp_path.iterdir()} == {
                path.name, plain.name, *(files[n].name for n in ("locked", "new", "other"))
            }  # fmt: skip
    assert not plain.exists()


def test_other_files_and_missing_members(tmp_path):
    (tmp_path / "x").write_bytes(b"not a tar" * 100)
    with pytest.raises(SourceError, match="not a tar archive"):
        Archive(tmp_path / "x")
    with pytest.raises(SourceError, match="No such file"):
        Archive(tmp_path / "y")
    archive = Archive(write_tar(tmp_path / "a.nemo", list(FILES.items())))
    with pytest.raises(SourceError, match=r"no model\.bin"):
        archive.open("model.bin")
    with pytest.raises(SourceError, match="more than the 3 expected"):
        archive.read("model_config.yaml", 3)
