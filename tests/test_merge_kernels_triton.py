"""silu_mul and merging by log-sum-exp: interpreted, compiled for sm_80 and sm_90, and on a GPU (-m gpu).

How the interpreted tests run: interpreted.py.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreted import INTERPRETED, LIMIT, accesses, compiled, error, interpreted_tests, not_interpreted, same_bits

from longrun.errors import ConfigError
from longrun.kernels.dense_attention import merge_partial, reference_attention_with_lse

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.merge_partial import (
    merge_into,
    merge_into_reference,
    merge_kernel,
    merge_partial_,
    merge_partial_reference,
)
from longrun.kernels.silu_mul import silu_mul_, silu_mul_kernel, silu_mul_reference

NAN, INF = float("nan"), float("inf")


def partial_case(shape, dim, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    out, other = (torch.randn(*shape, dim, generator=g) for _ in range(2))
    lse, other_lse = (torch.randn(shape, generator=g) * 4 for _ in range(2))
    return [x.to(device) for x in (out, lse, other.to(dtype), other_lse)]


def empty_some(out, lse, other, other_lse):
    """Of every 8 rows: other empty (-inf, NaN), own empty, both empty; their outputs hold NaN."""
    flat = [x.view(-1, *x.shape[len(lse.shape) :]) for x in (out, lse, other, other_lse)]
    for row, empty in ((1, -INF), (3, NAN)):
        flat[3][row::8], flat[2][row::8] = empty, NAN
    flat[1][5::8], flat[0][5::8] = -INF, NAN
    for lse_of, out_of in ((1, 0), (3, 2)):
        flat[lse_of][6::8], flat[out_of][6::8] = -INF, NAN


def check_merge(shape, dim, dtype, device="cpu", **how):
    given = partial_case(shape, dim, dtype, device)
    expected = merge_partial(given[0].double(), given[1].double(), given[2].double(), given[3].double())
    actual = [x.clone() for x in given]
    assert merge_partial_(*actual, **how) is None
    assert error(actual[0], expected[0]) < LIMIT[torch.float32] and error(actual[1], expected[1]) < LIMIT[torch.float32]
    assert same_bits(actual[2], given[2]) and same_bits(actual[3], given[3])
    empty_some(*given)
    actual, reference = [x.clone() for x in given], [x.clone() for x in given]
    merge_partial_(*actual, **how)
    merge_partial_reference(*reference)
    lse, both = actual[1].flatten(), torch.zeros_like(actual[1], dtype=torch.bool).flatten()
    both[6::8] = True
    assert (lse[both] == -INF).all() and (actual[0].flatten(0, -2)[both] == 0).all()
    assert (
        error(lse[~both], reference[1].flatten()[~both]) < LIMIT[torch.float32]
        and error(actual[0], reference[0]) < LIMIT[torch.float32]
    )
    only = given[2].flatten(0, -2)[5::8].float(), given[0].flatten(0, -2)[1::8]
    assert same_bits(actual[0].flatten(0, -2)[5::8], only[0]) and same_bits(actual[0].flatten(0, -2)[1::8], only[1])


def check_merge_into(heads, tokens, dim, dtype, final_dtype, device="cpu"):
    given = partial_case((heads, tokens), dim, dtype, device, seed=1)
    empty_some(*given)
    before = [x.clone() for x in given]
    wide = torch.full((tokens, heads + 2, dim), NAN, dtype=final_dtype, device=device)
    final, expected = wide[:, :heads].transpose(0, 1), torch.empty(heads, tokens, dim, dtype=final_dtype, device=device)
    merge_into(*given, final)
    merge_into_reference(*before, expected)
    assert error(final, expected) < LIMIT[final_dtype]
    assert wide[:, heads:].isnan().all()
    assert all(same_bits(x, y) for x, y in zip(given, before, strict=True))


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "width", "extra"), [(5, 96, 7), (3, 2048, 0), (2, 2301, 16)])
    def test_interpreted_silu_mul(rows, width, extra, dtype):
        g = torch.Generator().manual_seed(rows)
        wide = (torch.randn(rows, 2 * width + extra, generator=g) * 4).to(dtype)
        wide[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -3e4]).to(dtype)
        given, reference = wide[:, : 2 * width], wide.clone()[:, : 2 * width]
        up, rest = given[:, width:].clone(), wide[:, 2 * width :].clone()
        expected = F.silu(given[:, :width].double()) * up.double()
        found, theirs = silu_mul_(given), silu_mul_reference(reference)
        assert found.shape == (rows, width) and found.data_ptr() == wide.data_ptr() and found.stride() == wide.stride()
        assert error(found, expected) < LIMIT[dtype] and error(theirs, expected) < 2 * LIMIT[dtype]
        assert same_bits(given[:, width:], up) and same_bits(wide[:, 2 * width :], rest)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("shape", "dim"), [((123,), 64), ((3, 41), 128), ((17,), 16)])
    def test_interpreted_merge(shape, dim, dtype):
        check_merge(shape, dim, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_interpreted_merge_into_a_transposed_output(dtype):
        check_merge_into(3, 23, 64, dtype, torch.float32)
        check_merge_into(9, 8, 128, dtype, torch.float16)

    def test_interpreted_merge_of_attention_over_two_halves():
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(3, n, 64, generator=g) for n in (10, 31, 31))
        whole, whole_lse = reference_attention_with_lse(q, k, v, False, 0.125)
        parts = [reference_attention_with_lse(q, k[:, s], v[:, s], False, 0.125) for s in (slice(0, 12), slice(12, 31))]
        (out, lse), (other, other_lse) = parts
        merge_partial_(out, lse, other, other_lse)
        assert error(out, whole) < 1e-6 and error(lse, whole_lse) < 1e-6


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 21


@not_interpreted
def test_shapes_that_are_not_served_are_refused():
    for dim, dtype, word in ((80, torch.float32, "head_dim 80"), (64, torch.float64, "float64")):
        with pytest.raises(ConfigError, match=word):
            merge_partial_(*partial_case((3,), dim, dtype))
        with pytest.raises(ConfigError, match=word):
            merge_into(*partial_case((3, 2), dim, torch.float32), torch.zeros(3, 2, dim, dtype=dtype))
    with pytest.raises(ConfigError, match="float64"):
        silu_mul_(torch.zeros(2, 8, dtype=torch.float64))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("item", ["bf16", "fp32"])
def test_merge_and_silu_mul_compile_without_a_gpu(item, capability):
    of, size = f"*{item}", {"bf16": 2, "fp32": 4}[item]
    ptx = compiled(silu_mul_kernel, capability, {"gate_up_ptr": of}, {"BLOCK": 2048}, 4, ("row_stride", "width"))
    assert {number for _, number in accesses(ptx)} == {16}
    lse = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "other_lse_ptr": "*fp32", "other_ptr": of}
    for in_place in (True, False):
        pointers = lse | {"to_ptr": "*fp32" if in_place else of}
        constants = {"D": 128, "BLOCK": 16, "IN_PLACE": in_place}
        ptx = compiled(merge_kernel, capability, pointers, constants, 4, ("outer_stride", "inner_stride"))
        wide = [access for access in accesses(ptx) if access[1] == 16]
        assert len(wide) >= 16 * 128 // 128 * (4 + size + (4 if in_place else size)) // 16
        assert {number for _, number in accesses(ptx)} == {16, 4}  # rows, and log-sum-exps


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "extra"), [(1024, 14336, 0), (123, 2301, 16), (1, 14336, 0)])
def test_silu_mul_on_the_gpu(rows, width, extra, dtype):
    wide = (torch.randn(rows, 2 * width + extra, device="cuda") * 4).to(dtype)
    wide[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -3e4])
    given, before = wide[:, : 2 * width], wide.clone()
    expected = F.silu(given[:, :width].double()) * given[:, width:].double()
    assert error(silu_mul_(given), expected) < LIMIT[dtype]
    assert same_bits(wide[:, width:], before[:, width:])


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "dim"), [((32, 4096), 128), ((123,), 64), ((9, 128), 128)])
def test_merge_on_the_gpu(shape, dim, dtype):
    check_merge(shape, dim, dtype, "cuda")
    check_merge(shape, dim, dtype, "cuda", block_rows=8, num_warps=2)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_into_on_the_gpu(dtype):
    check_merge_into(32, 2048, 128, dtype, torch.bfloat16, "cuda")
    check_merge_into(9, 123, 64, dtype, torch.float32, "cuda")


@pytest.mark.gpu
@not_interpreted
def test_silu_mul_and_merge_beyond_two_billion_elements():
    """Rows on both sides of 2**31 elements, and rows of a merge."""
    far = 2**31 + 256
    room = torch.empty(far + 2 * 4096, dtype=torch.bfloat16, device="cuda")
    rows = torch.as_strided(room, (2, 4096), (far, 1)).copy_(torch.randn(2, 4096))
    expected = silu_mul_reference(rows.clone())
    assert error(silu_mul_(rows), expected) < 2 * LIMIT[torch.bfloat16]
    del room, rows
    count = 2**24 + 24  # of 128 channels
    out, other = (torch.empty(count, 128, dtype=d, device="cuda") for d in (torch.float32, torch.bfloat16))
    lse, other_lse = torch.randn(2, count, device="cuda")
    ends = [slice(0, 64), slice(count - 64, count)]
    for part in ends:
        out[part].normal_(), other[part].normal_()
    given = [[x[part].clone() for x in (out, lse, other, other_lse)] for part in ends]
    merge_partial_(out, lse, other, other_lse)
    for part, case in zip(ends, given, strict=True):
        merge_partial_reference(*case)
        assert error(out[part], case[0]) < 2e-6 and error(lse[part], case[1]) < 2e-6
