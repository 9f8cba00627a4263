"""Hopper's kernel of attention to listed pages: its Python on the CPU, compiled for sm_90, and (`-m gpu`) on a GPU."""

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from streaming_kernels import stack_bytes
from tile_case import NAN, PAGE, TOLERANCE, check_attend, every_entry, piece, queries, rms_ratio, some_lists

from longrun.kernels.tile_attention import TILE, attend_tiles_reference

pytest.importorskip("triton", reason="Triton is optional without a GPU")

import triton
from gluon_on_cpu import Emulated

from longrun.kernels import tile_attend, tile_attend_hopper
from longrun.kernels.tile_attend import AttendConfig, attend_tiles_
from longrun.kernels.tile_attend_hopper import attend_tiles_kernel, attend_tiles_overlapped


def attend(undone, stages, *inputs):
    *inputs, scale = inputs
    attend_tiles_overlapped(*inputs, undone, scale, PAGE, 2.0**90, 8, stages)


def attend_all(stages, *inputs):
    """With nothing left undone."""
    undone = torch.zeros_like(inputs[4], dtype=torch.int8)
    attend(undone, stages, *inputs)
    assert not undone.any()


@pytest.fixture(params=[False, True], ids=["late", "eager"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(tile_attend_hopper, "attend_tiles_kernel", Emulated(attend_tiles_kernel, request.param))


@not_interpreted
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "pages"), [(300, 2, 3, 64, 5), (129, 1, 4, 128, 9), (77, 1, 6, 64, 1)]
)
def test_the_kernel_on_the_cpu(emulated, tokens, heads, group, dim, pages, stages):
    check_attend(tokens, heads, group, dim, pages, torch.bfloat16, partial(attend_all, stages))


@not_interpreted
def test_tiles_that_are_left_undone(emulated):
    """Where weights overflow beside what was found before, and where nothing was: such tiles stay as they are."""
    g = torch.Generator().manual_seed(0)
    q, (k, v) = queries(3 * TILE, 1, 2, 64, torch.bfloat16, g), piece(1, 3, 64, torch.bfloat16, g)
    total, lse = torch.randn(1, 2, 3 * TILE, 64, generator=g), torch.zeros(1, 2, 3 * TILE)
    lse[0, 0, 5], lse[0, 0, TILE + 7], lse[0, 1, 2 * TILE] = -200.0, NAN, -torch.inf
    total[0, 0, TILE + 7] = NAN
    lists, counts = every_entry(1, 2, 3 * TILE, 3)
    before, expected = (total.clone(), lse.clone()), (total.clone(), lse.clone())
    undone = torch.zeros_like(counts, dtype=torch.int8)
    attend(undone, 3, q, k, v, lists, counts, 0, total, lse, 0.125)
    assert undone.tolist() == [[[1, 1, 0], [0, 0, 1]]]
    attend_tiles_reference(q, k, v, lists, counts, 0, *expected, 0.125)
    rows = undone.bool().repeat_interleave(TILE, dim=2)
    for x, old, new in zip((total, lse), before, expected, strict=True):
        assert torch.equal(x[rows].nan_to_num(7), old[rows].nan_to_num(7))
        assert rms_ratio(x[~rows], new[~rows]) < TOLERANCE[torch.bfloat16]


@not_interpreted
def test_the_emulation_finds_what_goes_wrong():
    """A place that is overwritten while a product still reads it, a wrong page, a wait without a copy, a result that
    is used too early, a missing fence."""

    def kernel_with(changed, by):
        source = inspect.getsource(attend_tiles_kernel.fn).replace("@gluon.jit\n", "")
        assert changed in source
        space = dict(attend_tiles_kernel.fn.__globals__)
        exec(compile(source.replace(changed, by), "changed", "exec"), space)
        return Emulated(SimpleNamespace(fn=space["attend_tiles_kernel"]), eager=True)

    def run(kernel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tile_attend_hopper, "attend_tiles_kernel", kernel)
            check_attend(140, 1, 3, 64, 9, torch.bfloat16, partial(attend_all, 2), first_page=5)

    run(kernel_with("at - 1 + STAGES", "at - 1 + STAGES"))
    for changed, by in (
        ("next_v = at + 1 + STAGES, at - 1 + STAGES", "next_v = at + 1 + STAGES, at + STAGES"),
        ("for_v, then = then, for_k", "for_v, then = for_k, for_k"),
        ("k_bars, next_k, next_k < num,", "k_bars, next_k, next_k < num - 1,"),
        ("warpgroup_mma_wait(1, deps=[following])", "warpgroup_mma_wait(2, deps=[following])"),
        ("    hopper.fence_async_shared()\n", ""),
    ):
        with pytest.raises((AssertionError, IndexError)):
            run(kernel_with(changed, by))


if INTERPRETED:

    def test_interpreted_kernel_does_what_is_left_undone():
        g, cpu = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        q, (k, v) = queries(300, 2, 2, 64, torch.float32, g), piece(2, 4, 64, torch.float32, g)
        total, lse = torch.randn(2, 2, 300, 64, generator=g), torch.zeros(2, 2, 300)
        lists, counts = some_lists((2, 2, 3), 4, 2, cpu)
        undone = torch.zeros_like(counts, dtype=torch.int8)
        undone[0, 1, :2], undone[1, 0, 1], undone[1, 0, 2] = 1, 1, 1
        before, expected = (total.clone(), lse.clone()), (total.clone(), lse.clone())
        attend_tiles_reference(q, k, v, lists, counts, 2, *expected, 0.125)
        config = AttendConfig(block_m=64)
        tile_attend.attend_listed(q, k, v, lists, counts, 2, total, lse, undone, 0.125, PAGE, config)
        rows = undone.bool().repeat_interleave(TILE, dim=2)[:, :, :300]
        for x, old, new in zip((total, lse), before, expected, strict=True):
            assert torch.equal(x[~rows], old[~rows])
            assert not torch.equal(x[rows], old[rows]) and rms_ratio(x[rows], new[rows]) < TOLERANCE[torch.float32]


@not_interpreted
def test_kernels_through_the_interpreter():
    assert interpreted_tests(__file__) == 1


@not_interpreted
@pytest.mark.parametrize(("dim", "warps", "stages", "stack"), [(64, 8, 4, 0), (128, 8, 3, 0), (128, 4, 2, 256)])
def test_the_kernel_compiles_for_hopper(tmp_path, dim, warps, stages, stack):
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    constants = {
        "HEAD_DIM": dim, "PAGE_SIZE": PAGE, "TILE": TILE, "LIMIT": 2.0**90, "SEARCHED": 1024, "STAGES": stages
    }  # fmt: skip
    page = f"tensordesc<bf16[{PAGE},{dim}],{layout!r}>"
    pointers = {"q": "*bf16", "k": page, "v": page, "lists": "*i32", "counts": "*i32", "undone": "*i8"}
    pointers |= {"total": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    kernel = attend_tiles_kernel
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    names = list(types)
    even = [i for i, name in enumerate(names) if types[name][0] == "*" or "stride" in name]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    source = GluonASTSource(kernel, types, {(names.index(n),): x for n, x in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert stack_bytes(built, tmp_path) <= stack and built.metadata.shared <= 227 * 1024 // (8 // warps)


GPU_CONFIGS = {
    f"{warps} warps, {stages} stages": AttendConfig(num_warps=warps, num_stages=stages, overlapped=True)
    for warps, stages in ((8, 2), (8, 3), (8, 4), (4, 2))
}


@pytest.mark.gpu
@pytest.mark.parametrize("config", GPU_CONFIGS.values(), ids=GPU_CONFIGS)
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "pages"),
    [(300, 2, 3, 64, 5), (1000, 3, 4, 128, 70), (129, 1, 1, 128, 4), (77, 1, 6, 64, 1), (5000, 4, 4, 128, 300)],
)
def test_the_kernel_on_a_gpu(tokens, heads, group, dim, pages, config):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for Hopper")
    for before in (3.0, -200.0, 90.0):
        kernel = partial(attend_tiles_, config=config)
        check_attend(tokens, heads, group, dim, pages, torch.bfloat16, kernel, device="cuda", before=before)
