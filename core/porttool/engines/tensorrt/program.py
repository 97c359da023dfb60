"""A deserialised plan: a context for each profile and for each captured graph.

All are on one stream and on one block of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import tensorrt as trt
import torch
from torch import Tensor

from porttool.engines.onnx.cached_graph import Program
from porttool.engines.tensorrt.layer_times import LayerTimes
from porttool.engines.tensorrt.log import MessageLog, started
from porttool.engines.tensorrt.stream import DeviceStream
from porttool.errors import EngineError

PHASES = ("prefill", "decode")
"""The profiles, in the order of `make_profiles`."""


class PlanProgram(Program):
    """TensorRT's engine and contexts. Addresses are torch's, and so is the activation memory."""

    def __init__(self, engine: trt.ICudaEngine, log: MessageLog, stream: DeviceStream) -> None:
        self.engine = engine
        self.log = log
        self.stream = stream
        self.device = stream.device
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.scatters = any(name.startswith("present_key") for name in self.names)
        self.captures = not streams_weights(engine)
        require_aliases(engine, self.names)
        n_profiles = engine.num_optimization_profiles
        size = max(engine.get_device_memory_size_for_profile_v2(i) for i in range(n_profiles))
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.contexts = [self._make_context(i) for i in range(n_profiles)]
        self.times: LayerTimes | None = None

    def bind(self, tensors: Mapping[str, Tensor], *, repeats: bool) -> Callable[[], None]:
        """Return a call that runs the plan on these tensors; a repeated one becomes a CUDA graph.

        Raises EngineError if the plan has inputs or outputs that nobody fills.
        """
        if missing := set(self.names) ^ tensors.keys():
            raise EngineError(f"the plan's tensors are not the graph's: {sorted(missing)}")
        if repeats and self.captures:  # other shapes never touch a captured graph's context
            context = self._make_context(PHASES.index("decode"))
            return BoundCall(self, context, dict(tensors), captures=True)
        return BoundCall(self, self.context_for(tensors), dict(tensors), captures=False)

    def context_for(self, tensors: Mapping[str, Tensor]) -> trt.IExecutionContext:
        """Return the context whose profile holds a step of this width."""
        decodes = tensors["tokens"].shape[1] == 1 and plain(tensors)
        return self.contexts[PHASES.index("decode") if decodes else 0]

    def watch(self, times: LayerTimes) -> None:
        """Have every layer of every run timed; nothing is captured from then on."""
        self.times, self.captures = times, False
        for context in self.contexts:
            context.profiler = times
            context.enqueue_emits_profile = False

    def report(self, context: trt.IExecutionContext) -> None:
        """Collect the layer times of a run, if anybody wants them."""
        if self.times is not None:
            self.stream.synchronize()
            self.times.runs.append([])
            if not context.report_to_profiler():
                raise EngineError(f"TensorRT reports no layer times: {self.log.summary}")

    def layer_information(self) -> dict[str, str]:
        """Return the inspector's JSON for each profile, with the shapes that last ran in it."""
        inspector = self.engine.create_engine_inspector()
        found = {}
        for phase, context in zip(PHASES, self.contexts, strict=True):
            inspector.execution_context = context
            found[phase] = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return found

    def _make_context(self, profile: int) -> trt.IExecutionContext:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"TensorRT cannot make a context: {self.log.summary}")
        # Steps never overlap, so that all contexts share one block.
        context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        if not context.set_optimization_profile_async(profile, self.stream.handle):
            raise EngineError(f"TensorRT refuses profile {profile}: {self.log.summary}")
        self.stream.synchronize()
        return context


def plain(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a step wants one row of logits for each row of its batch."""
    return tensors["wanted"].shape[0] == tensors["tokens"].shape[0]


class BoundCall:
    """One binding: shapes and addresses are set for a first run, then captured for the others."""

    def __init__(
        self,
        program: PlanProgram,
        context: trt.IExecutionContext,
        tensors: dict[str, Tensor],
        *,
        captures: bool,
    ) -> None:
        self.program = program
        self.tensors = tensors
        self.context = context
        self.captures = captures
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Run the step."""
        stream = self.program.stream
        if self.replay is not None:
            stream.run(self.replay)
            return
        self._point()
        stream.run(self._enqueue)
        self.program.report(self.context)
        if self.captures:  # capturing runs nothing, and the shapes of the first run still hold
            self.replay = stream.capture(self._enqueue)

    def _point(self) -> None:
        """Set the shape of every free input and the address of everything."""
        engine, log = self.program.engine, self.program.log
        for name, tensor in self.tensors.items():
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            free = is_input and has_free_dimension(engine.get_tensor_shape(name))
            if free and not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"{name} {list(tensor.shape)} is outside the plan's profile: {log.summary}"
                )
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"TensorRT refuses the address of {name}: {log.summary}")
        if missing := self.context.infer_shapes():
            raise EngineError(f"TensorRT lacks the shapes of {missing}: {log.summary}")

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.program.stream.handle):
            raise EngineError(f"TensorRT could not run the step: {self.program.log.summary}")


def has_free_dimension(dims: trt.Dims) -> bool:
    """Return whether a shape has a dimension that a step chooses."""
    return any(dims[i] == -1 for i in range(len(dims)))


def streams_weights(engine: trt.ICudaEngine) -> bool:
    """Return whether weights come over while it runs: such a plan cannot be captured."""
    return bool(engine.weight_streaming_budget_v2 < engine.streamable_weights_size)


def require_aliases(engine: trt.ICudaEngine, names: list[str]) -> None:
    """Check that every present cache shares the memory of its past, as it will be bound."""
    for name in names:
        if name.startswith("present_") and hasattr(engine, "get_aliased_input_tensor"):
            wanted = name.replace("present_", "past_")
            found = engine.get_aliased_input_tensor(name)
            if found != wanted:
                raise EngineError(
                    f"the plan's {name} shares memory with {found}, not with {wanted}: "
                    "its cache would not be updated in place; build it again"
                )


def load_plan(
    plan: Path, *, log: MessageLog, host_code: bool, graph: Path | None, budget: int | None
) -> trt.ICudaEngine:
    """Deserialise a plan; put the weights of a stripped one in; set the streaming budget."""
    runtime = started(trt.Runtime, log)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(f"TensorRT cannot load {plan}: {log.summary}")
    if graph is not None:
        refit(engine, graph, log)
    if engine.streamable_weights_size:
        automatic = engine.get_weight_streaming_automatic_budget()
        engine.weight_streaming_budget_v2 = automatic if budget is None else budget
    return engine


def refit(engine: trt.ICudaEngine, graph: Path, log: MessageLog) -> None:
    """Put the weights of an ONNX file into a stripped plan."""
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
        raise EngineError(f"the weights of {graph} do not fit the plan: {log.summary}")
