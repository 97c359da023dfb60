"""The runner of ONNX engines: the exported graph in ONNX Runtime, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from porttool.component import Options
from porttool.device import Device
from porttool.engines.onnx.builder import GraphRecord
from porttool.engines.onnx.export import require_onnx
from porttool.engines.onnx.session import SessionSettings, choose_device, known_gap, make_session
from porttool.runner import Choose, Runner, TimedNode

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.engine import Engine
    from porttool.engines.native.head import ScreenedHead
    from porttool.engines.onnx.program import SessionProgram
    from porttool.nn import Step


class OnnxRunnerOptions(Options):
    """`device`: auto takes the GPU if ONNX Runtime can. `threads`: 0 is OMP_NUM_THREADS,
    if that is set, else ONNX Runtime's choice.

    `tf32` lets a GPU multiply float32 matrices in fewer bits. `compiled` false lets ONNX Runtime
    compute all logits for greedy tokens on a CPU, too, as where there is no compiler.
    """

    device: Device = "auto"
    threads: NonNegativeInt = 0
    tf32: bool = False
    compiled: bool = True


class OnnxRunner(Runner):
    """Runs an ONNX engine; the cache stays on the device, bound in place."""

    name = "onnx"
    Options = OnnxRunnerOptions
    options: OnnxRunnerOptions
    traces = True

    def __init__(self, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        from porttool.engines.onnx.cached_graph import CachedGraph

        super().__init__(engine, options)
        require_onnx()
        from porttool.engines.onnx.stored_graph import read_graph
        from porttool.engines.onnx.weights import stored_weights

        asked = self.options
        self._record = GraphRecord.of(engine)
        optimization = self._record.session.optimization
        self._settings = SessionSettings(
            choose_device(asked.device), optimization, asked.threads, asked.tf32
        )
        self._folder = engine.rank_path()
        self._stored = read_graph(engine, self._record.cache, stored_weights(engine))
        made = engine.manifest
        self._model = self._stored
        self._head: ScreenedHead | None = None
        self._greedy = ""
        if self._settings.device == "cpu" and made.dtype == "float32":
            self._choose_compiled(asked.compiled)
        with known_gap(self._settings.device, made.dtype):
            program = self._program(self._settings)
        self._graph = CachedGraph(program, self.config, made.limits, dtype=made.dtype)

    @property
    def description(self) -> str:
        """Library, provider, type, form of the cache, and on a CPU what chooses greedy tokens."""
        from porttool.engines.onnx.session import require_onnxruntime

        made = self.engine.manifest
        return (
            f"onnx, ONNX Runtime {require_onnxruntime().__version__} on {self._settings.device}, "
            f"{made.dtype}, {self._record.cache} cache{self._greedy}"
        )

    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; return logits."""
        from porttool.engines.onnx.stepping import fed

        self.check(step)
        return fed(self._graph.run, step, self.max_len, all_positions=all_positions)

    def decode(self, step: Step, n_tokens: int, choose: Choose | None = None) -> Tensor:
        """Return one token a row; the likeliest of a float32 engine on a CPU without all logits."""
        if choose is not None or self._head is None:
            return super().decode(step, n_tokens, choose)
        import torch

        self.check(step)
        threads = self._settings.threads or torch.get_num_threads()
        return self._head.likeliest(self._graph.hidden(step), threads)[:, None]

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy cache rows."""
        self._graph.copy_slots(source, target)

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use a prompt table that fits the room reserved at build."""
        self.require_room(table)
        self._graph.load_table(table)
        self.prompt_rows = 0 if table is None else len(table)

    def profiled(self, work: Callable[[], None]) -> list[TimedNode]:
        """Run `work` on a session that times every node; on a GPU torch's profiler sees more.

        There, ONNX Runtime measures how long it takes to launch a kernel, not to run it.
        """
        if self._settings.device == "cuda":
            return super().profiled(work)
        from porttool.engines.onnx.node_times import read_node_times

        with TemporaryDirectory() as folder:
            settings = replace(self._settings, profile=Path(folder) / "times")
            program = self._program(settings)
            with self._graph.using(program):
                work()
            return read_node_times(Path(program.session.end_profiling()))

    def trace(self, step: Step) -> dict[str, Tensor]:
        """Run the graph once with every module's input and output among its outputs."""
        from porttool.engines.onnx.trace import traced

        return traced(self._stored, self._folder, self._settings, step, self._graph.table)

    def _program(self, settings: SessionSettings) -> SessionProgram:
        from porttool.engines.onnx.program import SessionProgram

        session = make_session(self._model, settings, self._folder)
        return SessionProgram(session, settings.device, self._folder)

    def _choose_compiled(self, wanted: bool) -> None:
        """Have greedy tokens chosen by compiled code, or note why not.

        ONNX Runtime's threads then leave the cores to it between two steps.
        """
        from porttool.engines.native.library import NativeUnavailable

        try:
            if not wanted:
                raise NativeUnavailable("as asked")
            from porttool.engines.onnx.greedy import choosing

            self._model, self._head = choosing(self._stored, self._folder)
        except NativeUnavailable as reason:
            self._greedy = f", greedy from all logits ({reason})"
        else:
            self._greedy = ", compiled greedy choice"
            self._settings = replace(self._settings, spins=False)
