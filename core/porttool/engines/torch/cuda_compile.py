"""CUDA C++ compiled on the user's machine by NVRTC, which PyTorch brings, and launched."""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from porttool.errors import EngineError
from porttool.folder import cache_folder


class CompilerUnavailable(Exception):
    """Why a CUDA C++ kernel cannot be compiled or loaded here; never shown as an error."""


def compile_cubin(source: str, *, name: str, arch: str, macros: Mapping[str, object]) -> bytes:
    """Return machine code for `arch` (as "sm_90a"), from the user's cache if it was built before.

    macros: what the source finds defined. Raises CompilerUnavailable with the compiler's first
    complaint.
    """
    defined = [f"-D{key}={value}" for key, value in macros.items()]
    options = ["--std=c++17", f"--gpu-architecture={arch}", *defined]
    nvrtc = _nvrtc()
    version = _checked(nvrtc.nvrtcVersion())
    identity = "\0".join([source, *options, str(version)])
    target = _place(f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.cubin")
    kept = _read(target)
    if kept is not None:
        return kept
    cubin = _compiled(nvrtc, source, name, options)
    if target is not None:
        _keep(target, cubin)
    return cubin


def _compiled(nvrtc: Any, source: str, name: str, options: Sequence[str]) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program))))
            nvrtc.nvrtcGetProgramLog(program, log)  # which fills the bytes in place
            lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
            raise CompilerUnavailable(lines[0] if lines else str(error))
        cubin = bytes(bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program))))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


class CompiledKernel:
    """A kernel of a cubin in the current context, which is PyTorch's.

    resident: programs of it that a multiprocessor holds at once.
    """

    def __init__(self, cubin: bytes, name: str, *, threads: int, shared: int) -> None:
        driver, self.name, self.threads, self.shared = _driver(), name, threads, shared
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            self._module = _checked(driver.cuModuleLoadData(cubin))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared))
            self.resident = _checked(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, shared)
            )
        except RuntimeError as error:  # a driver that is older than the bindings
            raise CompilerUnavailable(f"CUDA's driver: {error}") from error
        if not self.resident:
            raise CompilerUnavailable("a multiprocessor has no room for it")

    def launch_together(
        self, programs: int, stream: int, values: Sequence[int], kinds: Sequence[Any]
    ) -> None:
        """Enqueue a cooperative launch: all programs are resident at once, or none runs.

        kinds: of the arguments, POINTER or INTEGER. Raises EngineError if the GPU refuses.
        """
        (status,) = _driver().cuLaunchCooperativeKernel(
            self._function, programs, 1, 1, self.threads, 1, 1, self.shared, stream,
            (tuple(values), tuple(kinds)),
        )  # fmt: skip
        if int(status) != 0:
            raise EngineError(f"the GPU does not launch the persistent kernel: {status!r}")

    def launch_clusters(
        self, grid: tuple[int, int], cluster: int, stream: int, argument: ctypes.Structure, *,
        chained: bool,
    ) -> None:  # fmt: skip
        """Enqueue programs in clusters along the grid's first side; one argument, by value.

        With `chained` they may start before their predecessor in the stream ends. Raises
        EngineError if the GPU refuses.
        """
        driver, config = _driver(), _driver().CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared, stream
        kinds, attributes = driver.CUlaunchAttributeID, [driver.CUlaunchAttribute()]
        attributes[0].id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        shape = attributes[0].value.clusterDim
        shape.x, shape.y, shape.z = cluster, 1, 1
        if chained:
            attributes.append(driver.CUlaunchAttribute())
            attributes[1].id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[1].value.programmaticStreamSerializationAllowed = 1
        # left to itself the GPU put 128 programs on 92 multiprocessors, which took a third longer
        policy = driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE
        attributes[-1].value.clusterSchedulingPolicyPreference = policy
        config.attrs, config.numAttrs = attributes, len(attributes)
        (status,) = driver.cuLaunchKernelEx(config, self._function, ((argument,), (None,)), 0)
        if int(status) != 0:
            raise EngineError(
                f"the GPU does not launch {self.name}: {status!r}; build the engine again with "
                "--set tune true, or with --set tune false to do without"
            )


def tensor_map(matrix: Tensor, box: tuple[int, ...]) -> tuple[int, ...]:
    """Describe a 16-bit tensor for the GPU's copies of boxes of it, sides last to first.

    A box is 128 bytes wide; its rows are swizzled in shared memory as the tensor cores want it.
    What lies outside the tensor is zero. Raises EngineError for what the GPU cannot copy.
    """
    try:
        return _encoded(matrix, box)
    except CompilerUnavailable as error:
        raise EngineError(
            f"the GPU does not copy boxes of {tuple(matrix.shape)}: {error}"
        ) from error


def _encoded(matrix: Tensor, box: tuple[int, ...]) -> tuple[int, ...]:
    driver = _driver()
    long, short = driver.cuuint64_t, driver.cuuint32_t
    *strides, _ = (long(stride * matrix.itemsize) for stride in matrix.stride())
    made = _checked(driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, matrix.dim(),
        matrix.data_ptr(), [long(side) for side in reversed(matrix.shape)],
        list(reversed(strides)), [short(side) for side in box], [short(1)] * matrix.dim(),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    ))  # fmt: skip
    return tuple(int(word) for word in made.opaque)


POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CompilerUnavailable(f"CUDA's run-time compiler is not there: {error}") from error
    return nvrtc


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CompilerUnavailable(f"CUDA's bindings are not there: {error}") from error
    return driver


def _checked(result: Sequence[Any]) -> Any:
    """Return what a call gave beside its status, or raise with the status."""
    status, *values = result
    if int(status) != 0:
        raise CompilerUnavailable(f"CUDA says {status!r}")
    return values[0] if len(values) == 1 else values


def _place(name: str) -> Path | None:
    """Return the file in the user's cache, None where nobody's home folder is known."""
    try:
        return cache_folder() / name
    except RuntimeError:
        return None


def _read(target: Path | None) -> bytes | None:
    """Return code that was kept, if it is whole: its SHA-256 is in front of it."""
    try:
        kept = b"" if target is None else target.read_bytes()
    except OSError:
        return None
    cubin = kept[32:]
    return cubin if kept[:32] == hashlib.sha256(cubin).digest() else None


def _keep(target: Path, cubin: bytes) -> None:
    """Write to the cache, whole or not at all; without it the next run compiles again."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            made.write_bytes(hashlib.sha256(cubin).digest() + cubin)
            made.replace(target)
    except OSError:
        return
