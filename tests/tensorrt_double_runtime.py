"""The half of the TensorRT double that loads and runs plans, with ONNX Runtime."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tensorrt_double_names import Dims, ILogger, LayerInformationFormat, Real, TensorIOMode


class Runtime(Real):
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None


class Refitter(Real):
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine

    def refit_cuda_engine(self) -> bool:
        return self._engine._refitted is not None


class OnnxParserRefitter(Real):
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self._refitter._engine._refitted = model
        return Path(model).is_file()


class ICudaEngine(Real):
    num_optimization_profiles = 2

    def __init__(self, plan: dict[str, Any]) -> None:
        import onnxruntime

        self._plan = plan
        self._refitted: str | None = None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            plan["folder"] + "/model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [v.name for v in self._session.get_outputs()]
        self.streamable_weights_size = 1000 if plan["streams"] else 0
        self.weight_streaming_budget_v2 = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan["shapes"]) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self._plan["shapes"], *self._outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._plan["shapes"] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._plan["shapes"][name])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 256 * (1 + profile_index)

    def get_weight_streaming_automatic_budget(self) -> int:
        return 600

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        assert not self._plan["stripped"] or self._refitted
        return IExecutionContext(self)


class EngineInspector(Real):
    """Layers of every profile, those of all but the first with the profile in their names."""

    execution_context: IExecutionContext

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        assert format is LayerInformationFormat.JSON and self.execution_context is not None
        names = ("layers.0.mlp.up.product", "logits")
        shapes = self.execution_context._shapes
        layers = [
            {"Name": name + suffix, "LayerType": "gemm", "Metadata": "",
             "Inputs": [{"Name": "tokens", "Dimensions": list(shapes["tokens"])}], "Outputs": []}
            for suffix in ("", " [profile 1]") for name in names
        ]  # fmt: skip
        bindings = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        bindings += [f"{name} [profile 1]" for name in bindings]
        return json.dumps({"Layers": layers, "Bindings": bindings})


class IProfiler(Real):
    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class IExecutionContext(Real):
    runs: ClassVar[list[tuple[int, dict[str, tuple[int, ...]]]]] = []

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {
            n: tuple(s) for n, s in engine._plan["shapes"].items() if -1 not in s
        }
        self._addresses: dict[str, int] = {}
        self._memory = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine._plan["profiles"][self._profile][name]
        if not all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory != 0

    def infer_shapes(self) -> list[str]:
        return [n for n in self._engine._plan["shapes"] if n not in self._shapes]

    def report_to_profiler(self) -> bool:
        assert self.enqueue_emits_profile is False
        suffix = " [profile 1]" if self._profile else ""
        for node in ("layers.0.mlp.up.product", "logits"):
            self.profiler.report_layer_time(node + suffix, 0.5 + self._profile)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._memory >= 256 and len(self._addresses) == self._engine.num_io_tensors
        self.runs.append((self._profile, dict(self._shapes)))
        given = {name: self._array(name, shape) for name, shape in self._shapes.items()}
        capacity = given["past_key.0"].shape[2]
        idle = given["starts"] >= capacity
        feeds = {**given, "starts": np.where(idle, 0, given["starts"])}
        results = self._engine._session.run(self._engine._outputs, feeds)
        for name, result in zip(self._engine._outputs, results, strict=True):
            target = self._array(name, result.shape)
            rows = ~idle if name.startswith("present_") else slice(None)
            target[rows] = result[rows]
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        """View the memory at a tensor's address."""
        integers = name in ("tokens", "positions", "starts", "wanted")
        kind = ctypes.c_int64 if integers else ctypes.c_float
        pointer = ctypes.cast(self._addresses[name], ctypes.POINTER(kind))
        return np.ctypeslib.as_array(pointer, shape)
