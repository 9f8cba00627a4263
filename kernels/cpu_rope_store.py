"""The compiled kernel of `cpu_rope_store.cpp`: one token's head norms, RoPE, rotation and append in one call, where
torch takes a dozen small operations a layer. The torch reference is `rope_store.rope_store_reference`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from longrun.kernels.cpu_library import CpuKernel
from longrun.quant.rotation import rotation_scales


class _Token(ctypes.Structure):
    """`Token` in cpu_rope_store.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv", "q_norm", "k_norm", "cos", "sin", "signs", "q_out", "tail_k", "tail_v", "ring_k", "ring_v",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "bf16", "cache_bf16", "head_dim", "num_qo_heads", "retrieval", "streaming", "tail_slot", "tail_stride",
                "ring_slot", "ring_stride", "rotate_values",
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
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_float)
        self._unrotate = self._function("longrun_unrotate", *types)

    def rope_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
        ring_k: Tensor | None, ring_v: Tensor | None, slots: tuple[int, int], num_qo_heads: int, *,
        q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0, signs: Tensor | None = None,
        rotate_values: bool = False,
    ) -> None:  # fmt: skip
        """Norm and turn one token's query and key heads; write q_out, and keys and values to their place in the cache.

        Args:
            slots: the token's places in tail and ring.
            All others, and what is rounded when: see `rope_store.rope_store`; float32 or bfloat16, any even head_dim.
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
                assert k.dtype in (torch.float32, torch.bfloat16) and 0 <= slots[i] < k.shape[1]
                strides[i], cache_bf16 = k.stride(0), k.dtype == torch.bfloat16
        query_scale, key_scale = rotation_scales(dim)
        tensors = (qkv, q_norm, k_norm, cos, sin, signs, q_out, tail_k, tail_v, ring_k, ring_v)
        self._run(
            _Token(
                *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
                qkv.dtype == torch.bfloat16, cache_bf16, dim, num_qo_heads, retrieval, streaming, slots[0], strides[0],
                slots[1], strides[1], rotate_values, eps, query_scale, key_scale,
            )
        )  # fmt: skip

    def unrotate_(self, out: Tensor, signs: Tensor) -> None:
        """Undo the values' rotation (`quant.rotation.rotation_of`) in attention's output, in place.

        Args:
            out: [..., head_dim], float32, contiguous.
            signs: float32 [head_dim].
        """
        dim = out.shape[-1]
        assert out.is_contiguous() and out.dtype == signs.dtype == torch.float32 and signs.shape == (dim,)
        scale = rotation_scales(dim)[0]
        self._unrotate(out.data_ptr(), signs.data_ptr(), out.numel() // dim, dim, scale)
