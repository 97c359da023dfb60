"""Building a TensorRT engine: export the graph, check it against TensorRT's limits, build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.builder import Builder, BuildRequest, Rank
from porttool.engines.onnx.export import export_model, require_single_rank
from porttool.engines.onnx.record import BuildRecord, Form
from porttool.engines.tensorrt.gpu import Gpu, PlanOrigin
from porttool.engines.tensorrt.library import SCATTER, parse_version, require_tensorrt
from porttool.engines.tensorrt.options import TensorrtOptions
from porttool.engines.tensorrt.profiles import Profile, Sizes, make_profiles
from porttool.engines.tensorrt.timing_cache import cache_file

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress

PLAN = "decoder.plan"


class BuiltPlan(BuildRecord):
    """What the builder notes of the plan in the engine's manifest."""

    of_what = "TensorRT plan"
    origin: PlanOrigin
    cache: Form
    capacity: int
    options: TensorrtOptions
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    profiles: dict[str, list[Sizes]]
    layers: int
    attention_layers: int
    plan_bytes: int


class TensorrtBuilder(Builder):
    """Builds one plan with a prefill and a decode profile from the exported ONNX file.

    A build uses torch's current GPU. Several at once: one process each, CUDA_VISIBLE_DEVICES set.
    """

    name = "tensorrt"
    Options = TensorrtOptions
    options: TensorrtOptions

    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Export, check and build; what the runner must check goes into the manifest."""
        require_single_rank(rank, self.name)
        options = self.options
        version = require_tensorrt()
        gpu = Gpu.current()
        profiles = make_profiles(
            request.limits,
            static_batch=options.static_batch,
            opt_batch=options.opt_batch_size,
            opt_input_len=options.opt_input_len,
        )
        form = choose_form(options, version)
        made = export_model(checkpoint, request, out, form=form, progress=progress)
        facts = self._build(made.path, out / PLAN, version, gpu, profiles)
        if not (options.strip or options.keep_graph):
            remove_graph(out)
        origin = PlanOrigin(
            tensorrt=version, gpu=gpu, hardware=options.hardware,
            version_compatible=options.version_compatible,
        )  # fmt: skip
        record = BuiltPlan(
            origin=origin, cache=form, capacity=made.spec.capacity, options=options, **facts
        )
        return record.model_dump(mode="json")

    def _build(
        self, model: Path, plan: Path, version: str, gpu: Gpu, profiles: tuple[Profile, ...]
    ) -> dict[str, Any]:
        from porttool.engines.tensorrt.limits import require_supported, tensor_shapes
        from porttool.engines.tensorrt.plan import PlanJob, build_plan

        options = self.options
        require_supported(model, parse_version(version))
        timings = options.timing_cache and cache_file(
            options.timing_cache, version=version, gpu=gpu.name,
            capability="".join(map(str, gpu.capability)), level=options.level,
        )  # fmt: skip
        inputs, outputs = tensor_shapes(model)
        made = build_plan(PlanJob(model, inputs, profiles, options, timings), plan)
        return {
            "inputs": inputs,
            "outputs": outputs,
            "profiles": {p.name: [p.batch, p.width, p.rows] for p in profiles},
            "layers": made.n_layers,
            "attention_layers": made.n_attention,
            "plan_bytes": made.plan_bytes,
        }


def choose_form(options: TensorrtOptions, version: str) -> Form:
    """Return the cache's form: the asked one, or the best that a version of TensorRT reads."""
    if options.cache == "auto":
        return "scatter" if parse_version(version) >= SCATTER else "concat"
    return options.cache


def remove_graph(out: Path) -> None:
    """Delete the exported graph and its weights: the plan has them."""
    for path in (*out.glob("*.onnx"), *out.glob("*.safetensors")):
        path.unlink()
