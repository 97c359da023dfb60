"""Where a Hopper GPU's power goes in a decoded step: copies, products, both, and whole steps.

    python bench/gpu_power.py [--models starcoder] [--rows 1,32,128] [--seconds 1] [--out FILE]

`gpu_power.cu` does what products of 128 rows cannot do without, and nothing else: `copies` of
weights to shared memory, `products` of what stays there (m64n128k16, weights as first factor, 192
columns a program), `both` with activations that stay, and both with activations that come from the
L2 cache beside every slot, as in a decoded step. Each of normally distributed numbers and of zeros.
Beside them the library's product, one spinning program, and greedy steps after prompts of 512
tokens, random weights at the models' true sizes.

Every case runs for `--seconds` unmeasured, then as long again: ms is the median of its calls, SM
MHz the median of the clock, W from the driver's count of energy between two of its changes (`W
from` says `gauge` where it does not count; the gauge, an average over the last second, is listed
too). J is of a call, with all power; `J above`, pJ a byte and pJ an operation are beyond the power
of one spinning program, and where a case has bytes and operations each is all of it. At the end
cases are scaled to the weights of one step of 128 rows: what it takes at least.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_gauge import Case, Gauge, measure
from gpu_models import config
from porttool.config import Limits, ModelConfig
from porttool.engines.torch import cuda_compile
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_compile import INTEGER, POINTER, CompilerUnavailable
from porttool.engines.torch.cuda_hopper import ARCH, programs_of, sources
from porttool.engines.torch.cuda_measure import random_weights
from porttool.errors import PorttoolError
from porttool.nn import Step

RESULTS = Path(__file__).parent / "results"
PROMPT = 512
ROWS, COLUMNS, CHUNK = 128, 192, 64  # of the kernels' tiles; inner elements of a slot
SLOTS = 6144  # that a program fills or multiplies in a call: 20 GB of weights on an H200
BESIDE = "both, activations from the L2 cache"
KERNELS: dict[str, dict[str, int]] = {
    "copies": {"STAGES": 8, "STEPS": 1, "BESIDE": 0, "STREAMED": 1, "MULTIPLIED": 0},
    "products": {"STAGES": 5, "STEPS": 5, "BESIDE": 0, "STREAMED": 0, "MULTIPLIED": 1},
    "both": {"STAGES": 6, "STEPS": 4, "BESIDE": 0, "STREAMED": 1, "MULTIPLIED": 1},
    BESIDE: {"STAGES": 5, "STEPS": 96, "BESIDE": 1, "STREAMED": 1, "MULTIPLIED": 1},
}
LIBRARY, SIDE = "the library's product, 8192^3", 8192


def macros(name: str) -> dict[str, int]:
    """Return what the source of a kernel finds defined; a kilobyte aligns, one holds barriers."""
    given = {"BF16": 0, "BLOCK_M": ROWS, "BLOCK_N": COLUMNS, **KERNELS[name]}
    inputs = given["STAGES" if given["BESIDE"] else "STEPS"]
    slots = given["STAGES"] * COLUMNS + inputs * ROWS
    return {**given, "SHARED": slots * CHUNK * 2 + 2048}


def compiled(name: str) -> bytes:
    """Return a kernel's machine code."""
    parts = {path.name: path for path in sources("cluster_linear")}
    files = [parts[part] for part in ("machine.cuh", "overlap.cuh", "warpgroup.cuh")]
    source = "\n".join(f.read_text() for f in [*files, Path(__file__).with_suffix(".cu")])
    return cuda_compile.compile_cubin(source, name="power", arch=ARCH, macros=macros(name))


def unswizzled(tiles: Tensor) -> Tensor:
    """Return tiles [n, rows, 64] as they are meant: of row r unit u of 8 lies at u ^ (r % 8)."""
    n, rows, _ = tiles.shape
    row = torch.arange(rows, device=tiles.device)[:, None]
    units = torch.arange(8, device=tiles.device) ^ row % 8
    return tiles.view(n, rows, 8, 8)[:, row, units].reshape(n, rows, CHUNK)


def wanted(defined: dict[str, int], weights: Tensor, inputs: Tensor, programs: int) -> Tensor:
    """Return what a kernel leaves, float32 [programs, columns, rows], in plain torch."""
    out = torch.zeros(programs, weights.shape[1], inputs.shape[1], device=weights.device)
    taken, x = weights.split(programs), unswizzled(inputs).float()
    for i, chunks in enumerate(taken):
        w = chunks if defined["STREAMED"] else taken[i % defined["STAGES"]][: len(chunks)]
        out[: len(chunks)] += unswizzled(w).float() @ x[i % defined["STEPS"]].T
    return out


class Kernel:
    """A kernel on the GPU, a program on each multiprocessor, checked against plain torch."""

    def __init__(self, name: str) -> None:
        self.defined, self.programs = macros(name), programs_of("cuda")
        threads = COLUMNS // 64 * 128 + 32
        self._kernel = cuda_compile.CompiledKernel(
            compiled(name), "power", threads=threads, shared=self.defined["SHARED"]
        )
        self.out = torch.full((self.programs, COLUMNS, ROWS), torch.nan, device="cuda")
        if self.defined["MULTIPLIED"]:
            self._check()

    def launch(self, weights: Tensor, inputs: Tensor) -> None:
        """Enqueue it: weights [chunks, 192, 64], inputs [steps, 128, 64], float16."""
        values = weights.data_ptr(), inputs.data_ptr(), self.out.data_ptr(), len(weights)
        kinds = POINTER, POINTER, POINTER, INTEGER
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel.launch_together(self.programs, stream, values, kinds)

    def _check(self) -> None:
        chunks = self.programs * (2 * self.defined["STAGES"] + 1) + 7
        weights, inputs = drawn(chunks)
        self.launch(weights, inputs)
        right = wanted(self.defined, weights, inputs, self.programs)
        self.error = float((self.out - right).abs().max() / right.std())
        if not self.error < 1e-3:
            raise ArithmeticError(f"wrong products: {self.error:.1e} of their deviation")


def drawn(chunks: int) -> tuple[Tensor, Tensor]:
    """Return weights and activations, drawn from normal distributions."""
    weights = torch.empty(chunks, COLUMNS, CHUNK, dtype=torch.float16, device="cuda")
    inputs = torch.empty(KERNELS[BESIDE]["STEPS"], ROWS, CHUNK, dtype=torch.float16, device="cuda")
    return weights.normal_(0, 0.02), inputs.normal_()


def kernel_case(
    name: str, values: str, weights: Tensor, inputs: Tensor
) -> tuple[Case, dict[str, Any]]:
    """Return a kernel's case, and how far its products were from the right ones."""
    kernel = Kernel(name)
    if values == "zeros":
        weights.zero_()
        inputs.zero_()

    def run() -> None:
        for _ in range(4):
            kernel.launch(weights, inputs)

    operations = 2 * ROWS * weights.numel() if kernel.defined["MULTIPLIED"] else 0
    checked = {"largest error": kernel.error} if operations else {}
    nbytes = weights.nbytes if kernel.defined["STREAMED"] else 0
    return Case(run, 4, nbytes, operations), checked


def library_case(values: str) -> Case:
    """Return the case of a large product of the library's."""
    a, b = (torch.zeros(SIDE, SIDE, dtype=torch.float16, device="cuda") for _ in range(2))
    if values == "normal":
        a.normal_()
        b.normal_(0, 0.02)
    out = torch.empty_like(a)
    return Case(lambda: [torch.mm(a, b, out=out) for _ in range(4)], 4, 0, 2 * SIDE**3)


def step_weights(c: ModelConfig) -> int:
    """Return the elements of the matrices that a step multiplies, the head's too."""
    layer = c.qkv_dim + c.n_head * c.head_dim + c.up_dim + c.d_ff
    return (c.n_layer * layer + c.vocab_size) * c.d_model


def decoder_of(c: ModelConfig, rows: int, tuning: Any) -> CudaDecoder:
    """Load random weights and feed a prompt to each row."""
    limits = Limits(max_batch_size=rows, max_input_len=924, max_output_len=68)
    weights = random_weights(c, torch.float16, "cuda")
    made = CudaDecoder(c, weights, dtype=torch.float16, limits=limits, tuning=tuning)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, c.vocab_size, (rows, PROMPT), generator=generator)
    zeros = torch.zeros(rows, dtype=torch.int64)
    made.step(Step(torch.arange(rows), tokens, zeros, zeros + PROMPT))
    return made


def step_case(decoder: CudaDecoder, n: int) -> Case:
    """Return the case of greedy steps of n rows."""
    ones = torch.ones(n, dtype=torch.int64)
    decoder.decode(Step(torch.arange(n), ones[:, None], ones * PROMPT, ones), 8)

    def run() -> None:
        decoder.rewind(n, PROMPT)
        for _ in range(3):
            decoder.replay_greedy(n, 8)

    weights = step_weights(decoder.config)
    return Case(run, 24, 2 * weights, 2 * n * weights)


def of_a_step(
    weights: int, cases: dict[str, Any], base: float, limit: float | None
) -> dict[str, Any]:
    """Scale what was measured to a step of 128 rows that has so many weights.

    The last line is copies and products of normal numbers one after the other, at `limit` watts.
    """
    whole = {"bytes": 2 * weights, "operations": 2 * ROWS * weights}
    out: dict[str, Any] = dict(whole)
    for name, found in cases.items():
        if "error" in found or not name.startswith((*KERNELS, LIBRARY)):
            continue
        times = next(whole[key] / found[key] for key in whole if key in found)
        out[name] = {key: round(times * found[key], 3) for key in ("ms", "J", "J above")}
    parts = [out[name]["J above"] for name in ("copies, normal", "products, normal") if name in out]
    if len(parts) == 2 and limit is not None:
        above = round(sum(parts), 3)
        seconds = above / (limit - base)
        both = {"ms": round(1000 * seconds, 3), "J": round(seconds * limit, 3), "J above": above}
        out[f"copies and products, added, at {limit:.0f} W"] = both
    return out


FAILURES = (RuntimeError, ArithmeticError, OSError, PorttoolError, CompilerUnavailable)


class Run:
    """What was found so far, printed and written case by case."""

    def __init__(self, seconds: float, out: Path) -> None:
        self.seconds, self.out, self.gauge, self.base = seconds, out, Gauge(), 0.0
        limit = self.gauge.read("EnforcedPowerLimit")
        self.limit = None if limit is None else limit / 1000
        self.result: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "power limit W": self.limit, "seconds a case": seconds, "cases": {},
        }  # fmt: skip

    def keep(self, part: str, name: str, found: dict[str, Any]) -> None:
        """Print something found and write it with all before it."""
        self.result.setdefault(part, {})[name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def record(self, name: str, made: Callable[[], tuple[Case, dict[str, Any]]]) -> None:
        """Measure a case; what goes wrong is its result, and the others go on."""
        try:
            case, more = made()
            found = measure(case, self.gauge, self.seconds, self.base) | more
        except FAILURES as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        self.keep("cases", name, found)

    def spin(self) -> None:
        """Measure what the others are compared with: a thread's 10 ms without memory."""
        case = Case(lambda: torch.cuda._sleep(20_000_000), 1)
        found = measure(case, self.gauge, self.seconds, 0.0)
        self.base = found["W"]
        self.keep("cases", "one program spins", found | {"J above": 0.0})

    def steps(self, name: str, rows: list[int], tuning: Any) -> None:
        """Measure a model's steps."""
        try:
            decoder = decoder_of(config(name), max(rows), tuning)
        except FAILURES as error:
            self.keep("cases", name, {"error": f"{type(error).__name__}: {error}"})
            return
        more = {"engine": decoder.description}
        for n in rows:
            self.record(f"{name}, a step of {n}", lambda n=n: (step_case(decoder, n), more))

    def kernels(self) -> None:
        """Measure the kernels, with normal numbers and with zeros."""
        weights, inputs = drawn(programs_of("cuda") * SLOTS)
        for values in ("normal", "zeros"):
            for name in KERNELS:
                self.record(
                    f"{name}, {values}", lambda n=name, v=values: kernel_case(n, v, weights, inputs)
                )


def main() -> None:
    """Measure; print and write every case, and at last what a step takes at least."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="starcoder")
    parser.add_argument("--rows", default="1,32,128")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tuning", type=Path, default=RESULTS / "gpu_tuning.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_power.json")
    arguments = parser.parse_args()
    tunings = json.loads(arguments.tuning.read_text())
    models, rows = arguments.models.split(","), [int(n) for n in arguments.rows.split(",")]
    run = Run(arguments.seconds, arguments.out)
    with torch.inference_mode():
        run.spin()
        for values in ("normal", "zeros"):
            run.record(f"{LIBRARY}, {values}", lambda v=values: (library_case(v), {}))
        for name in models:
            run.steps(name, rows, tunings.get(name))
            gc.collect()
            torch.cuda.empty_cache()
        run.kernels()
    for name in models:
        found = of_a_step(step_weights(config(name)), run.result["cases"], run.base, run.limit)
        run.keep("of a step of 128 rows", name, found)


if __name__ == "__main__":
    main()
