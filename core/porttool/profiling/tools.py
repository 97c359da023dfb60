"""Command lines of NVIDIA's profilers around one profiled run, and running them where they are."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from porttool.errors import EngineError, UsageError

Tool = Literal["nsys", "ncu"]


def tool_command(tool: Tool, arguments: Sequence[str], output: Path) -> list[str]:
    """Return a command that runs `porttool ARGUMENTS` under a tool.

    nsys: a trace with our ranges and the kernels inside CUDA graphs. ncu: the counters of the
    section ComputeWorkloadAnalysis of every kernel, as CSV; it needs the right to read them.
    """
    run = ["porttool", *arguments]
    if tool == "nsys":
        traced = "--trace=cuda,nvtx,cublas,osrt"
        report = str(output / "nsys")
        return ["nsys", "profile", traced, "--cuda-graph-trace=node", "--force-overwrite=true",
                "-o", report, *run]  # fmt: skip
    section = ["--section", "ComputeWorkloadAnalysis", "--csv", "--graph-profiling", "node"]
    return ["ncu", *section, "--log-file", str(output / "ncu.csv"), *run]


def run_tool(command: Sequence[str]) -> None:
    """Run a tool's command; UsageError if it is not installed, EngineError if it fails."""
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{command[0]} is not installed here; it comes with NVIDIA's developer tools. "
            f"The command would be: {' '.join(command)}"
        )
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise EngineError(f"{command[0]} ended with status {done.returncode}; see what it printed")
