"""How fast an engine is: latency, throughput and memory, beside its peers and the roofline."""

from porttool.benchmark.results import BenchmarkResult, Cell, Method, grid
from porttool.benchmark.run import bench

__all__ = ["BenchmarkResult", "Cell", "Method", "bench", "grid"]
