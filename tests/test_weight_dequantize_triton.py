"""Kernels that make dense weights of int4 and int8: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

import re

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted

from longrun.quant.int4_weight import dequantize_int4 as dequantize_int4_reference
from longrun.quant.int4_weight import quantize_int4
from longrun.quant.linear import QuantLinear

pytest.importorskip("triton", reason="Triton is optional without a GPU")

import triton

from longrun.kernels.weight_dequantize import (
    dequantize_int4,
    dequantize_int8,
    dequantize_int8_reference,
    int4_dequantize_kernel,
    int8_dequantize_kernel,
)

# rows and columns: rows of whole groups, of whole words, of neither; less than a program and more than several
SHAPES = [(1, 32), (7, 64), (33, 576), (5, 72), (9, 13), (50, 100), (130, 1000), (3, 4096)]


def weight(rows, columns, device="cpu"):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device)


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs begin as NaN: a value that no program writes shows."""
    empty = torch.empty

    def filled(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def check_int4(rows, columns, dtype, device="cpu"):
    data, scale = quantize_int4(weight(rows, columns), torch.device("cpu"))
    expected = dequantize_int4_reference(data, scale, columns, dtype)
    actual = dequantize_int4(data.to(device), scale.to(device), columns, dtype)
    assert actual.dtype == dtype and torch.equal(actual.cpu(), expected)


def check_int8(rows, columns, dtype, device="cpu"):
    layer = QuantLinear(weight(rows, columns), "int8")
    expected = dequantize_int8_reference(layer.data, layer.row_scale, dtype)
    actual = dequantize_int8(layer.data.to(device), layer.row_scale.to(device), dtype)
    assert actual.dtype == dtype and torch.equal(actual.cpu(), expected)


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("rows", "columns"), SHAPES)
    def test_interpreted(rows, columns, dtype, poisoned):
        check_int4(rows, columns, dtype)
        check_int8(rows, columns, dtype)


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) == 2 * len(SHAPES)


@not_interpreted
def test_int8_reference_is_what_the_layer_holds():
    layer = QuantLinear(weight(9, 40), "int8")
    assert torch.equal(dequantize_int8_reference(layer.data, layer.row_scale, torch.float32), layer.dense())


def build(kernel, width, capability):
    """The kernel as it is launched for bfloat16 weights of this width, built without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    int4 = kernel is int4_dequantize_kernel
    types = {"w_ptr": "*i32" if int4 else "*i8", "scale_ptr": "*bf16" if int4 else "*fp32", "out_ptr": "*bf16"}
    types |= {"num_words": "i32"} if int4 else {}
    constants = {"K": width}
    constants |= {"GROUP": 32, "WORD": 8, "WORDS": 1024} if int4 else {"COLUMNS": 2048}
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", [int4_dequantize_kernel, int8_dequantize_kernel])
def test_compiles_without_a_gpu(kernel, capability):
    for width in (4096, 14336, 576, 72):
        made = build(kernel, width, capability)
        assert made.asm["cubin"] and f".target sm_{capability}" in made.asm["ptx"]
        if width >= 4096:
            assert re.search(r"st\.global[.\w]*\.v4", made.asm["ptx"])  # 16 bytes a store


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_gpu(dtype, poisoned):
    for rows, columns in [*SHAPES, (28672, 4096), (4096, 14336)]:
        check_int4(rows, columns, dtype, "cuda")
        check_int8(rows, columns, dtype, "cuda")


@pytest.mark.gpu
@not_interpreted
def test_offsets_beyond_two_gib(poisoned):
    """More than 2^32 weights of int4 and 2^31 of int8: the last rows are as the first."""
    width = 16384
    few = {name: QuantLinear(weight(256, width).bfloat16(), name, device="cuda") for name in ("int4", "int8")}
    for name, rows in (("int4", 2**32 // width + 256), ("int8", 2**31 // width + 256)):
        layer, repeat = few[name], rows // 256
        data, scale = layer.data.repeat(repeat, 1), layer._scale.repeat(repeat, 1)
        if name == "int4":
            dense = dequantize_int4(data, scale, width, torch.bfloat16)
        else:
            dense = dequantize_int8(data, scale, torch.bfloat16)
        assert torch.equal(dense[-256:], layer.dense()) and torch.equal(dense[:256], layer.dense())
        del data, scale, dense


@pytest.mark.gpu
@not_interpreted
def test_layers_quantized_on_the_gpu_are_as_those_of_the_cpu():
    """Sums in another order may choose another step for a few groups, of all but equal error."""
    wide = weight(300, 1056)
    here, there = QuantLinear(wide, "int4"), QuantLinear(wide, "int4", device="cuda")
    assert (here.group_scale != there.group_scale.cpu()).float().mean() < 0.01
    apart = [(layer.dense().cpu() - wide).norm() / wide.norm() for layer in (here, there)]
    assert abs(apart[0] - apart[1]) < 1e-4
