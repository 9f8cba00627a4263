"""Outputs among rotated values turned back: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

import pytest
import torch
from interpreted import INTERPRETED, LIMIT, accesses, compiled, error, interpreted_tests, not_interpreted

from longrun.errors import ConfigError

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.unrotate import unrotate, unrotate_kernel, unrotate_reference
from longrun.quant.rotation import random_signs, rotation_of, rotation_scales

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(heads, turned, dim, dtype, device="cpu"):
    """Rotated rows come back, the others as they are, and nothing after them is written."""
    signs = random_signs(dim, seed=dim).to(device)
    plain = torch.randn(heads, dim, generator=torch.Generator().manual_seed(heads)).to(device)
    found = plain.clone()
    found[:turned] = (plain[:turned].double() @ rotation_of(signs)[1].double()).float()
    given = found.clone()
    for turn in (unrotate, unrotate_reference):
        out = torch.full((heads + 1, dim), float("nan"), dtype=dtype, device=device)
        turn(found, signs, turned, out[:heads])
        assert error(out[:heads], plain) < LIMIT[dtype]
        assert out[heads:].isnan().all() and torch.equal(found, given)
    assert turned == 0 or error(given[:turned], plain[:turned]) > 0.5


if INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize(("heads", "turned"), [(1, 1), (9, 6), (9, 0)])
    def test_interpreted_unrotate(heads, turned, dim, dtype):
        check(heads, turned, dim, dtype)


@not_interpreted
def test_kernel_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) == 45


@not_interpreted
def test_shapes_that_are_not_served_are_refused():
    unrotate(torch.zeros(0, 64), torch.ones(64), 0, torch.zeros(0, 64))
    with pytest.raises(ConfigError, match="head_dim 80"):
        unrotate(torch.zeros(1, 80), torch.ones(80), 1, torch.zeros(1, 80))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
def test_it_compiles_without_a_gpu(dim, capability):
    pointers = {"found_ptr": "*fp32", "signs_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"SCALE": rotation_scales(dim)[0], "D": dim}
    ptx = compiled(unrotate_kernel, capability, pointers, constants, 1, ())
    assert {number for kind, number in accesses(ptx) if kind == "st"} == {dim // 2 // 32 * 2}
    assert "local" not in ptx, "registers are spilled"


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "turned"), [(1, 1), (9, 6), (32, 16), (32, 32)])
def test_unrotate_on_the_gpu(heads, turned, dim, dtype):
    check(heads, turned, dim, dtype, "cuda")
