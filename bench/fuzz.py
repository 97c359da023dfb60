"""Feeds damaged and hostile inputs to every reader, and says what each of them did.

    python bench/fuzz.py --count 2000 --seed 1 --output bench/results/fuzz.json
    python bench/fuzz.py --container tf_bundle --seed 1 --index 17         one input again
    python bench/fuzz.py --table bench/results/fuzz.json                   the table of the docs

Every input is drawn from the container's name, the seed and its index. Workers judge them one
after another, under a limit on memory; one that dies or hangs is a finding too, and another goes
on behind it. Exits with 1 when there is a finding, of which the first of each container are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

PATIENCE = 30
"""Seconds without a word after which a worker is killed."""

ROOM = 2 << 30
"""Bytes of address space that a worker may take beyond what it has when it begins."""


TITLES = {
    "safetensors": "`.safetensors`", "configs": "configs, index and tokenizer (JSON)",
    "torch_zip": "torch zip (`.bin`)", "torch_legacy": "torch's old format (`.bin`)",
    "megatron": "torch zip of Megatron-LM (`.pt`)", "nemo_tar": "`.nemo`: tar, YAML, torch zip",
    "nemo_tar_gz": "`.nemo`, gzipped", "tf_bundle": "TensorFlow index and data",
    "fastertransformer": "`config.ini` and raw `.bin`, ours",
    "fastertransformer_old": "`config.ini` and raw `.bin`, of others",
    "npy_table": "`.npy` prompt table", "npy_tokens": "`.npy` token ids",
    "csv_tokens": "`.csv` token ids", "checkpoint": "our checkpoint folder",
    "engine": "our engine folder, loaded and run",
    "onnx_engine": "our ONNX engine folder, loaded and run",
    "prompt_table": "our prompt table folder",
}  # fmt: skip


def main() -> int:
    """Run what the arguments say."""
    arguments = parse()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["containers"]))
        return 0
    if arguments.worker:
        return work(arguments)
    from fuzzing.containers import CONTAINERS

    names = [arguments.container] if arguments.container else list(CONTAINERS)
    found = {}
    for name in names:
        verdicts = list(judged(name, arguments))
        found[name] = summarize(verdicts)
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "findings"}))
        for finding in found[name]["findings"][: arguments.show]:
            print(f"  {finding['index']}: {finding['damage']}\n    {finding['detail']}")
        if arguments.index is not None:
            print(json.dumps(verdicts[0], indent=1))
    if arguments.output:
        write(arguments, found)
    return int(any(container["findings"] for container in found.values()))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--container", help="one container only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000, help="inputs of each container")
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--index", type=int, help="this input only")
    parser.add_argument("--show", type=int, default=5, help="findings of a container to show")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--table", type=Path, help="a result to show as a table, nothing else")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.index is not None:
        arguments.first, arguments.count = arguments.index, 1
    return arguments


def work(arguments: argparse.Namespace) -> int:
    """Judge inputs, one line of JSON before each and one after it."""
    sys.dont_write_bytecode = True
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may get among the lines
    import torch

    from fuzzing.containers import CONTAINERS
    from fuzzing.judge import Judge, Watch, status

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=scratch()) as box:
        os.chdir(box)
        judge = Judge(CONTAINERS[arguments.container], Path(box), Watch())
        limit = status("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for index in range(arguments.first, arguments.first + arguments.count):
            print(json.dumps({"begun": index}), file=report, flush=True)
            verdict = asdict(judge.judge(arguments.seed, index))
            print(json.dumps({"index": index, **verdict}), file=report, flush=True)
    return 0


def scratch() -> str | None:
    """A folder in memory, if there is one: thousands of small files are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def judged(container: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every input's verdict."""

    def command(first: int, count: int) -> list[str]:
        return [
            sys.executable, __file__, "--worker", "--container", container,
            "--seed", str(arguments.seed), "--first", str(first), "--count", str(count),
        ]  # fmt: skip

    return supervised(command, arguments.first, arguments.count)


def supervised(
    command: Callable[[int, int], list[str]], first: int, count: int, patience: float = PATIENCE
) -> Iterator[dict[str, Any]]:
    """Yield the verdicts of workers, starting another behind an input that one does not survive."""
    end = first + count
    while first < end:
        with tempfile.TemporaryFile() as errors:
            worker = subprocess.Popen(
                command(first, end - first), stdout=subprocess.PIPE, stderr=errors
            )
            begun = None
            for line in lines(worker, patience):
                verdict = json.loads(line)
                begun = verdict.get("begun")
                if begun is None:
                    first = verdict["index"] + 1
                    yield verdict
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
            errors.seek(0)
            said = errors.read()[-2000:].decode(errors="replace")
        if begun is None and first < end:
            raise SystemExit(f"the worker cannot start:\n{said}")
        if begun is not None:
            detail = f"the process ended ({worker.returncode}): {said[-300:]}"
            yield {"index": begun, "outcome": "finding", "damage": "replay it", "detail": detail,
                   "seconds": float(patience), "n_bytes": 0}  # fmt: skip
            first = begun + 1


def lines(worker: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Yield a worker's lines until it ends or says nothing for too long."""
    assert worker.stdout is not None
    pending = b""
    while select.select([worker.stdout], [], [], patience)[0]:
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            worker.wait(patience)
            return
        *whole, pending = (pending + data).split(b"\n")
        yield from whole


def summarize(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Count outcomes; keep the slowest input, the largest and every finding."""
    slowest = max(verdicts, key=lambda v: v["seconds"])
    largest = max(verdicts, key=lambda v: v["n_bytes"])
    counts = Counter(v["outcome"] for v in verdicts)
    return {
        "inputs": len(verdicts),
        **{outcome: counts[outcome] for outcome in ("refused", "equal", "changed", "finding")},
        "seconds": round(sum(v["seconds"] for v in verdicts), 1),
        "slowest": {"index": slowest["index"], "seconds": round(slowest["seconds"], 3)},
        "largest": {"index": largest["index"], "bytes": largest["n_bytes"]},
        "findings": [v for v in verdicts if v["outcome"] == "finding"],
    }


def table(containers: dict[str, Any]) -> str:
    """Show a result as the documentation does."""
    rows = ["| input | inputs | refused | read, equal | read, other values | findings | "
            "slowest, s | most memory, MB |", "| --- |" + " ---: |" * 7]  # fmt: skip
    for name, c in containers.items():
        numbers = [c[k] for k in ("inputs", "refused", "equal", "changed", "finding")]
        slowest, largest = c["slowest"]["seconds"], c["largest"]["bytes"] / 1e6
        cells = [TITLES[name], *map(str, numbers), f"{slowest:.2f}", f"{largest:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write the result with what it was made with."""
    import platform
    from importlib.metadata import version

    import torch

    made = {"python": platform.python_version(), "torch": torch.__version__,
            "onnxruntime": version("onnxruntime"), "seed": arguments.seed,
            "containers": found}  # fmt: skip
    arguments.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
