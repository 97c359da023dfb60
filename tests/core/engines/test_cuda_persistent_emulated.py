"""The source of the persistent kernel, compiled for a CPU and run thread by thread.

`tests/hopper/machine.hpp` stands in place of the machine's instructions: words, ring, tensor cores
and attention run as they are written, on five programs, in an order drawn at random.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, emulated, needs_compiler
from porttool.engines.torch import cuda, cuda_hopper, cuda_persistent
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import PersistentTile
from porttool.nn import KVCache, Step

PROGRAMS, THREADS = 5, 64
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernel"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on masked lanes
]


class Emulated:
    """In place of a kernel on a GPU."""

    broken = NOT_BROKEN
    hung = 0

    def __init__(self, defined: Any, name: str, *, threads: int, shared: int) -> None:
        macros = (("BASE", 1024), *defined.items())
        parts = tuple(path.name for path in cuda_hopper.sources(cuda_persistent.KERNEL)[1:])
        self.library = emulated(("machine.hpp",), parts, "run_row.hpp", macros, self.broken)
        self.seed = 0

    def launch_together(self, programs: int, stream: int, values: Any, kinds: Any) -> None:
        assert programs == cuda_persistent.programs_of("cpu")
        self.seed += 1
        plan, tokens, told, logits = values
        pointers = ctypes.c_void_p(plan), tokens, told, ctypes.c_void_p(logits)
        Emulated.hung += self.library.run(*pointers, self.seed)


def use_machine(
    monkeypatch, programs: int = PROGRAMS, threads: int = THREADS, shared: int = 14 << 10
) -> None:
    """Emulate so many multiprocessors; their shared memory is small, so that slots come round."""
    monkeypatch.setattr(cuda_persistent, "programs_of", lambda device: programs)
    monkeypatch.setattr(cuda_persistent, "_COMPUTING", threads)
    monkeypatch.setattr(cuda_persistent, "SHARED", shared)


@pytest.fixture
def emulation(monkeypatch):
    use_machine(monkeypatch)
    monkeypatch.setattr(cuda, "HISTORY", 2)  # so that a launch begins where one has ended
    monkeypatch.setattr(cuda_persistent, "unsuited", lambda *a: None)
    monkeypatch.setattr(cuda_persistent, "compile_row", cuda_persistent.macros)
    monkeypatch.setattr(cuda_persistent, "CompiledKernel", Emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(Emulated, "hung", 0)
    return Emulated


def made_with(case: str, dtype: torch.dtype, tile: PersistentTile, **changes: Any) -> Any:
    """Return a decoder whose row 1 runs emulated, the reference and its cache."""
    shape = cases.config(case, **{"d_model": 64, "d_ff": 128, "head_dim": 32, **changes})
    assert cuda_persistent.unfit(shape, cuda_persistent.programs_of("cpu")) is None
    plain = cases.drawn(shape, dtype)
    made = CudaDecoder(shape, plain.state_dict(), dtype=dtype, limits=cases.limits(2, 40),
                       device="cpu")  # fmt: skip
    cases.graphed_without_gpu(made)
    made.use(replace(default_tuning(shape, "cpu"), persistent=tile))
    for cached in (made.model.cache.keys, made.model.cache.values):
        cached.fill_(float("nan"))
    return made, plain, KVCache(shape, 2, 40, dtype=torch.float64)


MODELS = [
    ("learned", torch.float16, PersistentTile(2, 2, 2, 2, 2, 2),
     {"n_head": 2, "n_kv_head": 2, "vocab_size": 331}),  # the head takes several batches
    ("gated rotary", torch.bfloat16, PersistentTile(1, 3, 1, 2, 1, 2),
     {"n_head": 2, "n_kv_head": 2, "activation": "silu"}),
    ("grouped rms", torch.float16, PersistentTile(3, 2, 1, 3, 2, 2),
     {"n_head": 4, "n_kv_head": 2, "head_dim": 16}),
    ("grouped rms", torch.float16, PersistentTile(1, 2, 1, 3, 1, 2),
     {"n_head": 4, "n_kv_head": 2, "head_dim": 16}),
]  # fmt: skip


def begun(made: Any, plain: Any, cache: KVCache, dtype: torch.dtype) -> int:
    """Feed a prompt to row 1; return how long it is."""
    if dtype == torch.bfloat16:  # which Triton's interpreter gets wrong in a prompt
        for i in range(4):
            step = cases.one_token([1], torch.tensor([3 * i]), [i])
            made.step(step), cases.reference(plain, cache, step)
        return 4
    first = Step.prefill([[(3 * i) % 101 for i in range(19)]], [1])
    made.step(first), cases.reference(plain, cache, first)
    return 19


@pytest.mark.parametrize(("case", "dtype", "tile", "changes"), MODELS)
def test_logits_and_tokens(case, dtype, tile, changes, emulation) -> None:
    made, plain, cache = made_with(case, dtype, tile, **changes)
    length = begun(made, plain, cache, dtype)
    fed, tokens = torch.tensor([7]), []
    for i in range(3):
        step = cases.one_token([1], fed, [length + i])
        logits = made.step(step)
        wanted = cases.reference(plain, cache, step)
        assert cases.relative_error(logits, wanted) < cases.TOLERANCE[dtype]
        fed = logits.argmax(-1)
        tokens.append(int(fed))
    begin = cases.one_token([1], torch.tensor([7]), [length])
    assert made.decode(begin, 3)[0].tolist() == tokens
    begin = cases.one_token([1], torch.tensor([tokens[0]]), [length + 1])
    assert made.decode(begin, 2)[0].tolist() == tokens[1:]
    assert emulation.hung == 0


WIDE = {"d_model": 832, "d_ff": 1088, "n_head": 10, "n_kv_head": 1, "head_dim": 64, "n_layer": 1}


@pytest.mark.parametrize(
    ("machine", "tile", "changes"),
    [  # more words a thread than it asks for at once or ahead; two teams of two, three
        ({"programs": 40, "threads": 32, "shared": 40 << 10},
         PersistentTile(5, 2, 3, 2, 1, 1), WIDE),
        ({"threads": 128, "shared": 19 << 10}, PersistentTile(1, 2, 2, 2, 2, 4),
         {"n_head": 2, "n_kv_head": 2}),
        ({"threads": 192, "shared": 36 << 10}, PersistentTile(1, 2, 2, 2, 2, 6),
         {"n_head": 2, "n_kv_head": 2}),
    ],
)  # fmt: skip
def test_other_machines(machine, tile, changes, emulation, monkeypatch) -> None:
    use_machine(monkeypatch, **machine)
    case = "multi-query" if changes is WIDE else "learned"
    test_logits_and_tokens(case, torch.float16, tile, changes, emulation)


BROKEN = {
    "a slot is read before it is full": (
        "barrier_wait(shared_address(&shared.full[place.slot]), place.parity);\n        return",
        "return"),
    "a slot is given back by a warp for all": (
        "Place(taken).slot]), warps);", "Place(taken).slot]), WARPS * warps);"),
    "a full slot is filled again": (
        "barrier_wait(shared_address(&shared.empty[place.slot]), place.parity ^ 1);", ""),
    "sums are read before all are there": (
        "WARPS + warp] = sum;\n        }\n        together();", "WARPS + warp] = sum;\n        }"),
    "odd rows meet the input of even rows": ("+ lane / 16 * STEP;", ";"),
    "odd rows take what even rows came to": ("return odd ? other : sum;", "return sum;"),
    "odd rows' steps of a line are in the order of even rows'": (
        "+ lane / 4 % 2 * STEP;", ";"),
    "each batch of the head is the first": (
        "HEAD_MATRIX.first() + batch + threadIdx.x", "HEAD_MATRIX.first() + threadIdx.x"),
    "a team takes another's slots": ("others = TEAMS - 1;", "others = 0;"),
    "a pair is rotated before both are there": (
        "= heard[j];\n            together();", "= heard[j];"),
    "positions that are not there count": (
        "inside[j] ? __expf(score[j] - above) : 0.0f", "__expf(score[j] - above)"),
    "each group of lanes counts the step's own position": ("{group == 0}", "{true}"),
    "plain queries and keys lie over the sums": (
        "(DIM + 2) * 4, 3 * DIM * 4);", "(DIM + 2) * 4, 0);"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str, emulation, monkeypatch) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    monkeypatch.setattr(Emulated, "broken", BROKEN[what])
    for case, dtype, tile, changes in MODELS[:2]:
        made, plain, cache = made_with(case, dtype, tile, **changes)
        length = begun(made, plain, cache, dtype)
        step = cases.one_token([1], torch.tensor([7]), [length])
        wanted = cases.reference(plain, cache, step)
        usual = 1e-3 if dtype == torch.float16 else 8e-3
        for _ in range(4):
            if not cases.relative_error(made.step(step), wanted) < 3 * usual or emulation.hung:
                return
    raise AssertionError("nothing was found")
