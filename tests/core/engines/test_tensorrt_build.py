"""What the TensorRT builder asks of the library, and what it and the runner refuse."""

from __future__ import annotations

import inspect
import sys
from enum import EnumMeta

import pytest
import torch

import tensorrt_double as double
from porttool.engines.tensorrt import gpu as gpu_module
from porttool.engines.tensorrt.gpu import Gpu, PlanOrigin, require_same
from porttool.engines.tensorrt.profiles import make_profiles
from porttool.errors import EngineError, MissingExtra, PorttoolError, UsageError
from porttool.plugins import load_registry
from porttool.runner import load_runner
from tensorrt_install import H200, LIMITS, build


@pytest.mark.parametrize("version", double.SIGNATURES)
def test_the_double_is_no_more_than_the_real_bindings(version):
    """Every method has the real one's parameters in order; every constant is a real one."""
    real = double.SIGNATURES[version]
    newer = {"IAttention", "IAttentionInputLayer"}
    for name, fake in vars(double.module("11.4.0.106")).items():
        if not inspect.isclass(fake) or (version == "10.13" and name in newer):
            continue
        assert name in real
        members = fake.__members__ if isinstance(fake, EnumMeta) else vars(fake)
        for member, value in members.items():
            if member.startswith("_") or member in ("version", "built", "runs", "Severity"):
                continue
            if version == "10.13" and member in ("get_aliased_input_tensor", "ATTENTION_INPUT"):
                continue
            if name == "IAttentionInputLayer" and member == "attention":
                assert "attention" in real[name]
                continue
            assert member in real[name], f"{name}.{member}"
            if inspect.isfunction(value):
                mine = list(inspect.signature(value).parameters)[1:]
                assert any(mine == p[: len(mine)] for p in real[name][member]), (name, member)


def test_what_the_builder_asks_for(tmp_path, library):
    _, engine = build(
        tmp_path, level=5, workspace_gb=2, version_compatible=True, refit=True,
        opt_batch_size=2, opt_input_len=16, static_batch=False, hardware="ampere_plus",
        profiling="layer_names", max_aux_streams=0,
    )  # fmt: skip
    ((network, config),) = double.Builder.built
    assert network._flags == 1 << double.NetworkDefinitionCreationFlag.STRONGLY_TYPED.value
    flags = double.BuilderFlag
    assert config._set == {flags.VERSION_COMPATIBLE, flags.REFIT}
    assert config._pools == {double.MemoryPoolType.WORKSPACE: 2 << 30}
    assert (config.builder_optimization_level, config.max_aux_streams) == (5, 0)
    assert config.profiling_verbosity is double.ProfilingVerbosity.LAYER_NAMES_ONLY
    assert config.hardware_compatibility_level is double.HardwareCompatibilityLevel.AMPERE_PLUS
    prefill, decode = (p._shapes for p in config._profiles)
    assert prefill["tokens"] == ((1, 1), (2, 16), (3, 30))
    assert decode["tokens"] == ((1, 1), (2, 1), (3, 1))
    assert prefill["past_value.1"] == ((1, 4, 48, 12), (2, 4, 48, 12), (3, 4, 48, 12))
    attention = [x for x in network._layers if x.type is double.LayerType.ATTENTION_INPUT]
    assert len(attention) == 2 and all(x._attention.decomposable for x in attention)
    (record,) = engine.manifest.built
    assert record["origin"]["gpu"] == {"name": "NVIDIA H200", "capability": [9, 0]}
    assert record["attention_layers"] == 2
    assert sorted(f.name for f in engine.rank_path().iterdir()) == ["decoder.plan"]


def test_a_fixed_batch_leaves_only_width_and_rows_free(tmp_path, library):
    build(tmp_path)
    ((network, config),) = double.Builder.built
    assert {t.name for t in network._inputs if -1 in t.shape} == {"tokens", "positions", "wanted"}
    assert config._profiles[0]._shapes["wanted"] == ((3,), (3,), (48,))
    assert config._profiles[1]._shapes["wanted"] == ((3,), (3,), (3,))


@pytest.mark.parametrize("asked", [{}, {"tf32": True}])
def test_float32_is_float32_unless_less_is_asked_for(tmp_path, library, asked):
    build(tmp_path, **asked)
    ((_, config),) = double.Builder.built
    assert (double.BuilderFlag.TF32 in config._set) is bool(asked)


def test_timings_are_kept_and_joined(tmp_path, library):
    folder = tmp_path / "timings"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build(tmp_path / name, timing_cache=str(folder))
    (file,) = folder.glob("*.timing")
    assert file.name == "tensorrt-11.4.0.106-NVIDIA-H200-sm90-level3.timing"
    assert file.read_bytes() == b'["kernel 1", "kernel 2"]'


def test_a_timing_cache_that_the_library_does_not_read(tmp_path, library, monkeypatch):
    """None is what the bindings make of such a cache; they raise a TypeError if they get it."""
    monkeypatch.setattr(double.IBuilderConfig, "create_timing_cache", lambda self, data: None)
    with pytest.raises(EngineError, match="refuses this timing cache; delete the file"):
        build(tmp_path, timing_cache=str(tmp_path))
    assert not double.Builder.built


def test_timings_that_do_not_go_together_are_left_alone(tmp_path, library, monkeypatch):
    (tmp_path / "first").mkdir()
    build(tmp_path / "first", timing_cache=str(tmp_path))
    monkeypatch.setattr(double.ITimingCache, "combine", lambda *_, **__: False)
    build(tmp_path, timing_cache=str(tmp_path))
    (file,) = tmp_path.glob("*.timing")
    assert file.read_bytes() == b'["kernel 1"]'


def test_a_timing_cache_that_cannot_be_written_is_found_before_the_build(tmp_path, library):
    (tmp_path / "file").touch()
    with pytest.raises(PorttoolError, match="file"):
        build(tmp_path, timing_cache=str(tmp_path / "file" / "timings"))
    assert not double.Builder.built


def test_a_library_that_does_not_start(tmp_path, library, monkeypatch):
    """What the bindings raise where the driver is too old."""

    def refuse(self, logger):
        logger.log(double.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    _, engine = build(tmp_path)
    monkeypatch.setattr(double.Runtime, "__init__", refuse)
    with pytest.raises(EngineError, match=r"does not start: CUDA init.* error: 35; .* driver"):
        load_runner(engine, load_registry())
    monkeypatch.setattr(double.Builder, "__init__", refuse)
    (tmp_path / "other").mkdir()
    with pytest.raises(EngineError, match=r"does not start: CUDA init.* error: 35; .* driver"):
        build(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "int8"}, "float32, float16 and bfloat16 only"),
        ({"kv_cache": "fp8"}, "float32, float16 and bfloat16 only"),
        ({"activations": "int8_per_token"}, "one scale for the whole tensor"),
        ({"level": 6}, "less than or equal to 5"),
        ({"opt_input_len": 99}, "beyond the engine's limits"),
    ],
)
def test_options_that_are_refused(tmp_path, library, options, message):
    with pytest.raises(UsageError, match=message):
        build(tmp_path, **options)
    assert not double.Builder.built


def test_failures_say_what_the_library_said(tmp_path, library, monkeypatch):
    monkeypatch.setattr(
        double.Builder,
        "build_serialized_network",
        lambda self, network, config: self._logger.log(
            double.ILogger.Severity.ERROR, "no tactic for node 5"
        ),
    )
    with pytest.raises(EngineError, match=r"could not build .*no tactic for node 5"):
        build(tmp_path)
    assert not (tmp_path / "engine").exists()


ORIGIN = PlanOrigin(tensorrt="11.4.0.106", gpu=H200, hardware="same_gpu", version_compatible=False)


@pytest.mark.parametrize(
    ("origin", "version", "gpu", "message"),
    [
        ({}, "11.3.0.99", H200, "built with TensorRT 11.4.0.106, installed is 11.3.0.99"),
        ({}, "11.4.0.106", Gpu(name="L4", capability=(8, 9)), "here is L4"),
        ({"hardware": "same_compute_capability"}, "11.4.0.106",
         Gpu(name="L4", capability=(8, 9)), "build it again on this GPU"),
        ({"hardware": "ampere_plus"}, "11.4.0.106", Gpu(name="T4", capability=(7, 5)), "T4"),
        ({"version_compatible": True}, "10.16.0.72", H200, "TensorRT 11.4.0.106"),
        ({"version_compatible": True}, "11.3.0.99", H200, "installed is 11.3.0.99"),
    ],
)  # fmt: skip
def test_plans_of_another_version_or_gpu_are_refused(origin, version, gpu, message):
    with pytest.raises(EngineError, match=message):
        require_same(ORIGIN.model_copy(update=origin), version=version, gpu=gpu, where="plan")


@pytest.mark.parametrize(
    ("origin", "version", "gpu"),
    [
        ({}, "11.4.0.106", H200),
        ({"version_compatible": True}, "11.5.0.1", H200),
        ({"hardware": "same_compute_capability"}, "11.4.0.106",
         Gpu(name="NVIDIA H100", capability=(9, 0))),
        ({"hardware": "ampere_plus"}, "11.4.0.106", Gpu(name="L4", capability=(8, 9))),
    ],
)  # fmt: skip
def test_plans_that_fit_are_taken(origin, version, gpu):
    require_same(ORIGIN.model_copy(update=origin), version=version, gpu=gpu, where="plan")


def test_profiles_reserve_logits_for_a_few_tokens_of_every_row():
    prefill, decode = make_profiles(LIMITS, static_batch=False)
    assert prefill.rows == (1, 3, 48)
    assert (decode.width, decode.rows) == ((1, 1, 1), (1, 3, 3))


def test_without_the_library_or_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"pip install 'porttool\[tensorrt\]'"):
        build(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="torch sees none"):
        gpu_module.Gpu.current()
