"""GPT-2 124M on a CPU: porttool beside transformers, CTranslate2 and llama.cpp, in one run.

    python bench/cpu_decode.py [--threads 2] [--rounds 5] [--prompt 256] [--new 64] [--batch 1]

The same random weights go to every engine, each in a process of its own that sleeps while another
is measured; engines take turns, and each round begins with a probe of the memory's speed. Every
engine generates the same number of tokens greedily from the same prompt. Prefill is the time to
the first token, decode what follows, divided by the tokens that follow. A ratio is taken within a
round, and the median of the rounds is reported. Everything measured is kept in the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cpu_peers import make_ctranslate2, make_llama, make_transformers, write_sources

Generate = Callable[[list[list[int]], int], tuple[float, float, list[int]]]
"""Prompts and a number of tokens in; when the first and the last came, and the first row, out."""

RESULT = Path(__file__).parent / "results" / "cpu_decode.json"
PACKAGES = ("porttool", "torch", "transformers", "ctranslate2", "llama-cpp-python")
ENGINES: dict[str, tuple[str, str]] = {
    "transformers float32": ("transformers", "float32"),
    "porttool float32": ("porttool", "float32"),
    "porttool float32, with log-probabilities": ("porttool logprobs", "float32"),
    "porttool float32, plain torch": ("porttool plain", "float32"),
    "ctranslate2 float32": ("ctranslate2", "float32"),
    "llama.cpp float32": ("llama", "float32"),
    "transformers bfloat16": ("transformers", "bfloat16"),
    "porttool bfloat16": ("porttool", "bfloat16"),
    "porttool bfloat16, with log-probabilities": ("porttool logprobs", "bfloat16"),
    "porttool bfloat16, plain torch": ("porttool plain", "bfloat16"),
    "ctranslate2 bfloat16": ("ctranslate2", "bfloat16"),
    "llama.cpp bfloat16": ("llama", "bfloat16"),
}
QUANTISED: dict[str, tuple[str, str]] = {
    "ctranslate2 int8 (quantised)": ("ctranslate2", "int8"),
    "llama.cpp q8_0 (quantised)": ("llama", "q8_0"),
}


def make_porttool(folder: Path, dtype: str, kind: str) -> Generate:
    """Run the whole generation loop on an engine; `logprobs` asks for every step's logits."""
    from porttool.config import Sampling
    from porttool.engine import Engine
    from porttool.generate import generate
    from porttool.plugins import load_registry
    from porttool.runner import load_runner

    registry = load_registry()
    options = {"device": "cpu", "compiled": kind != "porttool plain"}
    runner = load_runner(Engine.open(folder / f"engine-{dtype}", registry), registry, options)
    print(f"  {runner.description}")

    def run(prompts: list[list[int]], n_new: int) -> tuple[float, float, list[int]]:
        seen: list[float] = []
        sampling = Sampling(
            max_new_tokens=n_new, ignore_eos=True, logprobs=kind == "porttool logprobs"
        )
        found = generate(
            runner, prompts, sampling, eos=(), on_token=lambda *_: seen.append(time.perf_counter())
        )
        return seen[0], seen[-1], list(found[0][0].tokens)

    return run


def make(kind: str, dtype: str, folder: Path, threads: int) -> Generate:
    """Load one engine in this process."""
    if kind.startswith("porttool"):
        return make_porttool(folder, dtype, kind)
    makers = {
        "transformers": make_transformers, "ctranslate2": make_ctranslate2, "llama": make_llama
    }  # fmt: skip
    return makers[kind](folder, dtype, threads)


def serve(pipe: Connection, kind: str, dtype: str, folder: Path, threads: int) -> None:
    """Load an engine, say whether that worked, then answer requests until None comes."""
    import torch

    torch.set_num_threads(threads)
    try:
        run = make(kind, dtype, folder, threads)
    except ImportError as error:
        pipe.send(f"not installed ({error.name})")
        return
    except (ValueError, RuntimeError) as error:  # ctranslate2 has no bfloat16 on most processors
        pipe.send(f"does not run: {error}")
        return
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        started = time.perf_counter()
        first, last, tokens = run(*request)
        steps = len(tokens) - 1
        pipe.send((1e3 * (first - started), 1e3 * (last - first) / steps, tokens))


class Worker:
    """One engine in a process of its own."""

    def __init__(self, name: str, kind: str, dtype: str, folder: Path, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, kind, dtype, folder, threads), daemon=True
        )
        self.process.start()
        theirs.close()
        self.rounds: list[tuple[float, float]] = []
        self.tokens: list[int] = []
        self.state = "loading"
        self.state = self.receive() or self.state
        print(f"{name}: {self.state}", flush=True)

    def receive(self) -> Any:
        """Wait for an answer; None, and a new state, if the process died (llama.cpp may)."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            self.state, self.rounds = f"died with {self.process.exitcode}", []
            return None

    def measure(self, prompts: list[list[int]], n_new: int, *, keep: bool = True) -> None:
        """Generate once."""
        self.pipe.send((prompts, n_new))
        found = self.receive()
        if found is None:
            print(f"{self.name}: {self.state}", flush=True)
        elif keep:
            prefill, decode, self.tokens = found
            print(f"  {self.name:38} {prefill:9.1f} {decode:9.2f}", flush=True)
            self.rounds.append((round(prefill, 2), round(decode, 3)))

    def stop(self) -> None:
        """End the process."""
        if self.state == "ready":
            self.pipe.send(None)
        self.process.join()


def alive(workers: list[Worker]) -> list[Worker]:
    """The engines that can be asked."""
    return [w for w in workers if w.state == "ready"]


def read_speed(threads: int) -> float:
    """GB/s at which the memory is read: the best of three sums over 512 MB."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 27)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return round(data.nbytes / min(times) / 1e9, 1)


def summarise(workers: list[Worker], rounds: int) -> dict[str, Any]:
    """Medians of every engine, and its ratios to transformers in the same type."""
    by_name = {w.name: w for w in workers}
    found: dict[str, Any] = {}
    for worker in workers:
        if not worker.rounds:
            found[worker.name] = worker.state
            continue
        prefills, decodes = zip(*worker.rounds, strict=True)
        base = by_name[f"transformers {'bfloat16' if 'bfloat16' in worker.name else 'float32'}"]
        found[worker.name] = {
            "decode_ms_per_token": statistics.median(decodes),
            "prefill_ms": statistics.median(prefills),
            "decode_speedup": ratio(base, worker, 1, rounds),
            "prefill_speedup": ratio(base, worker, 0, rounds),
            "tokens_as_transformers": sum(map(int.__eq__, worker.tokens, base.tokens)),
            "rounds_prefill_decode_ms": worker.rounds,
        }
    return found


def ratio(base: Worker, worker: Worker, which: int, rounds: int) -> float:
    """Median over rounds of transformers' time divided by this engine's."""
    pairs = [(base.rounds[i][which], worker.rounds[i][which]) for i in range(rounds)]
    return round(statistics.median(theirs / ours for theirs, ours in pairs), 2)


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'engine':38} {'decode ms':>10} {'x':>6} {'prefill ms':>11} {'x':>6}")
    for name, row in results.items():
        if isinstance(row, str):
            print(f"{name:38} {row}")
            continue
        print(
            f"{name:38} {row['decode_ms_per_token']:10.2f} {row['decode_speedup']:6.2f} "
            f"{row['prefill_ms']:11.1f} {row['prefill_speedup']:6.2f}"
        )


def cpu_model() -> str:
    """The processor's name, as the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((s.split(":")[1].strip() for s in lines if "model name" in s), platform.machine())


def versions() -> dict[str, str]:
    """What is installed of the packages compared."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("threads", 2), ("rounds", 5), ("prompt", 256), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", default="", help="engines whose name holds this text")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    asked = arguments()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    chosen = {n: e for n, e in (ENGINES | QUANTISED).items() if asked.only in n}
    chosen |= {n: e for n, e in ENGINES.items() if n.startswith("transformers")}
    if asked.batch > 1:  # llama.cpp's side here feeds one row
        chosen = {n: e for n, e in chosen.items() if e[0] != "llama"}
    prompts = [[(7919 * i + 104729 * row) % 50257 for i in range(asked.prompt)]
               for row in range(asked.batch)]  # fmt: skip
    speeds, loads = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder, asked.batch, asked.prompt, asked.new)
        workers = [Worker(n, *chosen[n], folder, asked.threads) for n in chosen]
        for worker in alive(workers):
            worker.measure(prompts, 4, keep=False)
        for _ in range(asked.rounds):
            speeds.append(read_speed(asked.threads))
            loads.append(round(os.getloadavg()[0], 2))
            for worker in alive(workers):
                worker.measure(prompts, asked.new)
                time.sleep(0.3)  # threads of some engines spin for a while after their work
        for worker in workers:
            worker.stop()
    results = summarise(workers, asked.rounds)
    show(results)
    record = {
        "what": "GPT-2 124M, random weights", "cpu": cpu_model(), "threads": asked.threads,
        "prompt": asked.prompt, "new_tokens": asked.new, "batch": asked.batch,
        "read_gb_per_s_by_round": speeds, "load_by_round": loads, "versions": versions(),
        "engines": results,
    }  # fmt: skip
    asked.output.parent.mkdir(exist_ok=True)
    asked.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
