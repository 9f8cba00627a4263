"""The CUDA decode kernel's own source on a CPU (cuda_on_cpu.py), against the torch reference: every index, mask,
fragment and exchange of it. What a GPU alone has, `-m gpu` tests: asynchronous copies and rounding of tensor cores."""

from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import COMPILER, host_decode

pytest.importorskip("triton", reason="the interface of the decode kernels stands beside Triton's")

from page_views import FEW_AND_MANY
from test_page_decode_triton import SMALL, TOLERANCE, Case, check, error, make, outlying, reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CASES = [
    *SMALL,
    Case((9,), 8, 128, (5, 64)),
    Case(FEW_AND_MANY, 2, 64, (3, 5), sink_size=70, first=(3000, 0, 64 * 67 + 31, 8704, 64 * 90)),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return {(dim, name): host_decode(dim, name, folder) for dim in (64, 128) for name in ("int4", "k5v3")}


@pytest.mark.parametrize("name", ["int4", "k5v3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(kernels, name, case):
    q, view, exact = make(case, name=name)
    kernel = kernels[case.dim, name].decode_attention
    check(kernel, q, view, exact, 1)
    if max(case.counts) < 100:
        check(kernel, q.to(torch.bfloat16), view, exact, 3)


@pytest.mark.parametrize(("stages", "warps"), [(2, 1), (3, 1)])
def test_lists_longer_than_the_lanes_of_a_warp(tmp_path, stages, warps):
    """Numbers and slots of 32 entries stand in a warp's lanes: ends of such batches, more of them than are ahead."""
    kernel = host_decode(64, "int4", tmp_path, stages, warps).decode_attention
    check(kernel, *make(Case((0, 32, 1, 137, 66), 1, 64, None, skip=1)), 1)


@pytest.mark.parametrize("name", ["int4", "k5v3"])
def test_nothing_hidden_is_the_same_bits(kernels, name):
    """Where the mask hides no token, its way through the kernel changes nothing."""
    q, view, exact = make(Case((6, 9), 3, 64), name=name)
    plain = kernels[64, name].decode_attention(q, view, exact, splits=1)
    for sink_size, first in ((10**6, 2**31 - 1), (64 * 5, 64 * 5), (300, 290)):
        masked = replace(view, sink_size=sink_size, first=torch.full_like(view.first, first))
        assert all(map(torch.equal, kernels[64, name].decode_attention(q, masked, exact, splits=1), plain))


@pytest.mark.parametrize("name", ["int4", "k5v3"])
def test_rising_and_outlying_scores(kernels, name):
    """The reference exponent must follow."""
    q, view, exact = outlying((24,), 4, 64, "cpu", 0, 3.0, name)
    expected = reference(q, view, exact)
    out, lse = kernels[64, name].decode_attention(q, view, exact, splits=1)
    assert error(lse, expected[1]) < 1e-3 and error(out, expected[0]) < 0.1


def test_the_fifth_bit_and_the_mask_of_values_count(kernels):
    """k5v3 pages read as int4's are far off, and so are int4's read as k5v3."""
    for name, other in (("int4", "k5v3"), ("k5v3", "int4")):
        q, view, exact = make(CASES[0], name=name)
        kernel = kernels[64, other]
        kernel.kv_format, held = name, kernel.kv_format
        out, _ = kernel.decode_attention(q, view, exact, splits=1)
        kernel.kv_format = held
        assert error(out, reference(q, view, exact)[0]) > 20 * TOLERANCE
