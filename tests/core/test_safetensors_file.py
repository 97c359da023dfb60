from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from porttool.errors import SourceError
from porttool.folder import hash_file
from porttool.sources.safetensors_file import SafetensorsFile, read_exactly

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5, dtype=torch.float64).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.int64).view(2, 3),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(2, 2, 2).half(),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert file.infos().keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        info = file.infos()[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert file.load(name).dtype == tensor.dtype
        assert file.load(name).equal(tensor)


def test_reads_rows(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert file.load_rows("a", 1, 3).equal(TENSORS["a"][1:3])
    assert file.load_rows("half", 1, None).equal(TENSORS["half"][1:])
    assert file.load_rows("b", 2, 2).shape == (0,)


@pytest.mark.parametrize("size", [3, 16, 1000])
def test_reads_through_a_file_once_and_hashes_it(tmp_path, size):
    save_file(TENSORS, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    left = {name: info.nbytes for name, info in file.infos().items()}
    found = dict.fromkeys(left, b"")

    def room(name, begin):
        assert begin == len(found[name])
        return torch.empty(min(size, left[name] - begin), dtype=torch.uint8)

    def filled(name, begin, piece):
        found[name] += bytes(piece.tolist())

    assert file.read_through(room, filled) == hash_file(tmp_path / "m.safetensors")
    for name, tensor in TENSORS.items():
        assert found[name] == bytes(tensor.view(-1).view(torch.uint8).tolist())


def test_another_file_behind_the_header_is_not_taken_for_it(tmp_path):
    """Not even if it is the one that was expected: its tensors lie elsewhere."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    save_file({"b": torch.ones(4), "c": torch.zeros(4)}, path)
    found = file.read_through(lambda *_: torch.empty(16, dtype=torch.uint8), lambda *_: None)
    assert found.bytes == hash_file(path).bytes
    assert found.sha256 != hash_file(path).sha256


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry()}, b"1234567", "the header describes"),
        ({"a": entry()}, b"123456789", "the header describes"),
        ({"a": entry(end=12)}, b"123456789012", "a of shape [2] needs 8 bytes, the header gives"),
        ({"a": entry(), "b": entry(4, 12)}, b"x" * 12, "the data of b overlaps or leaves a gap"),
        ({"a": entry(), "b": entry(12, 20)}, b"x" * 20, "the data of b overlaps or leaves a gap"),
        ({"a": entry(), "b": entry()}, b"x" * 8, "overlaps or leaves a gap"),
        ({"a": entry(dtype="F8_E5M2")}, b"x" * 8, "a is of type 'F8_E5M2', which port"),
        ({"a": entry(dtype=["F32"])}, b"x" * 8, "the header entry of a is malformed"),
        ({"a": entry(shape=(-2,))}, b"x" * 8, "the header entry of a has impossible numbers"),
        ({"a": entry(shape=(2.0,))}, b"x" * 8, "the header entry of a has impossible numbers"),
        ({"a": entry(shape=(True, 2))}, b"x" * 8, "the header entry of a has impossible numbers"),
        ({"a": entry(shape=(1 << 62, 1 << 62))}, b"x" * 8, "impossible numbers"),
        ({"a": entry(begin=-8, end=0)}, b"x" * 8, "impossible numbers"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8, "the header entry of a is malformed"),
        ({"a": {**entry(), "shape": 2}}, b"x" * 8, "a has impossible numbers"),
        ({"a": 5}, b"x" * 8, "the header entry of a is malformed"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
         b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8, "appears twice"),
        (b"[1, 2]", b"", "the safetensors header is not an object"),
        (b"{not json}", b"", "the safetensors header is damaged"),
        (b"\xff\xfe{}", b"", "the safetensors header is damaged"),
        (b"[" * 100_000, b"", "the safetensors header is damaged"),
        ({"__metadata__": 7}, b"", "metadata"),
        ({"__metadata__": {"format": [1]}}, b"", "metadata"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, header, data, said):
    path = write(tmp_path / "m.safetensors", header, data)
    with pytest.raises(SourceError) as caught:
        SafetensorsFile(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 0) + b"{}",
     struct.pack("<Q", 100) + b"{}", b"version 1 of something else\n"],
)  # fmt: skip
def test_a_length_that_lies(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="not a safetensors file, or its header length lies"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(SourceError, match=r"m\.safetensors: the file is missing"):
        SafetensorsFile(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, change):
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    os.utime(path, (1, 1))
    file = SafetensorsFile(path)
    file.load("a")
    if change == "cut":
        with path.open("r+b") as handle:
            handle.truncate(path.stat().st_size - 60)
    elif change == "rewritten":
        path.write_bytes(path.read_bytes())
    elif change == "replaced":  # by one of the same size and time
        shutil.copy2(path, tmp_path / "other")
        (tmp_path / "other").rename(path)
    else:
        path.unlink()
    said = "the file is missing" if change == "removed" else "changed while it was read"
    with pytest.raises(SourceError, match=rf"m\.safetensors: {said}"):
        file.load("b")


def test_reading_beyond_the_end(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(SourceError, match="short: ended early; it is truncated or changed while"):
        read_exactly(tmp_path / "short", torch.empty(4, dtype=torch.uint8), 1)
