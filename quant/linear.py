"""A linear layer over any weight format, for inference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.errors import ConfigError
from longrun.quant.int4_weight import dequantize_int4, quantize_int4
from longrun.quant.weight_format import NF4_GROUP, check_weight_format, is_quantized

# Rows of x up to which a CUDA nf4 product reads the packed weight directly; beyond, one dequantized temporary and a
# dense product are faster.
_PACKED_ROWS = 16
_QUANTIZE_ROWS = 2048


class QuantLinear:
    """`x @ weight.T + bias` with the weight held in one of `WEIGHT_FORMATS`.

    Quantized formats keep no dequantized copy between calls; one temporary weight lives during a call, or as long as
    the caller holds the result of `dense()`.

    Attributes:
        out_features, in_features: shape of the weight.
        weight_format: one of `WEIGHT_FORMATS`; see `longrun.quant.weight_format`.
        compute_dtype: dtype of inputs, outputs and bias.
        bias: [out_features] compute dtype, or None.
    """

    __slots__ = ("_data", "_scale", "_state", "bias", "compute_dtype", "in_features", "out_features", "weight_format")

    def __init__(
        self,
        weight: Tensor,
        weight_format: str,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Hold `weight` [out_features, in_features] (floating point) in `weight_format` on `device`.

        A weight that already has the dtype and device is used without a copy. int8 rounds to the nearest of
        -127..127 of each row's largest magnitude; nf4 is bitsandbytes' own quantization, int4 `quantize_int4`.

        Args:
            bias: [out_features], any floating dtype.
            compute_dtype: defaults to float32 for fp32, bfloat16 for bf16, and the weight's dtype otherwise.
            device: defaults to the weight's.

        Raises:
            ConfigError: unknown format; nf4 without bitsandbytes.
        """
        check_weight_format(weight_format)
        device = weight.device if device is None else torch.device(device)
        held = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weight_format)
        self.out_features, self.in_features = weight.shape
        self.weight_format = weight_format
        self.compute_dtype = compute_dtype or held or weight.dtype
        assert held is None or held == self.compute_dtype, (weight_format, self.compute_dtype)
        self.bias = None if bias is None else bias.to(device, self.compute_dtype)
        self._scale: Tensor | None = None
        self._state: Any = None
        if weight_format == "int8":
            self._data, self._scale = _quantize_int8(weight, device)
        elif weight_format == "int4":
            self._data, self._scale = quantize_int4(weight, device)
        elif weight_format == "nf4":
            self._data, self._state = _quantize_nf4(weight.to(device, self.compute_dtype), self.compute_dtype)
        else:
            self._data = weight.to(device, held)

    @classmethod
    def of_stored(
        cls, data: Tensor, weight_format: str, scale: Any, shape: tuple[int, int], compute_dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> QuantLinear:  # fmt: skip
        """A layer over what a quantized format stores, used as it is.

        Args:
            data: as the property `data` describes it, for weight_format int8, int4 or nf4.
            scale: int8 `row_scale`, int4 `group_scale`; nf4 bitsandbytes' QuantState, or whatever has its `absmax` and
                `code`, which is enough for the kernels of `longrun.kernels`.
            shape: (out_features, in_features).
            bias: [out_features] compute dtype.
        """
        assert is_quantized(weight_format)
        linear = object.__new__(cls)
        linear.out_features, linear.in_features = shape
        linear.weight_format, linear.compute_dtype, linear.bias = weight_format, compute_dtype, bias
        nf4 = weight_format == "nf4"
        linear._data, linear._scale, linear._state = data, None if nf4 else scale, scale if nf4 else None
        return linear

    @property
    def data(self) -> Tensor:
        """What is stored: [out_features, in_features] in the dtype of the format; for nf4 bitsandbytes' uint8
        [ceil(out_features * in_features / 2), 1], row-major, the first value of a byte in its high nibble; for int4
        uint8 [out_features, 4 * ceil(in_features / 8)], see `longrun.quant.int4_weight`."""
        return self._data

    @property
    def row_scale(self) -> Tensor | None:
        """int8: float32 [out_features, 1], what each row's integers are multiplied with. None otherwise."""
        return self._scale if self.weight_format == "int8" else None

    @property
    def group_scale(self) -> Tensor | None:
        """int4: bfloat16 [out_features, ceil(in_features / 32)], the step of 32 consecutive inputs. None otherwise."""
        return self._scale if self.weight_format == "int4" else None

    @property
    def absmax(self) -> Tensor | None:
        """nf4: float32 [ceil(out_features * in_features / 64)], what the code values of 64 consecutive weights are
        multiplied with. None otherwise."""
        return None if self._state is None else self._state.absmax

    @property
    def code(self) -> Tensor | None:
        """nf4: float32 [16], the value of each nibble, rising from -1 to 1. None otherwise."""
        return None if self._state is None else self._state.code

    @property
    def scale(self) -> Tensor | None:
        """`row_scale`, `group_scale` or `absmax`, whichever the format has; None for fp32 and bf16."""
        return self.absmax if self._state is not None else self._scale

    @property
    def num_bytes(self) -> int:
        """Bytes of weight, scales and bias; equal to `linear_bytes`."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds."""
        return [tensor for tensor in (self._data, self.scale, self.bias) if tensor is not None]

    def dense(self) -> Tensor:
        """The weight [out_features, in_features] in the compute dtype: itself for fp32 and bf16, else a temporary."""
        if self.weight_format == "int8":
            if self._data.is_cuda:
                return _kernels().dequantize_int8(self._data, self._scale, self.compute_dtype)
            return torch.mul(self._data, self._scale, out=torch.empty_like(self._data, dtype=self.compute_dtype))
        if self.weight_format == "int4":
            unpack = _kernels().dequantize_int4 if self._data.is_cuda else dequantize_int4
            return unpack(self._data, self._scale, self.in_features, self.compute_dtype)
        if self.weight_format == "nf4":
            if self._data.is_cuda or self.in_features % NF4_GROUP == 0:
                return _bitsandbytes().functional.dequantize_4bit(self._data, self._state)
            return self._dense_nf4()
        return self._data

    def _dense_nf4(self) -> Tensor:
        """bitsandbytes 0.50 gives wrong weights on a CPU where a row ends within a group."""
        pairs = torch.stack((self.code.repeat_interleave(16), self.code.repeat(16)), 1)  # the two values of each byte
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=self._data.device)
        rest = weight.view(-1)
        for start in range(0, len(self.absmax), _QUANTIZE_ROWS):
            scale = self.absmax[start : start + _QUANTIZE_ROWS, None]
            codes = self._data[start * NF4_GROUP // 2 :][: len(scale) * NF4_GROUP // 2]
            values = F.pad(pairs[codes.view(-1).int()].view(-1), (0, len(scale) * NF4_GROUP - 2 * len(codes)))
            part = rest[start * NF4_GROUP :][: values.numel()]
            part.copy_((values.view(-1, NF4_GROUP) * scale).view(-1)[: part.numel()])
        return weight

    def __call__(
        self, x: Tensor, out: Tensor | None = None, accumulate: bool = False, dense: Tensor | None = None
    ) -> Tensor:
        """Product of x [T, in_features] in the compute dtype; its rows may be strided.

        Args:
            out: [T, out_features] to write into; a new tensor without it.
            accumulate: add to `out` instead of overwriting it.
            dense: result of `dense()`, so that several calls share one dequantization.

        Returns:
            [T, out_features] compute dtype, `out` itself where given.
        """
        if dense is None and self.weight_format == "nf4" and x.is_cuda and x.shape[0] <= _PACKED_ROWS:
            product = _bitsandbytes().matmul_4bit(x, self._data, self._state, bias=self.bias)
            if out is None:
                return product
            return out.add_(product) if accumulate else out.copy_(product)
        weight = self.dense() if dense is None else dense
        if out is None:
            return F.linear(x, weight, self.bias)
        if accumulate:
            out.addmm_(x, weight.t())
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(self.bias, x, weight.t(), out=out)


def _quantize_int8(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and the float32 step [out, 1] of each row; rows at a time, to bound the temporary."""
    data = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=device)
    for start in range(0, weight.shape[0], _QUANTIZE_ROWS):
        rows = slice(start, start + _QUANTIZE_ROWS)
        part = weight[rows].to(device, torch.float32, copy=True)
        step = part.abs().amax(dim=1, keepdim=True).div_(127)
        scale[rows] = step
        # A row of zeros has step 0: any divisor gives zeros.
        data[rows] = part.div_(step.masked_fill_(step == 0, 1)).round_()
    return data, scale


def _quantize_nf4(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    functional = _bitsandbytes().functional
    data, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_GROUP, quant_type="nf4")
    assert state.dtype == dtype
    # Every QuantState comes with its own copy of the 16 code values; one a device is enough.
    state.code = _nf4_code(weight.device)
    return data, state


@lru_cache(maxsize=8)
def _nf4_code(device: torch.device) -> Tensor:
    return _bitsandbytes().functional.get_4bit_type("nf4", device=device)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """The GPU's kernels, imported where there is a GPU: torch's CUDA builds bring Triton, others need not."""
    from longrun.kernels import weight_dequantize

    return weight_dequantize


@lru_cache(maxsize=1)
def _bitsandbytes() -> Any:
    """bitsandbytes, imported only where nf4 is used: the import takes a second or two."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"weight format nf4 needs the package bitsandbytes, which cannot be imported ({error}): "
            f"install it, or use weight format fp32, bf16, int8 or int4"
        ) from error
    return bitsandbytes
