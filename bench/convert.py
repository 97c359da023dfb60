"""How fast conversion is beside a plain copy of the bytes that it writes, and what memory it takes.

    python bench/convert.py --scratch DIR                 GPT-2 XL, safetensors and .bin
    python bench/convert.py --scratch DIR --camel5b       5.05 B parameters in three .bin shards

Sources hold random numbers and are written shard by shard. Conversion and copy are timed in turn;
a durable run ends when the bytes are on the disk (fsync), a cached one when they are in memory.
Results go to bench/results, medians beside every single time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from porttool.api import convert

RESULTS = Path(__file__).parent / "results"
XL = {"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024, "vocab_size": 50257}
CAMEL = {
    "n_embd": 4096, "n_head": 32, "n_layer": 24, "n_positions": 2048, "vocab_size": 50258,
    "activation_function": "gelu",
}  # fmt: skip


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a GPT-2 source, in the order of the model."""
    d = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], d), "wpe.weight": (config["n_positions"], d),
    }  # fmt: skip
    layer = {
        "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,), "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,), "ln_2.bias": (d,), "mlp.c_fc.weight": (d, 4 * d),
        "mlp.c_fc.bias": (4 * d,), "mlp.c_proj.weight": (4 * d, d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip
    for i in range(config["n_layer"]):
        shapes |= {f"h.{i}.{name}": shape for name, shape in layer.items()}
    return {**shapes, "ln_f.weight": (d,), "ln_f.bias": (d,)}


def write_source(folder: Path, config: dict[str, Any], file: str, n_shards: int = 3) -> Path:
    """Write a float32 source of random numbers, one shard in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    shapes = tensor_shapes(config)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    stem, suffix = file.rsplit(".", 1)
    where: dict[str, str] = {}
    done = 0
    for name, shape in shapes.items():
        index = min(n_shards, done * n_shards // total + 1)
        where[name] = f"{stem}-{index:05}-of-{n_shards:05}.{suffix}"
        done += torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    for shard in dict.fromkeys(where.values()):
        tensors = {n: torch.empty(s).normal_(0, 0.02, generator=generator)
                   for n, s in shapes.items() if where[n] == shard}  # fmt: skip
        save_file(tensors, folder / shard) if suffix == "safetensors" else torch.save(
            tensors, folder / shard
        )
        del tensors
    (folder / f"{file}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weight files."""
    return sum(f.stat().st_size for f in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's weight files."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))


def plain_copy(source: Path, target: Path) -> None:
    """Copy the weight files and push them to the disk."""
    target.mkdir()
    for file in weight_files(source):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


@contextlib.contextmanager
def syncing(durable: bool) -> Iterator[None]:
    """Leave out every fsync of this process unless the run is to be durable."""
    real = os.fsync
    if not durable:
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


def timed(work: Callable[[Path], Any], target: Path, keep: bool = False) -> float:
    """Return the seconds that a piece of work takes; what it wrote is deleted afterwards."""
    start = time.perf_counter()
    work(target)
    seconds = time.perf_counter() - start
    if not keep:
        shutil.rmtree(target)
    return seconds


def compare(
    scratch: Path, config: dict[str, Any], rounds: int, durable: bool
) -> list[dict[str, Any]]:
    """Time conversions and copies in turn; return one row for each format and dtype."""
    sources = {
        file: write_source(scratch / file.replace(".", "_"), config, file)
        for file in ("model.safetensors", "pytorch_model.bin")
    }
    source = sources["model.safetensors"]
    convert(source, scratch / "half", dtype="float16")
    copies = {"float32": source, "float16": scratch / "half"}
    times: dict[tuple[str, str], list[float]] = {}
    with syncing(durable):
        for _ in range(rounds):
            for dtype, copied in copies.items():
                key = ("copy", dtype)
                seconds = timed(lambda out, c=copied: plain_copy(c, out), scratch / "out")
                times.setdefault(key, []).append(seconds)
                for file, folder in sources.items():
                    seconds = timed(lambda out, f=folder, d=dtype: convert(f, out, dtype=d),
                                    scratch / "out")  # fmt: skip
                    times.setdefault((file, dtype), []).append(seconds)
    rows = [summary(file, dtype, times, weight_bytes(copies[dtype]))
            for file in sources for dtype in copies]  # fmt: skip
    for folder in (*sources.values(), scratch / "half"):
        shutil.rmtree(folder)
    return rows


def summary(
    file: str, dtype: str, times: dict[tuple[str, str], list[float]], n_bytes: int
) -> dict[str, Any]:
    """Return one row: medians, rates, and how many times as long as the copy it took."""
    ours, copy = times[file, dtype], times["copy", dtype]
    return {
        "source": file, "from": "float32", "to": dtype, "bytes_written": n_bytes,
        "convert_s": ours, "copy_s": copy,
        "convert_MB_s": round(n_bytes / 1e6 / statistics.median(ours), 1),
        "copy_MB_s": round(n_bytes / 1e6 / statistics.median(copy), 1),
        "ratio": round(statistics.median(ours) / statistics.median(copy), 3),
    }  # fmt: skip


CHILD = """
import json, sys, time
from pathlib import Path
from porttool.api import convert

start = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}))
"""


def measure_camel(scratch: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Convert a source of camel-5b's true size in a process of its own."""
    start = time.perf_counter()
    source = write_source(scratch / "camel5b", config, "pytorch_model.bin")
    written = time.perf_counter() - start
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(scratch / "out")],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    shapes = tensor_shapes(config)
    largest = 4 * max(torch.Size(s).numel() for s in shapes.values())
    found = json.loads(child.stdout)
    n_bytes = weight_bytes(scratch / "out")
    bound = 2 * largest + 300_000_000
    result = {
        "parameters": sum(torch.Size(s).numel() for s in shapes.values()),
        "source_bytes": weight_bytes(source), "shards": len(weight_files(source)),
        "source_written_s": round(written, 1), "bytes_written": n_bytes, **found,
        "MB_s": round(n_bytes / 1e6 / found["seconds"], 1),
        "largest_tensor_bytes": largest, "bound_bytes": bound,
        "within_bound": found["peak_rss_bytes"] <= bound,
    }  # fmt: skip
    shutil.rmtree(source)
    shutil.rmtree(scratch / "out")
    return result


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "cpus": os.cpu_count(), "load_1min": os.getloadavg()[0], "torch": torch.__version__,
        "python": platform.python_version(), "time": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="folder with enough room")
    parser.add_argument("--camel5b", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cached", action="store_true", help="without fsync")
    asked = parser.parse_args()
    scratch = asked.scratch / f"porttool-bench-{os.getpid()}"
    scratch.mkdir(parents=True)
    config = dict(CAMEL if asked.camel5b else XL)
    config["n_layer"] = asked.layers or config["n_layer"]
    RESULTS.mkdir(exist_ok=True)
    try:
        if asked.camel5b:
            keep("convert_camel5b.json", {"config": config, **measure_camel(scratch, config)})
        else:
            rows = compare(scratch, config, rounds=asked.rounds, durable=not asked.cached)
            mode = "cached" if asked.cached else "durable"
            keep("convert.json", {mode: {"config": config, "rows": rows}})
    finally:
        shutil.rmtree(scratch)


def keep(name: str, found: dict[str, Any]) -> None:
    """Put results beside those that are there, and print them."""
    file = RESULTS / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    stamped = {k: {**v, "machine": machine()} if k in ("cached", "durable") else v
               for k, v in found.items()}  # fmt: skip
    if "cached" not in found and "durable" not in found:
        before, stamped = {}, {**found, "machine": machine()}
    file.write_text(json.dumps(before | stamped, indent=1) + "\n")
    print(json.dumps(stamped, indent=1))


if __name__ == "__main__":
    main()
