from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from porttool.memory import LARGE, empty, packed


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("n", [0, 1, LARGE // 4 - 1, LARGE // 4, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_written_is_read(n, dtype):
    tensor = empty([n], dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((n,), dtype, True)
    values = torch.arange(n) % 200
    assert tensor.copy_(values).equal(values.to(dtype))


def test_memory_is_given_back_at_once():
    before = resident()
    tensor = empty([64, 1 << 20], torch.uint8).fill_(1)
    rows = tensor[3:].view(torch.int16)  # a view keeps it alive
    del tensor
    assert resident() - before > 60_000_000
    assert int(rows[60, 5]) == 257
    del rows
    gc.collect()
    assert resident() - before < 10_000_000


def test_packed_turns_and_casts():
    matrix = torch.randn(2100, 700)
    assert packed(matrix.t(), torch.float64).equal(matrix.t().double())
    assert packed(matrix.t(), torch.float64).is_contiguous()
