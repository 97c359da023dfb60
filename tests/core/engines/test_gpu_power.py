"""bench/gpu_power.py: its kernels compile, a CPU runs their source, its arithmetic is right."""

from __future__ import annotations

import ctypes
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cuda_cases as cases
from hopper_emulation import NOT_BROKEN, emulated, needs_compiler

BENCH = Path(__file__).parents[3] / "bench"
NAMES = ["copies", "products", "both", "both, activations from the L2 cache"]
PROGRAMS, SMALL = 2, {"BLOCK_M": 16, "BLOCK_N": 128}


@pytest.fixture
def bench(monkeypatch):
    """The script, whose own imports lie beside it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_power")


def test_every_kernel_is_tried(bench) -> None:
    assert list(bench.KERNELS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_and_fit(name: str, bench, compiler) -> None:
    assert b"power" in bench.compiled(name)
    assert bench.macros(name)["SHARED"] <= 227 << 10


def run(bench, name: str, seed: int, broken=NOT_BROKEN, slots: int = 0):  # type: ignore[no-untyped-def]
    """Return what the emulated kernel leaves and what is right; None if it hung."""
    defined = {**bench.macros(name), **SMALL}
    defined["STEPS"] = min(defined["STEPS"], 5)  # activations come again
    machine = ("machine.hpp", "overlap.hpp", "warpgroup.hpp")
    library = emulated(machine, (str(BENCH / "gpu_power.cu"),), "run_power.hpp",
                       tuple(defined.items()), broken)  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    chunks = PROGRAMS * (slots or 2 * defined["STAGES"] + 1) + 1  # one program has one more
    weights = torch.randn(chunks, SMALL["BLOCK_N"], 64, generator=draw).half()
    inputs = torch.randn(defined["STEPS"], SMALL["BLOCK_M"], 64, generator=draw).half()
    out = torch.full((PROGRAMS, SMALL["BLOCK_N"], SMALL["BLOCK_M"]), torch.nan)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weights, inputs, out))
    hung = library.run(*pointers, chunks, PROGRAMS, seed)
    return None if hung else (out, bench.wanted(defined, weights, inputs, PROGRAMS))


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_kernels_multiply_what_they_should(name: str, bench) -> None:
    for seed, slots in ((1, 0), (2, 0), (3, 1)):
        found = run(bench, name, seed, slots=slots)
        assert found is not None, "it hung"
        out, right = found
        if name == "copies":
            assert out.isnan().all()
        else:
            assert cases.relative_error(out, right) < 1e-5


BROKEN = {
    "a slot is given back before its product is computed": (
        "if (STREAMED && leader && i >= 1)\n"
        "            barrier_arrive(shared_address(&s.empty[(i - 1) % STAGES]), 1);",
        "if (leader) barrier_arrive(shared_address(&s.empty[i % STAGES]), 1);"),
    "slots are not given back": ("if (STREAMED && leader && i >= 1)", "if (false)"),
    "weights are not awaited": ("if (STREAMED || i < STAGES)\n", "if (false)\n"),
    "activations are not awaited": (
        "if (KEPT) barrier_wait(shared_address(&s.kept), 0);", ""),
    "a full slot is filled again": (
        "barrier_wait(shared_address(&s.empty[slot]), (i / STAGES & 1) ^ 1);", ""),
    "the last products are not awaited": ("await_products<0>();", ""),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("what", list(BROKEN))
def test_what_the_emulation_finds(what: str, bench) -> None:
    """A test that cannot fail is none: each of these must hang or give wrong numbers."""
    found = (run(bench, "both", seed, BROKEN[what]) for seed in range(1, 7))
    assert any(f is None or not cases.relative_error(*f) < 1e-5 for f in found)


def test_tiles_lie_swizzled(bench) -> None:
    """As the copies of boxes leave them: unit u of row r at u ^ (r % 8)."""
    stored = torch.arange(2 * 16 * 64).view(2, 16, 64)
    meant = bench.unswizzled(stored)
    assert meant[1, 10, 8:16].tolist() == stored[1, 10, 24:32].tolist()
    assert torch.equal(bench.unswizzled(meant), stored)


def samples(bench, **changes: int | None):  # type: ignore[no-untyped-def]
    """A second of 400 W: a count that changes every 100 ms, a gauge that still remembers idling."""
    from gpu_gauge import Sample

    given = {"milliwatts": 300_000, "megahertz": 1500, **changes}
    return [Sample(**{"at": i / 100, "millijoules": 7 + i // 10 * 40_000, **given})
            for i in range(1, 101)]  # fmt: skip


def test_power_is_counted_between_changes(bench) -> None:
    from gpu_gauge import watts

    power, origin = watts(samples(bench))
    assert (power, origin) == (pytest.approx(400), "counter")
    assert watts(samples(bench, millijoules=None)) == (pytest.approx(300), "gauge")
    with pytest.raises(OSError, match="neither power nor energy"):
        watts(samples(bench, millijoules=None, milliwatts=None))


def test_figures_of_a_case(bench) -> None:
    from gpu_gauge import Case, figures

    case = Case(lambda: None, 1, nbytes=8 * 10**9, operations=10**12)
    found = figures(case, 2.0, samples(bench), base=150.0)
    assert found == {
        "ms": 2.0, "SM MHz": 1500, "W": 400.0, "W from": "counter", "W by the gauge": 300.0,
        "J": 0.8, "J above": 0.5, "bytes": 8 * 10**9, "TB/s": 4.0, "pJ a byte": 62.5,
        "operations": 10**12, "TFLOP/s": 500.0, "pJ an operation": 0.5,
    }  # fmt: skip


def test_a_step_is_scaled_from_what_was_measured(bench) -> None:
    weights = bench.step_weights(bench.config("starcoder"))
    assert weights == 40 * (6144 * (50 * 128 + 6144 + 2 * 24576)) + 49152 * 6144
    one = {"ms": 2.0, "J": 1.2, "J above": 1.0}
    found = bench.of_a_step(10**9, {
        "copies, normal": {**one, "bytes": 8 * 10**9},
        "products, normal": {**one, "operations": 1024 * 10**9},
        "both, normal": {"error": "OSError: no"}, "a step of 128": one,
    }, base=100.0, limit=700.0)  # fmt: skip
    assert found.pop("bytes") == 2 * 10**9
    assert found.pop("operations") == 256 * 10**9
    quarter = {"ms": 0.5, "J": 0.3, "J above": 0.25}
    added = {"ms": 0.833, "J": 0.583, "J above": 0.5}
    assert found == {
        "copies, normal": quarter, "products, normal": quarter,
        "copies and products, added, at 700 W": added,
    }  # fmt: skip


def test_what_fails_leaves_the_others(bench, monkeypatch, tmp_path) -> None:
    def fails() -> None:
        raise RuntimeError("no room")

    def measure(case, gauge, seconds, base):  # type: ignore[no-untyped-def]
        return {"W": 100.0, "J above": 5.0, "base": base, "ran": case.run()}

    monkeypatch.setattr(bench, "Gauge", lambda: SimpleNamespace(read=lambda name: None))
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: cycles)
    made = bench.Run(1.0, tmp_path / "out.json")
    made.spin()
    made.record("a", lambda: (bench.Case(fails, 1), {}))
    made.record("b", lambda: (bench.Case(lambda: 3, 1), {"more": 4}))
    cases_found = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases_found["one program spins"]["J above"] == 0
    assert cases_found["a"] == {"error": "RuntimeError: no room"}
    assert cases_found["b"] == {"W": 100.0, "J above": 5.0, "base": 100.0, "ran": 3, "more": 4}
