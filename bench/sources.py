"""How fast every kind of source is converted, beside a plain copy of its files, and at what cost.

    python bench/sources.py --scratch DIR

Each container holds about half a gigabyte of float32: GPT-2 of 124M, for NeMo's a GPT-2B of two
layers, as the tests' writers lay them out. In each round every source is copied (ending with
fsync) and converted in a process of its own, in turn. Kept are the seconds of both, the peak
resident memory of the converting process and the most that stood on the disk beside the source.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fastertransformer_writer
import megatron_writer
import nemo_writer
import openai_writer
import tiny
from convert import RESULTS, machine

SIZES = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
         "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}  # fmt: skip
GPT_2B = {"hidden_size": 2048, "ffn_hidden_size": 5440, "num_attention_heads": 16, "num_layers": 2}
NEMO_IDS = 8000
ALLOWANCE = 300_000_000

CHILD = """
import json, sys, time
from pathlib import Path
import torch  # imported before the clock starts
from porttool.api import convert
from porttool.progress import Progress

class Notes(Progress):
    notes = []
    def note(self, text):
        self.notes.append(text)

start, cpu = time.perf_counter(), time.process_time()
convert(sys.argv[1], Path(sys.argv[2]), options=json.loads(sys.argv[3]), progress=Notes())
seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak": peak, "notes": Notes.notes}))
"""


def write_gpt2(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Write GPT-2 in every container that its family reads; return paths and options."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES)).eval().requires_grad_(False)
    hugging, write = folder / "hf", tiny.write_source
    ids = {"vocab_size": SIZES["vocab_size"]}
    return {
        "safetensors": (write(hugging / "safetensors", model), {}),
        ".bin": (write(hugging / "bin", model, tiny.Form(file="pytorch_model.bin")), {}),
        "Megatron .pt": (megatron_writer.write_source(folder / "megatron", model, version=3), ids),
        "Megatron .pt of 2019": (
            megatron_writer.write_source(folder / "megatron_2019", model, zipped=False),
            {**ids, "n_head": SIZES["n_head"]},
        ),
        "Megatron, 2 ranks": (
            megatron_writer.write_source(folder / "megatron_2", model, version=3, tp=2), ids,
        ),
        "TensorFlow bundle": (openai_writer.write_source(folder / "tensorflow", model), {}),
        "FasterTransformer": (
            fastertransformer_writer.write_folder(folder / "1-gpu", model, 1), {},
        ),
        "FasterTransformer, 2 ranks": (
            fastertransformer_writer.write_folder(folder / "2-gpu", model, 2), {},
        ),
    }  # fmt: skip


def write_nemo(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Write a GPT-2B of few layers as a plain and as a gzipped archive."""
    values = {**nemo_writer.GPT_2B, **GPT_2B}
    plain, packed = folder / "plain.nemo", folder / "packed.nemo"
    nemo_writer.write(plain, values, nemo_writer.draw(values, vocab=NEMO_IDS))
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target, 1 << 22)
    return {".nemo": (plain, {}), ".nemo, gzipped": (packed, {})}


def files_of(source: Path) -> list[Path]:
    """Return a source's files."""
    return [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]


def size_of(source: Path) -> int:
    """Return the bytes of a file or of a folder's files; what vanishes meanwhile counts nothing."""
    if source.is_file():
        return source.stat().st_size
    total = 0
    for folder, _, names in os.walk(source):  # unlike rglob it passes over a folder that is gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def time_copy(source: Path, place: Path) -> float:
    """Return the seconds of a copy that ends when the bytes are on the disk."""
    place.mkdir()
    start = time.perf_counter()
    for number, file in enumerate(files_of(source)):
        with file.open("rb") as read, (place / str(number)).open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 22)
            written.flush()
            os.fsync(written.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(place)
    return seconds


def run_conversion(source: Path, options: dict[str, Any], place: Path) -> dict[str, Any]:
    """Convert in a process of its own; return its measurements and the most disk it used."""
    place.mkdir()
    most = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], size_of(place))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = [sys.executable, "-c", CHILD, str(source), str(place / "out")]
        done = subprocess.run(
            [*command, json.dumps(options)], check=True, stdout=subprocess.PIPE, text=True
        )
    finally:
        over.set()
        watcher.join()
    found = json.loads(done.stdout)
    written = size_of(place / "out")
    shutil.rmtree(place)
    return {**found, "written": written, "most_disk": max(most[0], written)}


def largest_tensor() -> dict[str, int]:
    """Return the bytes of the largest tensor of each model: what the memory bound counts."""
    width = GPT_2B["hidden_size"]
    fused = 2 * GPT_2B["ffn_hidden_size"] * width
    return {
        "gpt2": 4 * SIZES["vocab_size"] * SIZES["n_embd"],
        "gpt_next": 4 * max(NEMO_IDS * width, fused),
    }


def summary(name: str, source: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a source's row: rates of the best round, the median ratio, and every single time.

    The best round is the least disturbed one; processor seconds hardly depend on the neighbours.
    """
    n_bytes = size_of(source)
    seconds = min(run["seconds"] for run in runs)
    copy_s = min(run["copy_s"] for run in runs)
    ratios = [run["seconds"] / run["copy_s"] for run in runs]
    bound = 2 * largest_tensor()["gpt_next" if "nemo" in name else "gpt2"] + ALLOWANCE
    peak = max(run["peak"] for run in runs)
    return {
        "source": name, "bytes": n_bytes, "written": runs[0]["written"],
        "convert_s": [round(run["seconds"], 2) for run in runs],
        "copy_s": [round(run["copy_s"], 2) for run in runs],
        "cpu_s": [round(run["cpu_s"], 2) for run in runs],
        "convert_MB_s": round(runs[0]["written"] / 1e6 / seconds),
        "copy_MB_s": round(n_bytes / 1e6 / copy_s),
        "ratio_of_best": round(seconds / copy_s, 2),
        "median_ratio": round(statistics.median(ratios), 2),
        "peak_rss_MB": round(peak / 1e6), "bound_MB": round(bound / 1e6),
        "within_bound": peak <= bound,
        "disk_beside_MB": round(max(run["most_disk"] - run["written"] for run in runs) / 1e6),
        "notes": [note.replace(str(source.parent), "…") for note in runs[0]["notes"]],
    }  # fmt: skip


def main() -> None:
    """Write the sources, measure them in turn, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="folder with 12 GB of room")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    scratch = asked.scratch / f"porttool-bench-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        sources = write_gpt2(scratch) | write_nemo(scratch)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
        for _ in range(asked.rounds):
            for name, (source, options) in sources.items():
                copy_s = time_copy(source, scratch / "copy")
                found = run_conversion(source, options, scratch / "work")
                runs[name].append({**found, "copy_s": copy_s})
                print(f"{name}: {found['seconds']:.2f} s, copy {copy_s:.2f} s", flush=True)
        rows = [summary(name, sources[name][0], runs[name]) for name in sources]
    finally:
        shutil.rmtree(scratch)
    RESULTS.mkdir(exist_ok=True)
    kept = {"gpt2": SIZES, "gpt_next": {**GPT_2B, "ids": NEMO_IDS}, "rows": rows}
    text = json.dumps({**kept, "machine": machine()}, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / "sources.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
