"""The compiled CPU kernel for a few tokens against torch over every weight format and odd shapes, built for this
processor and for lesser ones."""

import platform

import pytest
import torch

from longrun.kernels.cpu_linear import MAX_TOKENS, CpuLinear, vector_linear_reference
from longrun.paths import cache_dir
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import WEIGHT_FORMATS

# (out_features, in_features): whole and broken vectors of 128, 64 and 16 weights, groups and words; rows that are no
# multiple of those worked on together
SHAPES = [(6, 64), (5, 128), (10, 192), (9, 576), (2, 36), (7, 40), (4, 200), (3, 1), (1, 7), (12, 77), (66, 1536)]
X86 = platform.machine() in ("x86_64", "AMD64")
PROCESSORS = {"native": (), "avx2": ("-mno-avx512f",), "sse": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")}


@pytest.fixture(scope="module", params=PROCESSORS if X86 else ["native"])
def kernel(request):
    return CpuLinear(cache_dir() / "kernels", PROCESSORS[request.param])  # compiled by whichever test comes first


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def make(weight_format, rows, columns, dtype=torch.float32, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g) / columns**0.5
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weight_format, dtype)
    held = torch.randn(rows, generator=g) if bias else None
    return QuantLinear(weight, weight_format, held, compute), compute


def inputs(tokens, columns, dtype, seed=1):
    """Rows that are slices of a wider tensor full of NaN."""
    wide = torch.full((tokens, columns + 3), torch.nan, dtype=dtype)
    wide[:, 1 : columns + 1] = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return wide[:, 1 : columns + 1]


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
def test_odd_shapes(kernel, weight_format, tokens):
    for rows, columns in SHAPES:
        linear, dtype = make(weight_format, rows, columns, bias=rows % 2 == 1)
        x = inputs(tokens, columns, dtype)
        out = torch.full((tokens, rows + 2), torch.nan, dtype=dtype)
        assert kernel.vector_linear(x, linear, out[:, 1:-1]).data_ptr() == out[:, 1:-1].data_ptr()
        assert out[:, 0].isnan().all() and out[:, -1].isnan().all(), "wrote beside its rows"
        expected = vector_linear_reference(x, linear)
        assert rms_ratio(out[:, 1:-1], expected) < (1e-6 if dtype == torch.float32 else 4e-3), (rows, columns)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm_gate_and_residual(kernel, weight_format, dtype, tokens):
    for rows, columns in [(10, 576), (6, 50)]:
        linear, dtype = make(weight_format, rows, columns, dtype, bias=True)
        x, norm = inputs(tokens, columns, dtype), inputs(1, columns, dtype, seed=2)[0]
        options = {"norm_weight": norm, "eps": 0.5, "gated": True, "accumulate": True}
        before = inputs(tokens, rows // 2, dtype, seed=3)
        out = kernel.vector_linear(x, linear, before.clone(), **options)
        expected = vector_linear_reference(x, linear, before.clone(), **options)
        assert rms_ratio(out, expected) < (5e-6 if dtype == torch.float32 else 6e-3)
        assert rms_ratio(out, before) > 0.1, "nothing was added"


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_row_does_not_depend_on_threads_or_its_place(kernel, weight_format):
    rows, columns = 37, 192
    linear, dtype = make(weight_format, rows, columns)
    x = inputs(1, columns, dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernel.vector_linear(x, linear))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_steps_that_are_no_number_reach_only_their_rows(kernel):
    """The steps behind a row's last group belong to the next row."""
    linear, _ = make("int4", 5, 36)
    linear.group_scale[3] = torch.nan
    linear.group_scale[1] = torch.inf
    out = kernel.vector_linear(inputs(1, 36, torch.float32), linear)
    assert out.isfinite().tolist() == [[True, False, True, False, True]]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_extreme_weights_and_activations(kernel, weight_format):
    """All codes of a format, in every place of a word, on activations from 2^-40 to 2^40."""
    codes = torch.arange(16).repeat(24) - 8 if weight_format == "int4" else torch.arange(384) % 255 - 127
    weight = torch.stack([codes.roll(shift) for shift in range(16)]).float()
    linear = QuantLinear(weight, weight_format)
    for power in (-40, 0, 40):
        x = inputs(1, 384, torch.float32) * 2.0**power
        assert rms_ratio(kernel.vector_linear(x, linear), vector_linear_reference(x, linear)) < 1e-6
