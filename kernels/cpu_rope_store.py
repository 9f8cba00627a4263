"""The compiled kernel of `cpu_rope_store.cpp`: one token's head norms, RoPE, rotation and append in one call, where
torch takes a dozen small operations a layer. The torch reference is `rope_store.rope_store_reference`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.kernels.prepared_call import PreparedCall, addresses
from longrun.quant.rotation import rotation_scales


class _Token(ctypes.Structure):
    """`Token` in cpu_rope_store.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv", "q_norm", "k_norm", "cos", "sin", "signs", "q_out", "tail_k", "tail_v", "ring_k", "ring_v",
                "slots",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "bf16", "cache_bf16", "head_dim", "num_qo_heads", "retrieval", "streaming", "tail_stride",
                "ring_stride", "rotate_values",
            )
        ),
        ("eps", ctypes.c_double), ("query_scale", ctypes.c_float), ("key_scale", ctypes.c_float),
    ]  # fmt: skip


class CpuRopeStore(CpuKernel):
    """Append of one token on the CPU."""

    source = "cpu_rope_store"

    def __init__(self, cache_dir: Path | None) -> None:
        super().__init__(cache_dir)
        self._run = self._function("longrun_rope_store", ctypes.POINTER(_Token))
        types = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4, ctypes.c_float)
        self._unrotate = self._function("longrun_unrotate", *types)

    def prepare(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
        ring_k: Tensor | None, ring_v: Tensor | None, slots: Tensor, num_qo_heads: int, *,
        q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, signs: Tensor | None = None,
        rotate_values: bool = False,
    ) -> PreparedCall:  # fmt: skip
        """Norm and turn one token's query and key heads; write q_out, and keys and values to their place in the cache:
        to be run for every token, with what the tensors then hold.

        Arguments, and what is rounded when: see `rope_store.rope_store`; float32 or bfloat16, any even head_dim.
        """
        dim = q_out.shape[1]
        retrieval, streaming = (0 if k is None else k.shape[0] for k in (tail_k, ring_k))
        assert q_out.shape[0] == num_qo_heads and num_qo_heads % (retrieval + streaming) == 0 and dim % 2 == 0
        assert qkv.is_contiguous() and qkv.numel() == (num_qo_heads + 2 * (retrieval + streaming)) * dim
        assert q_out.is_contiguous() and q_out.dtype == qkv.dtype and qkv.dtype in (torch.float32, torch.bfloat16)
        for table in (cos, sin):
            assert table.numel() == dim and table.dtype == torch.float32 and table.is_contiguous()
        assert (q_norm is None) == (k_norm is None) and (signs is not None or not rotate_values)
        assert q_norm is None or q_norm.dtype == k_norm.dtype == qkv.dtype
        assert signs is None or (signs.shape == (dim,) and signs.dtype == torch.float32)
        strides = [0, 0]
        for i, (k, v) in enumerate(((tail_k, tail_v), (ring_k, ring_v))):
            if k is not None and v is not None:
                assert k.stride() == v.stride() and k.stride()[1:] == (dim, 1) and k.dtype == v.dtype
                assert k.dtype in (torch.float32, torch.bfloat16)
                strides[i], cache_bf16 = k.stride(0), k.dtype == torch.bfloat16
        assert slots.dtype == torch.int64 and slots.shape == (2,) and slots.is_contiguous()
        query_scale, key_scale = rotation_scales(dim)
        tensors = (qkv, q_norm, k_norm, cos, sin, signs, q_out, tail_k, tail_v, ring_k, ring_v, slots)
        call = _Token(
            *addresses(tensors),
            qkv.dtype == torch.bfloat16, cache_bf16, dim, num_qo_heads, retrieval, streaming, strides[0], strides[1],
            rotate_values, eps, query_scale, key_scale,
        )  # fmt: skip
        return PreparedCall(self._run, call, tensors=tensors)

    def prepare_unrotate(self, found: Tensor, signs: Tensor | None, num_rotated: int, out: Tensor) -> PreparedCall:
        """Undo the values' rotation in attention's output; see `unrotate.unrotate`.

        Args:
            signs: None where nothing is rotated: all heads are written to `out` as they are.
            out: float32 or bfloat16.
        """
        heads, dim = found.shape
        assert found.is_contiguous() and found.dtype == torch.float32 and 0 <= num_rotated <= heads
        assert out.is_contiguous() and out.shape == found.shape and out.dtype in (torch.float32, torch.bfloat16)
        assert num_rotated == 0 or (signs is not None and signs.shape == (dim,) and signs.dtype == torch.float32)
        tensors = (found, signs, out)
        return PreparedCall(
            self._unrotate, *addresses(tensors), out.dtype == torch.bfloat16, heads, num_rotated, dim,
            rotation_scales(dim)[0], tensors=tensors,
        )  # fmt: skip
