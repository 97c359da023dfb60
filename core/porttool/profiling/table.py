"""Times by layer and module, with what they had to do and how near the roofline they came."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from porttool.config import ModelConfig
from porttool.profiling.costs import Cost, Peak, StepSize, ends_costs, layer_costs
from porttool.runner import TimedNode

IN_LAYER = re.compile(
    r"layers\.(\d+)\.(norm1|norm2|attention\.qkv|attention\.out(?=\.)|attention|mlp\.up|mlp\.down|mlp)?"
)
CACHE = re.compile(r"(?:present|new|past)_(?:key|value)\.(\d+)")
ENDS = {
    "embedding": ("embed", "position", "prompt", "tokens", "virtual"),
    "head": ("logits", "norm", "rows"),
    "attention": ("mask", "rotary"),
    "mlp": ("FastGelu", "Gelu", "BiasGelu", "QuickGelu"),
}
"""Of nodes outside the layers. ONNX Runtime's fused activations no longer say which layer's."""


@dataclass(frozen=True)
class Line:
    """One module of one layer (-1: outside the layers) in one phase."""

    phase: str
    layer: int
    module: str
    seconds: float
    cost: Cost
    fraction: float
    """Least possible time over the measured one; 0 where nothing is known of the work."""


def module_of(node: str) -> tuple[int, str]:
    """Return layer and module of a graph's node by its name; fused nodes keep the first name."""
    if found := IN_LAYER.search(node):
        return int(found.group(1)), found.group(2) or "residual"
    if found := CACHE.search(node):
        return int(found.group(1)), "attention"
    for module, prefixes in ENDS.items():
        if node.startswith(prefixes):
            return -1, module
    return -1, "other"


def make_table(
    nodes: Iterable[tuple[str, TimedNode]],
    config: ModelConfig,
    *,
    sizes: Mapping[str, StepSize],
    runs: Mapping[str, int],
    peak: Peak,
) -> list[Line]:
    """Add up (phase, node) by module, as the mean over a phase's runs."""
    seconds: dict[tuple[str, int, str], float] = defaultdict(float)
    for phase, node in nodes:
        layer, module = module_of(node.name)
        seconds[phase, layer, module] += node.duration / 1e6 / runs[phase]
    lines = []
    for (phase, layer, module), taken in sorted(seconds.items()):
        known = (layer_costs if layer >= 0 else ends_costs)(config, sizes[phase])
        cost = known.get(module, Cost(0, 0))
        lines.append(Line(phase, layer, module, taken, cost, cost.seconds(peak) / taken))
    return lines


def over_layers(lines: Sequence[Line], peak: Peak) -> list[Line]:
    """Add up the layers, so that every module of a phase is one line; the slowest come first."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.phase, line.module].append(line)
    summed = []
    for (phase, module), group in groups.items():
        taken = sum(line.seconds for line in group)
        cost = sum((line.cost for line in group), Cost(0, 0))
        least = sum(line.cost.seconds(peak) for line in group)
        summed.append(Line(phase, len(group), module, taken, cost, least / taken))
    return sorted(summed, key=lambda line: (line.phase, -line.seconds))
