"""Runs porttool's commands in forks of a process that has everything imported.

Requests and answers are lines of JSON. A command is {"arguments", "log", "events", "watch", "at",
"action", "shard_bytes"} and is answered by its process id; {"wait": id} by its exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}
IMPORTED = (
    "onnx", "onnxruntime", "torch._dynamo", "porttool.engines.onnx.blocks",
    "porttool.engines.onnx.weights", "porttool.engines.torch.cpu", "porttool.prompt_table",
    "porttool.cli.build", "porttool.cli.convert", "porttool.cli.inspect", "porttool.cli.run",
    "porttool.cli.verify",
)  # fmt: skip
CRASHED = 70
"""Exit status of a command that raised what it should not have."""


class Trap:
    """Counts what is done to files below a folder; at the given count it does what it is told.

    The action is a command to run at that moment, or none: then the process is killed.
    """

    def __init__(self, watch: str, at: int, action: list[str] | None) -> None:
        self.watch = watch
        self.at = at
        self.action = action
        self.count = 0
        self.sync = os.fsync

    def set(self) -> None:
        """Begin to count. It cannot be taken away again from a process."""
        sys.addaudithook(self.hear)
        os.fsync = self.fsync

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Listen to the interpreter's own audit events."""
        if event in EVENTS and any(self.is_watched(a) for a in arguments[:2]):
            self.hit()

    def is_watched(self, argument: Any) -> bool:
        """Tell whether an argument is a path below the folder."""
        if not isinstance(argument, (str, bytes, os.PathLike)):
            return False
        return os.fsdecode(argument).startswith(self.watch)

    def fsync(self, descriptor: int) -> None:
        """Count a file's way to the disk, of which the interpreter tells nothing."""
        self.hit()
        self.sync(descriptor)

    def hit(self) -> None:
        """Count, and spring when it is time."""
        self.count += 1
        if self.count != self.at:
            return
        if self.action is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            subprocess.run(self.action, check=True)


def use_small_shards(n_bytes: int) -> None:
    """Let shards be small, so that a small model has many."""
    from porttool import converter, shards

    converter.convert.__kwdefaults__["max_shard_bytes"] = n_bytes
    shards.plan_shards.__defaults__ = (n_bytes,)


def run(request: dict[str, Any]) -> int:
    """Run one command in this process; return its exit status."""
    from porttool.cli import invoke

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    use_small_shards(request["shard_bytes"])
    trap = Trap(request["watch"], request["at"], request["action"])
    trap.set()
    try:
        status = invoke(request["arguments"])
    except BaseException:  # noqa: BLE001 - whatever it is, it is what the judge looks for
        traceback.print_exc()
        status = CRASHED
    Path(request["events"]).write_text(str(trap.count))
    return status


def fork(work: Callable[[], int]) -> int:
    """Do something in a copy of this process; return the copy's id."""
    if child := os.fork():
        return child
    status = CRASHED
    try:
        status = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Answer requests until there are no more."""
    import torch

    from porttool.plugins import load_registry

    torch.set_num_threads(1)
    for name in IMPORTED:
        import_module(name)
    load_registry()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = fork(lambda request=request: run(request))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
