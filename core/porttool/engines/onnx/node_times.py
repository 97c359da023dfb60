"""ONNX Runtime's own profile: how long every node of every run took."""

from __future__ import annotations

import json
from pathlib import Path

from porttool.runner import TimedNode

SUFFIX = "_kernel_time"


def read_node_times(path: Path) -> list[TimedNode]:
    """Return the nodes of a profile file in order of time, each with the run that it is part of."""
    events = sorted(json.loads(path.read_bytes()), key=lambda event: event["ts"])
    runs = [event for event in events if event["name"] == "model_run"]
    found: list[TimedNode] = []
    for index, run in enumerate(runs):
        end = run["ts"] + run["dur"]
        found += [
            TimedNode(
                event["name"].removesuffix(SUFFIX), event["args"]["op_name"], index,
                event["ts"], event["dur"],
            )
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(SUFFIX)
            and run["ts"] <= event["ts"] <= end
        ]  # fmt: skip
    return found
