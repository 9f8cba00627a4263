"""CUDA kernels without a GPU: their source behind `cuda_on_cpu.h`, called by their own wrappers.

Nothing but the PTX helpers is replaced: what a thread reads, unpacks, multiplies and exchanges is the kernel's own.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from longrun.kernels import hot_pages_cuda, page_decode_cuda, page_select_cuda
from longrun.kernels.hot_pages_cuda import CudaHotPages
from longrun.kernels.page_decode_cuda import CudaPageDecode, stage_bytes
from longrun.kernels.page_select_cuda import CudaPageSelect, score_defines, score_shared_bytes
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = shutil.which("g++") or shutil.which("clang++")
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\)')


def host_source(source: str, helpers: tuple[str, str] | None) -> str:
    """The kernels as C++: PTX helpers (from the first of two marks to the second), shared memory and nothing else
    replaced."""
    first, last = map(source.index, helpers) if helpers else (0, 0)
    source = source[:first] + source[last:]
    source = source.replace("extern __shared__ __align__(128) u8 shared[];", "u8* shared = shared_base();")
    source = source.replace("u32(__cvta_generic_to_shared(shared))", "0u")
    source = re.sub(r"__shared__ (\w+) (\w+);", r"\1& \2 = block->fixed<\1>();", source)
    source = source.replace("__shared__ float", "static float")
    assert "asm" not in source and "__shared__" not in source
    for name, parameters in _KERNEL.findall(source):
        given = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        source += (
            f'extern "C" void host_{name}(int blocks, int x, int y, i64 shared_bytes, {parameters}) {{\n'
            f"  launch(blocks, x, y, shared_bytes, [&] {{ {name}({given}); }});\n}}\n"
        )
    return f'#include "{HEADER}"\n{source}'


def host_library(
    path: Path, helpers: tuple[str, str] | None, defines: dict[str, int], folder: Path
) -> ctypes.CDLL:  # fmt: skip
    """The kernels of a source as a library of this machine, built in `folder`."""
    name = "-".join([path.stem, *map(str, defines.values())])
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(host_source(path.read_text(), helpers))
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", *(f"-D{name}={n}" for name, n in defines.items())]
    done = subprocess.run([COMPILER, *flags, "-o", library, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class HostKernel:
    """Stands where a kernel of a `CudaModule` stands; refuses arguments of other types than the kernel's parameters,
    which a GPU would read as they lie."""

    def __init__(self, library: ctypes.CDLL, path: Path, name: str, shared_bytes: int = 0) -> None:
        self._function, self._shared_bytes = library[f"host_{name}"], shared_bytes
        declared = dict(_KERNEL.findall(path.read_text()))[name].split(",")
        types = {"int": ctypes.c_int, "i64": ctypes.c_int64, "float": ctypes.c_float}
        self._types = [types.get(" ".join(each.split()[:-1]), ctypes.c_void_p) for each in declared]
        assert all(("*" in each) == (kind is ctypes.c_void_p) for each, kind in zip(declared, self._types, strict=True))

    def launch(self, blocks: int, threads: tuple[int, int], args: tuple, overlap: bool = False) -> None:
        assert [type(arg) for arg in args] == self._types
        integers = (ctypes.c_int(blocks), *map(ctypes.c_int, threads), ctypes.c_int64(self._shared_bytes))
        self._function(*integers, *args)


def host_decode(head_dim: int, kv_format: str, folder: Path, stages: int = 2, warps: int = 4) -> CudaPageDecode:
    """A `CudaPageDecode` whose kernels run on the CPU; its tensors stand in host memory."""
    key_bits = PageFormat(kv_format, 64, head_dim).key_bits
    defines = {"HEAD_DIM": head_dim, "STAGES": stages, "WARPS": warps, "KEY_BITS": key_bits}
    helpers = "__device__ __forceinline__ u32 lds32", "// Four tiles from the words of two k-pairs"
    library = host_library(page_decode_cuda.SOURCE, helpers, defines, folder)
    made = object.__new__(CudaPageDecode)
    made.head_dim, made.kv_format, made.warps, made.stages, made._blocks = head_dim, kv_format, warps, stages, 8
    shared = max(warps * stages * stage_bytes(head_dim), warps * 8 * (head_dim + 2) * 4)
    made._split = HostKernel(library, page_decode_cuda.SOURCE, "page_decode_split", shared)
    made._merge = HostKernel(library, page_decode_cuda.SOURCE, "page_decode_merge")
    return made


def host_select(fmt: DigestFormat, folder: Path, stages: int = 3, warps: int = 4, splits: int = 3) -> CudaPageSelect:
    """A `CudaPageSelect` whose kernels run on the CPU; its tensors stand in host memory.

    Args:
        splits: blocks a head that score.
    """
    helpers = "__device__ __forceinline__ u32 lds32", "// Entries of a head's list"
    library = host_library(page_select_cuda.SOURCE, helpers, score_defines(fmt, stages, warps), folder)
    made = object.__new__(CudaPageSelect)
    made.fmt, made.warps, made.default_splits, made.overlap = fmt, warps, lambda num_heads: splits, True
    shared = {"score": score_shared_bytes(fmt, stages, warps)}
    made.kernels = {
        name: HostKernel(library, page_select_cuda.SOURCE, f"page_select_{name}", shared.get(name, 0))
        for name in ("score", *page_select_cuda.CHOOSING)
    }
    made.set_descending = library.set_descending
    return made


def host_hot_pages(payload_bytes: int, folder: Path, threads: int, blocks: int = 3) -> CudaHotPages:
    """A `CudaHotPages` whose kernels run on the CPU; its tensors stand in host memory.

    Args:
        threads: of a block that looks up; blocks: that fetch.
    """
    library = host_library(hot_pages_cuda.SOURCE, None, hot_pages_cuda.defines_of(payload_bytes, threads), folder)
    made = object.__new__(CudaHotPages)
    made.payload_bytes, made.lookup_threads, made.fetch_blocks = payload_bytes, threads, blocks
    made._lookup = HostKernel(library, hot_pages_cuda.SOURCE, "hot_pages_lookup", hot_pages_cuda.MOST_SLOTS // 8)
    made._fetch = HostKernel(library, hot_pages_cuda.SOURCE, "hot_pages_fetch")
    made.set_descending = library.set_descending
    return made
