"""Starting commands on the server, with or without a trap, and what became of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from faults.server import CRASHED

SHARD_BYTES = 700_000
"""The demo model, of 4.6 MB, then has seven shards and more."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status (negative: killed by that signal), output, events seen."""

    status: int
    said: str
    events: int = 0

    @property
    def refused(self) -> bool:
        """True for an error in one message, false for success, a crash or a signal."""
        return self.status in (1, 2) and "Traceback" not in self.said

    @property
    def crashed(self) -> bool:
        """True for a traceback, or a signal that nobody sent."""
        return self.status in (CRASHED, -7, -11, -6) or "Traceback" in self.said


@dataclass(frozen=True)
class Started:
    """A command under way."""

    stage: Stage
    pid: int
    number: int

    def wait(self) -> Outcome:
        """Wait for its end."""
        status = self.stage.ask({"wait": self.pid})
        events = self.stage.events(self.number)
        said = self.stage.log(self.number).read_text(errors="replace")
        count = int(events.read_text()) if events.exists() else 0
        return Outcome(status, said, count)


class Stage:
    """The server, from the outside. `folder` is for logs."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        server = Path(__file__).with_name("server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def log(self, number: int) -> Path:
        """Where a command's output goes."""
        return self.folder / f"{number}.log"

    def events(self, number: int) -> Path:
        """Where a command's number of events goes."""
        return self.folder / f"{number}.events"

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request; return the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        arguments: list[str],
        *,
        watch: Path | None = None,
        at: int = 0,
        action: list[str] | None = None,
    ) -> Started:
        """Begin a command; at its at-th event below `watch` the action, else SIGKILL, follows."""
        self._count += 1
        pid = self.ask({
            "arguments": arguments, "log": str(self.log(self._count)),
            "events": str(self.events(self._count)), "watch": str(watch or self.folder / "none"),
            "at": at, "action": action, "shard_bytes": self.shard_bytes,
        })  # fmt: skip
        return Started(self, pid, self._count)

    def run(
        self,
        arguments: list[str],
        *,
        watch: Path | None = None,
        at: int = 0,
        action: list[str] | None = None,
    ) -> Outcome:
        """Run a command to its end."""
        return self.start(arguments, watch=watch, at=at, action=action).wait()
