"""The CUDA decode kernel without a GPU: its source behind `cuda_on_cpu.h`, called by its own wrapper.

Nothing but the PTX helpers is replaced: what a thread reads, unpacks, multiplies and exchanges is the kernel's own.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from longrun.kernels.page_decode_cuda import SOURCE, CudaPageDecode, stage_bytes
from longrun.quant.kv_format import PageFormat

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = shutil.which("g++") or shutil.which("clang++")
_SPLIT = (
    "const void* q_in, int q_is_bf16, const u8* storage, const u8* other, int other_slot, const int* table, "
    "i64 table_stride, const u8* index, i64 index_stride, const int* pages, i64 pages_stride, const int* begins, "
    "const int* counts, const int* first, int skip, int limit, int sink_size, int origin, "
    "const u16* sink_k, const u16* sink_v, i64 sink_stride, const u16* tail_k, const u16* tail_v, i64 tail_stride, "
    "const int* lengths, float* part_out, float* part_ml, int group, int splits, float to_log2"
)
_MERGE = "const float* part_out, const float* part_ml, float* out, float* lse, int group, int splits"


def host_source() -> str:
    """The kernels as C++: PTX helpers, shared memory and nothing else replaced."""
    source = SOURCE.read_text()
    first = source.index("__device__ __forceinline__ u32 lds32")
    last = source.index("// Four tiles from the words of two k-pairs")
    source = source[:first] + source[last:]
    for theirs, ours in (
        ("extern __shared__ __align__(128) u8 shared[];", "u8* shared = shared_base();"),
        ("u32(__cvta_generic_to_shared(shared))", "0u"),
        ("__shared__ float", "static float"),
    ):
        assert source.count(theirs) == 1, theirs
        source = source.replace(theirs, ours)
    assert "asm" not in source
    for name, parameters in (("split", _SPLIT), ("merge", _MERGE)):
        assert " ".join(source.split()).count(parameters) == 1, f"the parameters of {name} are others now"
        given = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        source += (
            f'extern "C" void host_{name}(int blocks, int x, int y, i64 shared_bytes, {parameters}) {{\n'
            f"  launch(blocks, x, y, shared_bytes, [&] {{ page_decode_{name}({given}); }});\n}}\n"
        )
    return f'#include "{HEADER}"\n{source}'


class HostKernel:
    """Stands where a kernel of a `CudaModule` stands."""

    def __init__(self, function, shared_bytes: int) -> None:
        self._function, self._shared_bytes = function, shared_bytes

    def launch(self, blocks: int, threads: tuple[int, int], args: tuple) -> None:
        integers = (ctypes.c_int(blocks), *map(ctypes.c_int, threads), ctypes.c_int64(self._shared_bytes))
        self._function(*integers, *args)


def host_decode(head_dim: int, kv_format: str, folder: Path, stages: int = 2, warps: int = 4) -> CudaPageDecode:
    """A `CudaPageDecode` whose kernels run on the CPU; its tensors stand in host memory."""
    source, library = (folder / f"{kv_format}-{head_dim}-{stages}-{warps}.{end}" for end in ("cpp", "so"))
    source.write_text(host_source())
    key_bits = PageFormat(kv_format, 64, head_dim).key_bits
    defines = {"HEAD_DIM": head_dim, "STAGES": stages, "WARPS": warps, "KEY_BITS": key_bits}
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", *(f"-D{name}={n}" for name, n in defines.items())]
    done = subprocess.run([COMPILER, *flags, "-o", library, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = object.__new__(CudaPageDecode)
    made.head_dim, made.kv_format, made.warps, made.stages, made._blocks = head_dim, kv_format, warps, stages, 8
    found = ctypes.CDLL(str(library))
    shared = max(warps * stages * stage_bytes(head_dim), warps * 8 * (head_dim + 2) * 4)
    made._split, made._merge = HostKernel(found.host_split, shared), HostKernel(found.host_merge, 0)
    return made
