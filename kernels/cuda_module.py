"""CUDA C++ compiled at run time with NVRTC, which comes with torch, and launched through the driver: ctypes only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes.util import find_library
from pathlib import Path

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 48 * 1024  # bytes a launch may ask for without that attribute
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


class CudaUnavailable(Exception):
    """A kernel cannot be compiled or loaded here; the message says why."""


def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    found = [
        str(path)
        for folder in sys.path
        for path in sorted(Path(folder or ".").glob(f"nvidia/*/lib/libnvrtc.so.{major}*"))
        if "builtins" not in path.name
    ]
    for name in (*found, f"libnvrtc.so.{major}", find_library("nvrtc")):
        if name is None:
            continue
        try:
            for builtins in Path(name).parent.glob(f"libnvrtc-builtins.so.{major}*"):  # else looked for by bare name
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaUnavailable(f"libnvrtc.so.{major}, which comes with torch's CUDA build, was not found")


def compile_source(source: str, arch: str, defines: dict[str, int]) -> bytes:
    """Machine code (cubin) of CUDA C++ for `arch`, e.g. "sm_90"; needs no GPU.

    Raises:
        CudaUnavailable: no NVRTC, or the compiler's first error.
    """
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"longrun.cu", 0, None, None)
    try:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), texts)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            errors = [line for line in log.value.decode(errors="replace").splitlines() if "error" in line]
            raise CudaUnavailable(f"NVRTC failed for {arch}: {errors[0] if errors else f'status {failed}'}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class CudaModule:
    """Kernels of one source on the current device. Arguments of a launch are ctypes values, in order.

    Raises:
        CudaUnavailable: see `compile_source`; or the driver refuses the code.
    """

    def __init__(self, source: str, defines: dict[str, int]) -> None:
        torch.cuda.init()
        torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
        major, minor = torch.cuda.get_device_capability()
        cubin = compile_source(source, f"sm_{major}{minor}", defines)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise CudaUnavailable(f"{what} failed: {(text.value or b'unknown error').decode()}")

    def kernel(self, name: str, shared_bytes: int = 0) -> CudaKernel:
        function = ctypes.c_void_p()
        self._check(
            self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), f"finding {name}"
        )
        if shared_bytes > _PLAIN_SHARED:
            status = self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._check(status, f"{shared_bytes} bytes of shared memory for {name}")
        return CudaKernel(self, function, shared_bytes)


class CudaKernel:
    """One kernel; launched on torch's current stream, so that CUDA graphs capture it."""

    def __init__(self, module: CudaModule, function: ctypes.c_void_p, shared_bytes: int) -> None:
        self._module, self._function, self._shared_bytes = module, function, shared_bytes

    def launch(
        self, grid: int, block: tuple[int, int], args: Sequence[ctypes._SimpleCData], overlap: bool = False
    ) -> None:
        """Launch blocks of block[0] x block[1] threads.

        Args:
            overlap: see `kernels.overlap`; the kernel must be written for it.
        """
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        driver = self._module._driver
        if overlap:
            allowed = _Attribute(_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
            how = _Launch((grid, 1, 1), (*block, 1), self._shared_bytes, stream, ctypes.pointer(allowed), 1)
            status = driver.cuLaunchKernelEx(ctypes.byref(how), self._function, pointers, None)
        else:
            status = driver.cuLaunchKernel(
                self._function, grid, 1, 1, block[0], block[1], 1, self._shared_bytes, stream, pointers, None
            )
        self._module._check(status, "launching a kernel")
