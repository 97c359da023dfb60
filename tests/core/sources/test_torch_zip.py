from __future__ import annotations

import io
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from porttool.errors import SourceError
from porttool.sources.archive import Member
from porttool.sources.torch_zip import TorchZip


def embedded(path: Path, data: bytes) -> Member:
    """Write data in the middle of a file."""
    path.write_bytes(b"x" * 1001 + data + b"y" * 77)
    return Member(1001, len(data))


def saved(tree: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def test_tensors_are_read_where_they_lie(tmp_path):
    base = torch.randn(6, 8)
    tree = OrderedDict(
        plain=torch.randn(5, 7), half=torch.randn(4, 4).bfloat16(), turned=base.t(),
        part=base[2:4, 1:5], scalar=torch.tensor(3.0), empty=torch.empty(0, 4),
        parameter=torch.nn.Parameter(torch.randn(3)), ids=torch.arange(9),
        layer_extra_state=io.BytesIO(b"any bytes"),
    )  # fmt: skip
    path = tmp_path / "in.tar"
    source = TorchZip(path, embedded(path, saved(tree)), "in.tar: a", ["*_extra_state"])
    assert source.infos().keys() == tree.keys() - {"layer_extra_state"}
    for name, info in source.infos().items():
        assert info.shape == tuple(tree[name].shape)
        assert info.dtype == str(tree[name].dtype).removeprefix("torch.")
        assert source.load(name).equal(tree[name].detach())


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def rezipped(data: bytes, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """Pack a torch zip again with some records changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(Path(name).name, old.read(name)))
    return out.getvalue()


GOOD = saved({"a": torch.ones(5)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (saved({"a": Evil()}), "its pickle wants more than tensors"),
        (saved([torch.ones(2)]), "holds list, not a dictionary of tensors"),
        (saved({"a": 5}), "'a' is int, not a tensor"),
        (saved({"a_extra_state": 1, "b": "text"}), "'b' is str, not a tensor"),
        (saved({"a": torch.ones(2, 2).to_sparse()}), "not a plain dense tensor"),
        (saved({"a": torch.ones(5)}, _use_new_zipfile_serialization=False), "truncated or damaged"),
        (GOOD[:-30], "truncated or damaged"),
        (rezipped(GOOD, zipfile.ZIP_DEFLATED), "is compressed"),
        (rezipped(GOOD, **{"0": b"short"}), "its entry 'archive/data/0' has 5"),
        (rezipped(GOOD, byteorder=b"big"), "big-endian"),
    ],
)
def test_damaged_and_hostile_files(tmp_path, data, said):
    path = tmp_path / "in.tar"
    with pytest.raises(SourceError) as caught:
        TorchZip(path, embedded(path, data), "in.tar: a", ["*_extra_state"])
    assert said in str(caught.value)
    assert "in.tar: a" in str(caught.value)
