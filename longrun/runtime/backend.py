"""From a plan to a session's cache, attention and engine, on the CPU or on a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longrun.attention.cpu_decode import CpuDecode
from longrun.attention.selected_pages import PageSelector
from longrun.attention.torch_backend import TorchAttention
from longrun.cache.dual import DualCache
from longrun.cache.pinned_pool import PinnedMemory
from longrun.engine.chunks import NOWHERE
from longrun.engine.decode_calls import DecodeCalls
from longrun.engine.engine import Engine
from longrun.errors import ConfigError
from longrun.kernels.cpu_kernels import CpuKernels
from longrun.kernels.page_choose import choose_pages
from longrun.kernels.page_score import score_pages
from longrun.model.decoder import Decoder
from longrun.model.rope import RotaryTable
from longrun.plan.plan import Plan

if TYPE_CHECKING:
    from longrun.kernels.gpu_kernels import GpuKernels

_WARM_TOKENS = 300  # several pages


@dataclass(frozen=True)
class Parts:
    """What all sessions of a runtime share.

    Attributes:
        rotary, rotary_host: on the compute device, and in host memory.
        cpu_kernels, gpu_kernels: compiled kernels of the device, or None.
        pinned: host memory for pages beyond the GPU's.
    """

    decoder: Decoder
    rotary: RotaryTable
    rotary_host: RotaryTable
    cpu_kernels: CpuKernels | None
    gpu_kernels: GpuKernels | None
    pinned: PinnedMemory | None = None


def build_engine(parts: Parts, plan: Plan) -> Engine:
    """An engine over an empty cache; everything that it will need is allocated and compiled here.

    Raises:
        PlanError: the host pool cannot be pinned.
    """
    if plan.attention.fused:
        return _build_gpu_engine(parts, plan)
    decoder = parts.decoder
    cache = DualCache(plan.cache, decoder.device)
    _check_bytes(cache, plan)
    kernels, selector, selects_at = parts.cpu_kernels, None, _selects_at(plan)
    if plan.attention.selects:
        selector = PageSelector(plan.attention, decoder.device, score_pages, choose_pages)
    if kernels is None:
        attention = TorchAttention(cache, plan.attention, decoder.compute_dtype, None, selector)
        return Engine(decoder, parts.rotary, attention, cache, plan.chunk_size, None, selects_at, attention.sparse)
    attention = TorchAttention(cache, plan.attention, decoder.compute_dtype, kernels.pages, selector)
    decode = CpuDecode(attention, decoder.compute_dtype, kernels)
    calls = DecodeCalls(decoder, parts.rotary_host, decode, kernels.linear)
    return Engine(decoder, parts.rotary, attention, cache, plan.chunk_size, calls, selects_at, attention.sparse)


def _selects_at(plan: Plan) -> Callable[[int], bool]:
    """Whether the decode step of the token at a position selects pages."""
    return lambda start: plan.attention.selects_with(plan.cache.page_format.pooled_pages(start + 1))


def _build_gpu_engine(parts: Parts, plan: Plan) -> Engine:
    from longrun.attention.cuda_backend import CudaAttention
    from longrun.cache.page_movers import KernelPageMover
    from longrun.engine.decode_graph import DecodeGraph

    kernels, decoder = parts.gpu_kernels, parts.decoder
    assert kernels is not None
    if kernels.on_gpu:
        _take_blas_workspace(decoder.compute_dtype)
    mover = KernelPageMover(kernels.store_pages, kernels.copy_pages, kernels.digest_pages, kernels.on_gpu)
    host_storage = None
    if plan.cache.host_pages and parts.pinned is not None:
        payload = plan.cache.page_format.payload_bytes
        host_storage = parts.pinned.take(plan.cache.host_pages * payload, mover).view(-1, payload)
    cache = DualCache(plan.cache, decoder.device, mover, host_storage)
    _check_bytes(cache, plan)
    attention = CudaAttention(cache, plan.attention, decoder.compute_dtype, kernels)
    with _naming_kernels():
        graph = DecodeGraph(decoder, parts.rotary_host, attention.decode, capture=kernels.on_gpu)
        engine = Engine(
            decoder, parts.rotary, attention, cache, plan.chunk_size, graph, _selects_at(plan), attention.sparse
        )
        if kernels.on_gpu:
            _reserve_activations(plan)
            _warm_up(engine)
    return engine


@contextmanager
def _naming_kernels() -> Iterator[None]:
    """Turn Triton's errors, of compiling or of a GPU too small for a kernel, into one sentence with the kernel's file.

    Raises:
        ConfigError: a kernel cannot be compiled or launched here.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "triton":
            raise
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        name = next((file.stem for file in reversed(files) if file.parent.name == "kernels"), "a kernel")
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the GPU kernel {name} cannot be compiled or run on this GPU ({type(error).__name__}: {reason}): use "
            f"kv_format bf16, or device cpu"
        ) from error


def _warm_up(engine: Engine) -> None:
    """Compile what prefill needs on a short text, and forget it, so that a kernel that does not compile fails now."""
    empty = engine.cache.mark()
    passes = 2 if engine.sparse is None else 3
    chunk = min(_WARM_TOKENS, engine.chunk_size, engine.cache.spec.capacity // passes)
    for done in range(passes):
        if chunk > 1:
            sparse = range(engine.cache.seq_len, engine.cache.spec.capacity) if done == 2 else NOWHERE
            engine.run(torch.zeros(chunk, dtype=torch.int64), sparse=sparse)
    engine.cache.rewind(empty)
    if engine.sparse is not None:
        engine.sparse.levels.reset()
    torch.cuda.synchronize()


def _take_blas_workspace(dtype: torch.dtype) -> None:
    """Let cuBLAS take its workspace (32 MiB on an H100) before a session takes memory.

    torch allocates it in a thread's first product and keeps it as long as the process lives. Cut out of the memory of
    `_reserve_activations` it would hold gigabytes back when the session is gone, and the next one take them again.
    """
    square = torch.zeros(16, 16, dtype=dtype, device="cuda")
    torch.mm(square, square)
    torch.addmm(square[0], square, square)  # another library, cublasLt


def _reserve_activations(plan: Plan) -> None:
    """Have torch's allocator take the planned activations from the driver now; chunks are cut from them later.

    Tensors below 1 MiB come from memory of their own.
    """
    planned = {item.name: item.bytes for item in plan.items}
    small = [torch.empty(2**19, dtype=torch.uint8, device="cuda") for _ in range(planned["small tensors"] // 2**19)]
    large = torch.empty(planned["activations"] + planned["logits"], dtype=torch.uint8, device="cuda")
    del small, large


def _check_bytes(cache: DualCache, plan: Plan) -> None:
    planned = {**plan.cache.device_bytes(), **plan.cache.host_bytes()}
    assert cache.nbytes() == planned, "the cache is not as planned"
