"""The CUDA decode kernel's own source on a CPU (cuda_on_cpu.py), against the torch reference: every index, mask,
fragment and exchange of it. What a GPU alone has, `-m gpu` tests: asynchronous copies and rounding of tensor cores."""

import pytest
import torch
from cuda_on_cpu import COMPILER, host_decode

pytest.importorskip("triton", reason="the interface of the decode kernels stands beside Triton's")

from test_page_decode_triton import SMALL, TOLERANCE, error, expected_of, make, poisoned

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
# the last: more pages than the 32 whose slots a warp's lanes hold
CASES = [*SMALL, (3, 3, 64, 9, 1, 7, 64, 33), (1, 8, 128, 9, 0, 8, 5, 64), (1, 2, 64, 140, 0, 139, 0, 0)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return {(dim, name): host_decode(dim, name, folder) for dim in (64, 128) for name in ("int4", "k5v3")}


@pytest.mark.parametrize("name", ["int4", "k5v3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(kernels, name, case):
    q, pages = make(case, name=name)
    expected = expected_of(q, pages)
    for splits, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        space, out, lse = poisoned(q, splits)
        kernels[case[2], name].decode_attention(q.to(dtype), pages, workspace=space, out=out, lse=lse)
        assert error(out, expected[0]) < TOLERANCE
        assert error(lse, expected[1]) < 1e-3


@pytest.mark.parametrize("name", ["int4", "k5v3"])
def test_rising_and_outlying_scores(kernels, name):
    """The reference exponent must follow: scores that grow page by page, and one token far above all."""
    q, pages = make((1, 4, 64, 24, 0, 24, 64, 5), q_scale=3.0, name=name)
    pages.index[:, :, 1] += torch.linspace(-2, 2, 24, dtype=torch.float16)[None, :, None]
    pages.sink_k[:, 3] = 8 * q[:, 0].bfloat16() / 3.0
    expected = expected_of(q, pages)
    out, lse = kernels[64, name].decode_attention(q, pages, splits=1)
    assert error(lse, expected[1]) < 1e-3 and error(out, expected[0]) < 0.1


def test_the_fifth_bit_and_the_mask_of_values_count(kernels):
    """k5v3 pages read as int4's are far off, and so are int4's read as k5v3."""
    for name, other in (("int4", "k5v3"), ("k5v3", "int4")):
        q, pages = make(CASES[0], name=name)
        kernel = kernels[64, other]
        kernel.kv_format, held = name, kernel.kv_format
        out, _ = kernel.decode_attention(q, pages, splits=1)
        kernel.kv_format = held
        assert error(out, expected_of(q, pages)[0]) > 20 * TOLERANCE
