from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from porttool.errors import SourceError
from porttool.sources.archive import Archive

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
