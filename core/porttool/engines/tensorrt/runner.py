"""The runner of TensorRT engines: the plan over a cache in place, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from porttool.component import Options
from porttool.engines.onnx.export import MODEL
from porttool.engines.tensorrt.builder import PLAN, BuiltPlan
from porttool.engines.tensorrt.gpu import Gpu, require_same
from porttool.engines.tensorrt.library import require_tensorrt
from porttool.engines.tensorrt.profiles import ALL_POSITIONS_WIDTH
from porttool.errors import EngineError
from porttool.runner import Runner, TimedNode

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.engine import Engine
    from porttool.engines.tensorrt.program import PlanProgram
    from porttool.nn import Step


class TensorrtRunnerOptions(Options):
    """`weight_streaming_budget`: bytes of weights kept on the GPU; TensorRT's choice if not given.

    It matters only to a plan built with `weight_streaming`.
    """

    weight_streaming_budget: NonNegativeInt | None = None


class TensorrtRunner(Runner):
    """Runs a TensorRT engine on torch's current GPU."""

    name = "tensorrt"
    Options = TensorrtRunnerOptions
    options: TensorrtRunnerOptions

    def __init__(self, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(engine, options)
        self._record = BuiltPlan.of(engine)
        self._origin = self._record.origin
        version = require_tensorrt()
        plan = engine.rank_path() / PLAN
        require_same(self._origin, version=version, gpu=Gpu.current(), where=str(plan))
        from porttool.engines.onnx.cached_graph import CachedGraph

        made = engine.manifest
        self._information: dict[str, str] = {}
        self._graph = CachedGraph(self._load(), self.config, made.limits, dtype=made.dtype)

    @property
    def description(self) -> str:
        """Library, GPU, type and form of the cache."""
        return (
            f"tensorrt {self._origin.tensorrt} on {self._origin.gpu.name}, "
            f"{self.engine.manifest.dtype}, {self._record.cache} cache"
        )

    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; return logits."""
        from porttool.engines.onnx.stepping import fed, fed_in_pieces

        self.check(step)
        if all_positions:
            width = min(ALL_POSITIONS_WIDTH, self.engine.manifest.limits.max_input_len)
            return fed_in_pieces(self._run, step, self.max_len, width=width)
        return fed(self._run, step, self.max_len, all_positions=False)

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy cache rows."""
        self._graph.copy_slots(source, target)

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use a prompt table that fits the room reserved at build."""
        self.require_room(table)
        self._graph.load_table(table)
        self.prompt_rows = 0 if table is None else len(table)

    def profiled(self, work: Callable[[], None]) -> list[TimedNode]:
        """Run `work` on a second load of the plan, whose layers are timed one by one."""
        from porttool.engines.tensorrt.layer_times import LayerTimes

        program, times = self._load(), LayerTimes()
        program.watch(times)
        with self._graph.using(program):
            work()
        self._information = program.layer_information()
        return times.nodes()

    def layer_information(self) -> Mapping[str, str]:
        """Return what TensorRT's inspector says of each profile's layers, as trtexec exports it."""
        return self._information

    def _run(self, step: Step, *, all_positions: bool) -> Tensor:
        if not self._record.options.static_batch:
            return self._graph.run(step, all_positions=all_positions)
        from porttool.engines.onnx.stepping import filled

        whole = filled(step, self.n_slots, self.max_len)
        return self._graph.run(whole, all_positions=all_positions)[: len(step.slots)]

    def _load(self) -> PlanProgram:
        from porttool.engines.tensorrt.log import MessageLog
        from porttool.engines.tensorrt.program import PlanProgram, load_plan
        from porttool.engines.tensorrt.stream import DeviceStream

        log = MessageLog()
        folder = self.engine.rank_path()
        engine = load_plan(
            folder / PLAN,
            log=log,
            host_code=self._origin.version_compatible,
            graph=folder / MODEL if self._record.options.strip else None,
            budget=self.options.weight_streaming_budget,
        )
        program = PlanProgram(engine, log, DeviceStream())
        wanted = {*self._record.inputs, *self._record.outputs}
        if differ := wanted ^ set(program.names):
            raise EngineError(
                f"{folder / PLAN}: its inputs and outputs are not those of the manifest: "
                f"{', '.join(sorted(differ))}; build it again"
            )
        return program
