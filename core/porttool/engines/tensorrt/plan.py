"""From an ONNX file to a plan: parse, configure, build. Every call is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt

from porttool.engines.tensorrt.log import MessageLog, started
from porttool.engines.tensorrt.options import TensorrtOptions
from porttool.engines.tensorrt.profiles import Profile, free_inputs
from porttool.engines.tensorrt.timing_cache import locked_file, read_cache, replace_file
from porttool.errors import EngineError

GIB = 1 << 30


@dataclass(frozen=True)
class PlanJob:
    """What to build: a graph, the dimensions of its inputs, the profiles, where timings are."""

    model: Path
    inputs: Mapping[str, Sequence[int | str]]
    profiles: Sequence[Profile]
    options: TensorrtOptions
    timings: Path | None


@dataclass(frozen=True)
class PlanRecord:
    """What a build can tell about itself."""

    n_layers: int
    n_attention: int
    plan_bytes: int


def build_plan(job: PlanJob, target: Path) -> PlanRecord:
    """Build a plan and write it; EngineError with the library's words if any step fails."""
    log = MessageLog()
    builder = started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # holds the weights: it must live until the build ends
    parse_model(parser, job.model)
    if job.options.static_batch:
        fix_batch(network, job)
    n_attention = allow_decomposition(network)
    config = make_config(builder, job.options)
    for profile in job.profiles:
        add_profile(builder, config, job, profile)
    read_timings(config, job.timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT could not build {job.model}: {log.summary}")
    data = memoryview(plan)
    with target.open("wb") as file:
        file.write(data)
    keep_timings(config, job.timings)
    return PlanRecord(network.num_layers, n_attention, data.nbytes)


def parse_model(parser: trt.OnnxParser, model: Path) -> None:
    """Read the graph; external weights are found beside it."""
    if parser.parse_from_file(str(model)):
        return
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    found = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors)
    raise EngineError(f"TensorRT cannot read {model}: {found}")


def fix_batch(network: trt.INetworkDefinition, job: PlanJob) -> None:
    """Give every input the engine's batch as a fixed dimension."""
    batch = job.profiles[0].batch[2]
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        dims = job.inputs[tensor.name]
        if "batch" in dims:
            tensor.shape = trt.Dims(
                [batch if d == "batch" else d if isinstance(d, int) else -1 for d in dims]
            )


def allow_decomposition(network: trt.INetworkDefinition) -> int:
    """Let every attention fall back to simpler kernels; return how many there are.

    The default is that a build fails where no fused kernel fits, and the parser's own attribute
    for it is not standard ONNX. Versions before 10.14 have no such layer.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    found = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if kind is not None and layer.type == kind:
            layer.__class__ = getattr(trt, "IAttentionInputLayer")  # noqa: B009 - not in 10.13
            layer.attention.decomposable = True  # type: ignore[attr-defined]
            found += 1
    return found


def make_config(builder: trt.Builder, options: TensorrtOptions) -> trt.IBuilderConfig:
    """Translate options. What is not set is left to TensorRT."""
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.profiling_verbosity = {
        "none": trt.ProfilingVerbosity.NONE,
        "layer_names": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "detailed": trt.ProfilingVerbosity.DETAILED,
    }[options.profiling]
    config.hardware_compatibility_level = {
        "same_gpu": trt.HardwareCompatibilityLevel.NONE,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[options.hardware]
    if options.workspace_gb is not None:
        size = int(options.workspace_gb * GIB)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for wanted, flag in (
        (options.version_compatible, trt.BuilderFlag.VERSION_COMPATIBLE),
        (options.weight_streaming, trt.BuilderFlag.WEIGHT_STREAMING),
        (options.refit, trt.BuilderFlag.REFIT),
        (options.strip, trt.BuilderFlag.STRIP_PLAN),
    ):
        if wanted:
            config.set_flag(flag)
    return config


def add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, job: PlanJob, profile: Profile
) -> None:
    """Add one profile with the ranges of every input that may vary."""
    made = builder.create_optimization_profile()
    free = free_inputs(job.inputs, static_batch=job.options.static_batch)
    for name, dims in free.items():
        smallest, usual, largest = profile.shapes(dims)
        made.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(f"TensorRT refuses the {profile.name} profile: {profile}")


def read_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Hand the kept timings to a build, whose own could be kept there too."""
    if path is None:
        return
    with locked_file(path):  # a folder that cannot be written is found before the build
        kept = config.create_timing_cache(read_cache(path))
    if kept is None or not config.set_timing_cache(kept, ignore_mismatch=False):
        raise EngineError(f"{path}: TensorRT refuses this timing cache; delete the file")


def keep_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    """Join a build's timings with those that other builds have kept meanwhile.

    Where these do not go together they stay as they are: the plan is built, and worth more.
    """
    if path is None:
        return
    ours = config.get_timing_cache()
    with locked_file(path):
        theirs = config.create_timing_cache(read_cache(path))
        if theirs is not None and ours.combine(theirs, ignore_mismatch=False):
            replace_file(path, bytes(memoryview(ours.serialize())))
