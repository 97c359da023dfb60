"""torch's old file format, mapped: the same tensors as torch.load gives, and nothing unnoticed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from porttool.errors import SourceError
from porttool.sources.torch_file import load_tree, open_torch_file
from porttool.sources.torch_legacy import is_legacy


def tree():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=generator)
    return {
        "float32": base,
        "tied": base,
        "transposed": base.t(),
        "middle": base[2:4],
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "mask": torch.ones(3, dtype=torch.uint8),
        "scalar": torch.tensor(-1e4),
        "empty": torch.empty(0, 5),
        "steps": torch.arange(3),
        "odd": torch.arange(3, dtype=torch.int8),
        "parameter": torch.nn.Parameter(base * 2),
    }


def save(path, value, **options):
    torch.save(value, path, _use_new_zipfile_serialization=False, **options)
    return path


def test_the_same_tensors_as_torch_load(tmp_path):
    path = save(tmp_path / "model.bin", tree())
    assert is_legacy(path)
    source = open_torch_file(path)
    expected = torch.load(path, weights_only=True)
    assert source.infos().keys() == expected.keys()
    for _ in range(2):  # the second time the pages have been given back
        for name, tensor in expected.items():
            loaded = source.load(name)
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert loaded.equal(tensor), name


def test_nested_trees_and_devices(tmp_path):
    path = save(tmp_path / "model.pt", {"model": {"a": [torch.ones(2)]}, "iteration": 7})
    path.write_bytes(path.read_bytes().replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:1"))
    found = load_tree(path)
    assert found["iteration"] == 7
    assert found["model"]["a"][0].equal(torch.ones(2))


def test_every_truncation_is_noticed(tmp_path):
    whole = save(tmp_path / "model.bin", tree()).read_bytes()
    path = tmp_path / "cut.bin"
    for size in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.bin"):
            open_torch_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SourceError, match="1 bytes too many"):
        open_torch_file(path)


def test_no_damaged_byte_crashes(tmp_path):
    """Damage in the structure is an error; damage in the values is the manifest's business."""
    whole = save(tmp_path / "model.bin", tree()).read_bytes()
    path = tmp_path / "damaged.bin"
    shapes = {n: tuple(t.shape) for n, t in tree().items()}
    survived = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            source = open_torch_file(path)
            for name in source.infos():
                source.load(name)
        except SourceError as error:
            assert "damaged.bin" in str(error)
        else:
            survived += {n: i.shape for n, i in source.infos().items()} == shapes
    assert survived < len(whole) // 5


CHILD = """
import sys
from pathlib import Path
from porttool.shards import give_memory_back
from porttool.sources.torch_file import open_torch_file

give_memory_back()
source = open_torch_file(Path(sys.argv[1]))
print(sum(float(source.load(name).sum()) for name in source.infos()))
status = Path("/proc/self/status").read_text()  # getrusage would count the parent, too
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_resident_memory_stays_bounded(tmp_path):
    path = save(tmp_path / "model.bin", {f"h.{i}": torch.ones(5_000_000) for i in range(50)})
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True
    )
    total, peak = (float(line) for line in found.stdout.split())
    assert total == 250_000_000
    assert path.stat().st_size > 2 * (2 * 20_000_000 + 300_000_000)
    assert peak < 2 * 20_000_000 + 300_000_000
