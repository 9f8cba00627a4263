"""The compiled quantizing of int4 weights against the torch reference: the same bits."""

import pytest
import torch

from longrun.kernels.cpu_int4 import CpuInt4
from longrun.paths import cache_dir
from longrun.quant import int4_weight
from longrun.quant.int4_weight import Int4Rows, quantize_int4

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["", "-mno-avx512f", "-mno-avx"])
def kernel(request):
    return CpuInt4(cache_dir() / "kernels", (request.param,) if request.param else ())


def found_by(kernel, weight, threads=None):
    data, scale = (torch.full_like(x, 77) for x in quantize_int4(weight, CPU))
    kernel.quantize(weight, data, scale, threads)
    return data, scale


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (37, 43), (5, 72), (64, 256), (9, 1536)])
def test_same_bits_as_torch(kernel, rows, columns):
    """Of weights of many magnitudes, with rows of zeros, ties of the largest, and single weights."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, 1, generator=generator).mul(60).sub(50).exp2()
    weight[rows // 2] = 0
    weight[rows // 3, ::2] = weight[rows // 3, 0].abs()
    weight[rows // 3, 1::2] = -weight[rows // 3, 0].abs()
    weight[-1, 1:] = 0
    for threads in (1, 3):
        for ours, theirs in zip(found_by(kernel, weight, threads), quantize_int4(weight, CPU), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_that_is_not_finite_has_such_a_step(kernel, bad):
    weight = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    weight[1, 40] = bad
    data, scale = found_by(kernel, weight)
    assert scale.isfinite().tolist() == [[True] * 3, [True, False, True]]
    want = quantize_int4(weight, CPU)
    assert torch.equal(data[0], want[0][0]) and torch.equal(scale[0], want[1][0])


def test_subnormal_weights(kernel):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 1e-40
    for ours, theirs in zip(found_by(kernel, weight), quantize_int4(weight, CPU), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_rows_are_set_wherever_they_go(kernel):
    weight = torch.randn(10, 50, generator=torch.Generator().manual_seed(2))
    data, scale = quantize_int4(weight, CPU)
    order = torch.tensor([7, 1, 4])
    rows = Int4Rows.empty(10, 50, kernel.quantize)
    rows[:6] = weight[:6]
    rows[2:].put_rows(4, weight[6:].double())
    assert torch.equal(rows.data, data) and torch.equal(rows.scale, scale)
    rows.index_copy_(0, order, weight[:3])
    assert torch.equal(rows.data[order], data[:3]) and torch.equal(rows.scale[order], scale[:3])
    assert torch.equal(rows.data[[0, 2, 3]], data[[0, 2, 3]])


def test_exact_sums_choose_the_same_steps(monkeypatch):
    """The order of float32 sums could decide only between tries that are equal up to rounding."""
    weight, seen = torch.randn(512, 256, generator=torch.Generator().manual_seed(3)), []
    ours = quantize_int4(weight, CPU)

    def exact_sums(values):
        seen.append(len(values))
        return values.double().sum(1, keepdim=True).float()

    monkeypatch.setattr(int4_weight, "_row_sums", exact_sums)
    exact = quantize_int4(weight, CPU)
    assert seen and torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])
