"""Outputs among rotated values turned back: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

import pytest
import torch
from interpreted import INTERPRETED, LIMIT, accesses, compiled, error, interpreted_tests, not_interpreted

from longrun.errors import ConfigError

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.turn_back import turn_back_, turn_back_kernel, turn_back_reference
from longrun.quant.rotation import random_signs, rotation_of, rotation_scales


def check(heads, dim, device="cpu"):
    """Rotated rows come back, and nothing after them is touched."""
    signs = random_signs(dim, seed=dim).to(device)
    plain = torch.randn(heads + 1, dim, generator=torch.Generator().manual_seed(heads)).to(device)
    given = (plain.double() @ rotation_of(signs)[1].double()).float()
    for turn in (turn_back_, turn_back_reference):
        found = given.clone()
        turn(found[:heads], signs)
        assert error(found[:heads], plain[:heads]) < LIMIT[torch.float32]
        assert torch.equal(found[heads:], given[heads:])
    assert error(given[:heads], plain[:heads]) > 0.5


if INTERPRETED:

    @pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize("heads", [1, 9, 32])
    def test_interpreted_turn_back(heads, dim):
        check(heads, dim)


@not_interpreted
def test_kernel_through_the_interpreter():
    assert interpreted_tests(__file__) == 15


@not_interpreted
def test_shapes_that_are_not_served_are_refused():
    turn_back_(torch.zeros(0, 64), torch.ones(64))
    with pytest.raises(ConfigError, match="head_dim 80"):
        turn_back_(torch.zeros(1, 80), torch.ones(80))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
def test_it_compiles_without_a_gpu(dim, capability):
    pointers = {"found_ptr": "*fp32", "signs_ptr": "*fp32"}
    ptx = compiled(turn_back_kernel, capability, pointers, {"SCALE": rotation_scales(dim)[0], "D": dim}, 1, ())
    assert {number for kind, number in accesses(ptx) if kind == "st"} == {dim // 2 // 32 * 4}
    assert "local" not in ptx, "registers are spilled"


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [1, 9, 32])
def test_turn_back_on_the_gpu(heads, dim):
    check(heads, dim, "cuda")
