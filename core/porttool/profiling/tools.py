"""Command lines of NVIDIA's profilers around one run of the steps, and running them where they are.

Inside a tool the steps run without torch's profiler: only one can read a GPU's activity.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from porttool.errors import EngineError, UsageError

Tool = Literal["nsys", "ncu"]
COUNTERS = "ncu.csv"
"""What ncu writes into the output folder."""
STDERR = 2


def tool_command(tool: Tool, run: Sequence[str], output: Path) -> list[str]:
    """Return a command that runs another one under a tool.

    nsys: a trace with our ranges and the kernels inside CUDA graphs. ncu: the counters of two
    sections for every kernel of our ranges, warm-up left out, as CSV, at the clocks that the GPU
    has by itself; it needs the right to read counters.
    """
    if tool == "nsys":
        traced = "--trace=cuda,cudnn,cublas,osrt,nvtx"
        return ["nsys", "profile", traced, "--cuda-graph-trace=node", "--force-overwrite=true",
                "-o", str(output / "nsys"), *run]  # fmt: skip
    counted = ["--section", "ComputeWorkloadAnalysis", "--section", "SpeedOfLight"]
    ranges = ["--nvtx", "--nvtx-include", "porttool.prefill/", "--nvtx-include",
              "porttool.decode/"]  # fmt: skip
    return ["ncu", *counted, "--csv", "--graph-profiling", "node", "--clock-control", "none",
            "--target-processes", "all", *ranges, "--log-file", str(output / COUNTERS),
            *run]  # fmt: skip


def run_tool(command: Sequence[str]) -> None:
    """Run a tool's command; UsageError if it is not installed, EngineError if it fails.

    What it prints goes to standard error: standard output is for what was found.
    """
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{command[0]} is not installed here, or not on the PATH; it comes with NVIDIA's "
            f"developer tools. The command would be: {shlex.join(command)}"
        )
    done = subprocess.run(command, check=False, stdout=STDERR)
    if done.returncode:
        raise EngineError(
            f"{command[0]} ended with status {done.returncode}; see what it printed, and "
            f"{COUNTERS} if it is ncu. The command was: {shlex.join(command)}"
        )
