from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from porttool.folder import pending_folder
from porttool.progress import Progress
from porttool.shards import TensorJob, make_ahead, plan_shards, write_shards


def job(name, tensor, make=None):
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorJob(name, tuple(tensor.shape), dtype, tensor.nbytes, make or tensor.clone)


class Counter(Progress):
    done = 0

    def advance(self, n_bytes):
        self.done += n_bytes


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {
        f"{dtype}.{n}": torch.randn(n, 7).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for n in (0, 1, 333)
    }
    jobs = [job(str(n), t) for n, t in tensors.items()]
    counter = Counter()
    with pending_folder(tmp_path / "o", "w", manifest="manifest.json") as folder:
        write_shards(folder, plan_shards(jobs, "m", 10_000), workers=2, progress=counter)
        records = folder.files
        folder.finish("manifest.json", "{}")
    assert counter.done == sum(t.nbytes for t in tensors.values())
    read = {}
    for name, record in records.items():
        data = (tmp_path / "o" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.bytes, record.sha256)
        assert int.from_bytes(data[:8], "little") % 64 == 64 - 8  # where the data begin
        read |= load_file(tmp_path / "o" / name)
        with safe_open(tmp_path / "o" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert len(records) > 2
    assert read.keys() == tensors.keys()
    assert all(read[n].equal(t) and read[n].dtype == t.dtype for n, t in tensors.items())


def test_shards_are_planned_in_order():
    jobs = [job(f"t{i}", torch.zeros(n)) for i, n in enumerate([10, 10, 30, 5, 5])]
    shards = plan_shards(jobs, "m", 100)
    assert {n: [j.name for j in s] for n, s in shards.items()} == {
        "m-00001-of-00003.safetensors": ["t0", "t1"],
        "m-00002-of-00003.safetensors": ["t2"],
        "m-00003-of-00003.safetensors": ["t3", "t4"],
    }
    assert list(plan_shards(jobs, "m")) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("count", "files"), [(1, 1), (4, 1), (8, 2), (64, 16), (200, 17), (1000, 63)]
)
def test_large_weights_become_files_to_hash_side_by_side(count, files):
    """Jobs of 32 MB: none makes a tensor here."""
    jobs = [TensorJob(str(i), (1 << 25,), "uint8", 0, lambda: None) for i in range(count)]
    planned = plan_shards(jobs, "m")
    assert len(planned) == files
    assert [job for shard in planned.values() for job in shard] == jobs
    assert all(len(shard) <= 16 for shard in planned.values())


def test_shards_that_are_there_are_not_made_again(tmp_path):
    def never():
        raise AssertionError("made again")

    tensor = torch.ones(8)
    with (
        pytest.raises(KeyError),
        pending_folder(tmp_path / "o", "w", manifest="manifest.json") as folder,
    ):
        write_shards(folder, plan_shards([job("a", tensor)], "a"), workers=1, progress=Progress())
        raise KeyError
    counter = Counter()
    with pending_folder(tmp_path / "o", "w", manifest="manifest.json") as folder:
        shards = {"a.safetensors": [job("a", tensor, never)], "b.safetensors": [job("b", tensor)]}
        write_shards(folder, shards, workers=1, progress=counter)
        assert sorted(folder.files) == ["a.safetensors", "b.safetensors"]
    assert counter.done == 64


def test_no_more_than_the_budget_is_under_way():
    held = 0
    most = 0
    lock = threading.Lock()

    def make():
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return torch.ones(100)

    jobs = [job(str(i), torch.ones(100), make) for i in range(20)]
    for _, tensor in make_ahead(jobs, workers=4, budget=3 * 800):
        del tensor
        with lock:
            held -= 1
    assert 2 <= most <= 4  # three by the budget, and one may start while the last is handed over


def test_an_error_while_making_is_raised_where_it_is_written(tmp_path):
    def broken():
        raise ValueError("t1")

    jobs = [job("t0", torch.ones(4)), job("t1", torch.ones(4), broken), job("t2", torch.ones(4))]
    with (
        pytest.raises(ValueError, match="t1"),
        pending_folder(tmp_path / "o", "w", manifest="manifest.json") as folder,
    ):
        write_shards(folder, plan_shards(jobs, "m"), workers=2, progress=Progress())
    assert not (tmp_path / "o").exists()
