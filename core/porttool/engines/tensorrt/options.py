"""What can be said to the TensorRT builder, and what it refuses with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from porttool.component import Options
from porttool.engines.onnx.record import Form

Hardware = Literal["same_gpu", "same_compute_capability", "ampere_plus"]


class TensorrtOptions(Options):
    """Settings of a build. Types come from the graph: --dtype is all there is to say about them.

    `cache`: `auto` takes `scatter` (TensorRT 10.15 and later) or else `concat`. `static_batch`:
    every step runs all rows of the engine, which is the only form that users of TensorRT's cache
    operator have qualified; false lets the batch vary, untested. `opt_batch_size` and
    `opt_input_len` are what kernels are chosen for. `workspace_gb`: left to TensorRT if not given.
    `tf32` lets float32 matrices be multiplied in fewer bits, as TensorRT does by itself.
    `timing_cache`: a folder, shared by builds. `strip` leaves the weights out of the plan: they
    are put in at load from the ONNX file, which is then kept. `keep_graph` keeps it anyway.
    """

    cache: Literal["auto", Form] = "auto"
    static_batch: bool = True
    opt_batch_size: PositiveInt | None = None
    opt_input_len: PositiveInt | None = None
    level: int = Field(default=3, ge=0, le=5)
    workspace_gb: PositiveFloat | None = None
    max_aux_streams: NonNegativeInt | None = None
    profiling: Literal["none", "layer_names", "detailed"] = "detailed"
    tf32: bool = False
    version_compatible: bool = False
    hardware: Hardware = "same_gpu"
    weight_streaming: bool = False
    refit: bool = False
    strip: bool = False
    keep_graph: bool = False
    timing_cache: Path | None = None
    kv_cache: Literal["model", "int8", "fp8"] = "model"
    activations: Literal["model", "int8_per_token"] = "model"

    @field_validator("kv_cache")
    @classmethod
    def _refuse_quantized_cache(cls, value: str) -> str:
        if value != "model":
            raise ValueError(
                "TensorRT's cache update takes float32, float16 and bfloat16 only, and its ONNX "
                "Concat no quantised type either; leave it at 'model'"
            )
        return value

    @field_validator("activations")
    @classmethod
    def _refuse_per_token_scales(cls, value: str) -> str:
        if value != "model":
            raise ValueError(
                "TensorRT quantises activations with one scale for the whole tensor; a scale for "
                "each token is refused by its QuantizeLinear; leave it at 'model'"
            )
        return value
