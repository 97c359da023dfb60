"""A stand-in for the module `tensorrt`: it records calls and runs plans with ONNX Runtime.

Names, parameters and properties are those of the real bindings: a class refuses what
`tensorrt_signatures.json` does not know of it. Plans hold the path of a copied graph. What
TensorRT checks and ONNX Runtime does not (profiles, addresses, fixed dimensions) is checked here;
rows that start behind the cache write nothing, as in TensorRT.
"""

from __future__ import annotations

import inspect
import json
import shutil
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import onnx

from tensorrt_double_names import (
    SIGNATURES,
    BuilderFlag,
    Dims,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    ILogger,
    LayerInformationFormat,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
    Real,
    TensorIOMode,
)
from tensorrt_double_runtime import (
    EngineInspector,
    ICudaEngine,
    IExecutionContext,
    IProfiler,
    OnnxParserRefitter,
    Refitter,
    Runtime,
)

PUBLIC = (
    BuilderFlag, Dims, EngineInspector, ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel, ICudaEngine, IExecutionContext, ILogger, IProfiler,
    LayerInformationFormat, LayerType, MemoryPoolType, NetworkDefinitionCreationFlag,
    OnnxParserRefitter, ProfilingVerbosity, Refitter, Runtime, TensorIOMode,
)  # fmt: skip


class ITensor(Real):
    def __init__(self, name: str, dims: list[int]) -> None:
        self.name = name
        self.shape = Dims(dims)


class ILayer(Real):
    def __init__(self, operator: str) -> None:
        attention = operator == "Attention"
        self.type = LayerType.ATTENTION_INPUT if attention else LayerType.MATRIX_MULTIPLY
        self.name = operator
        self._attention = IAttention()


class IAttention(Real):
    decomposable = False


class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> IAttention:
        return self._attention


class INetworkDefinition(Real):
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._inputs: list[ITensor] = []
        self._layers: list[ILayer] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class ParserError(Real):
    def desc(self) -> str:
        return "an operator is unknown"

    def node_name(self) -> str:
        return "layers.0"

    def node_operator(self) -> str:
        return "Strange"


class OnnxParser(Real):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    num_errors = 1

    def get_error(self, index: int) -> ParserError:
        return ParserError()

    def parse_from_file(self, model: str) -> bool:
        graph = onnx.load(model, load_external_data=False).graph
        if any(node.op_type == "Strange" for node in graph.node):
            return False
        for value in graph.input:
            dims = [d.dim_value if d.HasField("dim_value") else -1
                    for d in value.type.tensor_type.shape.dim]  # fmt: skip
            self._network._inputs.append(ITensor(value.name, dims))
        self._network._layers = [ILayer(node.op_type) for node in graph.node]
        self._network._model = model
        return True


class IOptimizationProfile(Real):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert len(min) == len(opt) == len(max)
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class ITimingCache(Real):
    def __init__(self, entries: set[str]) -> None:
        self._entries = entries

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._entries |= input_cache._entries
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self._entries)).encode()


class IBuilderConfig(Real):
    def __init__(self) -> None:
        self._set: set[Any] = {BuilderFlag.TF32}
        self._pools: dict[Any, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self._set.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._set.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(set(json.loads(serialized_timing_cache or b"[]")))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder(Real):
    built: ClassVar[list[tuple[INetworkDefinition, IBuilderConfig]]] = []

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        free = {t.name for t in network._inputs if -1 in t.shape}
        if network._flags != 2 or any(free - p._shapes.keys() for p in config._profiles):
            self._logger.log(ILogger.Severity.ERROR, f"a profile lacks one of {sorted(free)}")
            return None
        self.built.append((network, config))
        if config._cache is not None:
            config._cache._entries.add(f"kernel {len(self.built)}")
        source = Path(network._model).parent
        copy = source.parent.parent / f"plan{len(self.built)}"
        shutil.copytree(source, copy)
        shapes = {t.name: list(t.shape) for t in network._inputs}
        profiles = [p._shapes for p in config._profiles]
        streams = BuilderFlag.WEIGHT_STREAMING in config._set
        stripped = BuilderFlag.STRIP_PLAN in config._set
        plan = {"folder": str(copy), "shapes": shapes, "profiles": profiles, "streams": streams,
                "stripped": stripped}  # fmt: skip
        return json.dumps(plan).encode()


def module(version: str = "11.4.0.106") -> types.ModuleType:
    """Return the module, of a version."""
    made = types.ModuleType("tensorrt")
    made.__version__ = version
    made.__spec__ = ModuleSpec("tensorrt", None)
    known = SIGNATURES[".".join(version.split(".")[:2])]
    mine = [v for v in globals().values() if inspect.isclass(v) and v.__module__ == __name__]
    for value in (*PUBLIC, *mine):
        if value.__name__ in known:
            setattr(made, value.__name__, value)
    return made
