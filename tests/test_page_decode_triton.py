"""Decode from quantized pages on a GPU: the Triton kernel in its interpreter and compiled for two architectures, the
CUDA kernel compiled where a compiler is found, and both on a real GPU (`-m gpu`) against the torch reference.

Run as a program with TRITON_INTERPRET=1, this file prints what the interpreter finds as JSON: the variable must be set
before Triton is imported, which other tests of one process may have done.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page_views import ALL, FEW_AND_MANY, exact_tokens, in_order, scattered_view
from ptx_by_hand import run_ptx

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton", reason="Triton is made for Linux")

from longrun.errors import ConfigError  # noqa: E402
from longrun.kernels import page_decode  # noqa: E402
from longrun.kernels.page_decode import Workspace  # noqa: E402
from longrun.kernels.page_decode_cuda import SOURCE, CudaPageDecode, stage_bytes  # noqa: E402
from longrun.kernels.page_view import decode_attention as reference  # noqa: E402
from longrun.quant.kv_format import PageFormat  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One call: page counts by head, group, head_dim, tokens of sink page and tail (None: no exact tokens), part of
    the lists, mask, one list for all heads."""

    counts: tuple[int, ...]
    group: int
    dim: int
    exact: tuple[int, int] | None = (64, 33)
    skip: int = 0
    limit: int = ALL
    sink_size: int = 0
    first: int | tuple[int, ...] = 0
    shared: bool = False
    other_slot: int | None = 1000

    def __str__(self) -> str:
        return "-".join(str(x) for x in astuple(self)).replace(" ", "")


SMALL = [
    Case((3,), 1, 64, (64, 64), shared=True, other_slot=None),
    Case((5, 5), 3, 128, (64, 1), shared=True),
    Case((0, 0, 0), 4, 128, (64, 37)),
    Case((4, 4), 8, 64, None, skip=1, limit=3, other_slot=0),
    Case((1,), 4, 128, (0, 5)),
    Case((7, 0, 3), 5, 64, (64, 9), skip=2, limit=4),
    # positions of pages begin at 64, of the tail at 640: the ends of pages, their middle, all of some, all of a list
    Case((5, 5, 1, 2), 2, 64, (64, 33), sink_size=7, first=(150, 640, 5000, 660)),
    Case((5, 1, 4), 4, 64, (64, 1), sink_size=100, first=(127, 320, 641)),
    Case((3, 4), 3, 128, None, sink_size=0, first=(0, 2**31 - 1)),
    Case((4, 3), 4, 64, (0, 3), skip=1, sink_size=200, first=(200, 2**31 - 1)),
]
LARGE = [
    Case((count,) * heads, group, dim, exact, skip, shared=shared)
    for (heads, group), dim, (skip, count), exact, shared in itertools.product(
        [(1, 4), (4, 4), (3, 3), (8, 1), (2, 8)],
        [64, 128],
        [(0, 0), (7, 8), (0, 131), (3, 397)],
        [(0, 1), (64, 64), (64, 33), None],
        [True],
    )
] + [
    replace(Case(FEW_AND_MANY, group, dim, exact, skip, limit, sink_size, first), other_slot=other_slot)
    for group, dim, exact, (skip, limit), (sink_size, first), other_slot in itertools.product(
        [1, 4, 7],
        [64, 128],
        [(64, 33), None],
        [(0, ALL), (1, 64), (63, 64)],
        [(0, 0), (70, (3000, 0, 64 * 67 + 31, 8704, 2**31 - 1))],
        [None, 300],
    )
]
both_formats = pytest.mark.parametrize("name", ["int4", "k5v3"])

# q * key scale and p * value scale are rounded to float16; over keys of this spread scores differ by some 1e-3
TOLERANCE = 4e-3


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS; not a number where anything is not finite."""
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def make(case: Case, device="cpu", seed=0, q_scale=0.3, name="int4"):
    """q, view and exact tokens of a case."""
    view = scattered_view(
        PageFormat(name, 64, case.dim), case.counts, skip=case.skip, limit=case.limit, sink_size=case.sink_size,
        first=case.first, other_slot=case.other_slot, shared=case.shared, device=device, seed=seed,
    )  # fmt: skip
    heads, tail_start = len(case.counts), 64 * (max(case.counts) + 5)  # after the last page that there may be
    exact = None
    if case.exact is not None:
        exact = exact_tokens(heads, view.fmt, *case.exact, tail_start, device=device, seed=seed + 1)
    q = torch.randn(heads, case.group, case.dim, generator=torch.Generator().manual_seed(seed + 2))
    return (q * q_scale).bfloat16().float().to(device), view, exact


def assert_close(found, expected):
    (out, lse), (expected, expected_lse) = found, expected
    seen = expected_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf) and (out[~seen] == 0).all() and (lse[~seen] == -torch.inf).all()
    if seen.any():
        assert error(out[seen], expected[seen]) < TOLERANCE
        assert lse_is_close(lse[seen], expected_lse[seen], 1e-3)
    for head in seen.any(1).nonzero().flatten():  # one of them may have larger values than all others
        assert error(out[head], expected[head]) < 2 * TOLERANCE
        assert lse_is_close(lse[head], expected_lse[head], 2e-3)


def lse_is_close(actual, expected, ratio):
    """Within a share of its values, or within ten times that where they are small: what is off by d weighs all weights
    e^d times as much, whatever its own value is."""
    return error(actual, expected) < ratio or (actual - expected).pow(2).mean().sqrt() < 10 * ratio


def poisoned(q, splits):
    heads, group, dim = q.shape
    space = Workspace.empty(heads, splits, group, dim, q.device)
    found = [q.new_full(shape, float("nan"), dtype=torch.float32) for shape in (q.shape, (heads, group))]
    for x in (space.out, space.stats):
        x.fill_(float("nan"))
    return space, *found


def check(kernel, q, view, exact, splits, **how) -> None:
    """Against the reference; and the same pages in one memory, in order and without a gap, give the same bits."""
    space, *found = poisoned(q, splits)
    kernel(q, view, exact, workspace=space, out=found[0], lse=found[1], **how)
    assert_close(found, reference(q, view, exact))
    if view.sink_size == 0 and not view.first.any():
        space, *dense = poisoned(q, splits)
        kernel(q, in_order(view), exact, workspace=space, out=dense[0], lse=dense[1], **how)
        assert torch.equal(dense[0], found[0]) and torch.equal(dense[1], found[1])


def interpret() -> int:
    calls = 0
    for case, splits, name in itertools.product(SMALL, (1, 3), ("int4", "k5v3")):
        check(page_decode.decode_attention, *make(case, name=name), splits, packed=False)
        calls += 1
    return calls


def test_triton_kernel_in_the_interpreter(warm_interpreter) -> None:
    done = warm_interpreter.run(__file__)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == 4 * len(SMALL)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_ptx_unpacks_every_nibble(bits: int) -> None:
    text = {3: page_decode.THREE_BITS_PTX, 4: page_decode.FOUR_BITS_PTX, 5: page_decode.FIVE_BITS_PTX}[bits].value
    words = np.random.default_rng(0).integers(0, 2**32, (2, 4096), dtype=np.uint32)
    found = run_ptx(text, list(words if bits == 5 else words[:1]), 4)
    low, high = (np.stack([a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16]) for a, b in (found[:2], found[2:]))
    keys, values = words[:, None] >> (8 * np.arange(4, dtype=np.uint32))[:, None] & 255
    mask = 7 if bits == 3 else 15
    fifths = (values & 8 > 0, values & 128 > 0) if bits == 5 else (0, 0)
    assert np.array_equal(low, (keys & mask) + 16 * fifths[0])
    assert np.array_equal(high, 16 * ((keys >> 4 & mask) + 16 * fifths[1]))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("packed", "key_bits", "dim"), [(True, 4, 64), (True, 4, 128), (False, 4, 64), (False, 4, 128), (True, 5, 128)]
)
def test_triton_kernels_compile(arch: int, packed: bool, key_bits: int, dim: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", arch, 32)
    types = {
        "q_ptr": "*fp32", "storage_ptr": "*u8", "other_ptr": "*u8", "other_slot": "i32", "table_ptr": "*i32",
        "table_stride": "i64", "index_ptr": "*fp16", "index_stride": "i64", "pages_ptr": "*i32", "pages_stride": "i64",
        "begins_ptr": "*i32", "counts_ptr": "*i32", "first_ptr": "*i32", "skip": "i32", "limit": "i32",
        "sink_size": "i32", "origin": "i32", "sink_k_ptr": "*bf16", "sink_v_ptr": "*bf16", "sink_stride": "i64",
        "tail_k_ptr": "*bf16", "tail_v_ptr": "*bf16", "tail_stride": "i64", "lengths_ptr": "*i32", "out_ptr": "*fp32",
        "stats_ptr": "*fp32", "group": "i32", "splits": "i32", "to_log2": "fp32",
    }  # fmt: skip
    constants = {"D": dim, "ROWS": 16, "PACKED": packed, "STAGES": 3, "KEY_BITS": key_bits}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    aligned |= {(list(types).index("index_stride"),): [["tt.divisibility", 16]]}
    source = ASTSource(page_decode.split_kernel, signature, constants, aligned)
    made = triton.compile(source, target=target, options={"num_warps": 2})
    assert made.asm["cubin"]
    assert ("0x00f000f0" in made.asm["ptx"]) == packed
    assert ("0x00700070" in made.asm["ptx"]) == ("0x01000100" in made.asm["ptx"]) == (key_bits == 5)
    if packed:
        assert made.asm["ptx"].count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") > 0
        types = {"part_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}
        types |= {"group": "i32", "splits": "i32"}
        constants = {"D": dim, "MANY": 128}
        source = ASTSource(page_decode.merge_kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
        assert triton.compile(source, target=target).asm["cubin"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("key_bits", [4, 5])
def test_cuda_kernel_compiles(tmp_path: Path, arch: str, dim: int, key_bits: int) -> None:
    defines = [f"-DHEAD_DIM={dim}", "-DSTAGES=3", "-DWARPS=4", f"-DKEY_BITS={key_bits}"]
    command = ["nvcc", f"-arch={arch}", *defines, "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "-o", str(tmp_path / "k.cubin"), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr and "warning" not in done.stderr


def test_shapes_without_a_kernel_are_refused() -> None:
    q, view, exact = make(SMALL[0])
    with pytest.raises(ConfigError, match=r"head_dim 80 .* \(64, 128\)"):
        page_decode.check_shapes(q.new_zeros(1, 1, 80), view, exact)
    with pytest.raises(ConfigError, match="9 query heads"):
        page_decode.check_shapes(q.new_zeros(1, 9, 64), view, exact)
    with pytest.raises(ConfigError, match="page_size 32"):
        page_decode.check_shapes(q, replace(view, fmt=PageFormat("int4", 32, 64)), exact)


def test_bytes_of_workspace_and_stage() -> None:
    space = Workspace.empty(4, 66, 4, 128, torch.device("cpu"))
    assert space.out.nbytes + space.stats.nbytes == Workspace.bytes_for(4, 66, 4, 128)
    fmt = PageFormat("int4", 64, 128)
    assert stage_bytes(128) == fmt.page_bytes + 384 and stage_bytes(64) == PageFormat("int4", 64, 64).page_bytes + 384


@pytest.fixture(scope="module", params=["triton", "cuda"])
def kernel(request):
    if request.param == "triton":
        return page_decode.decode_attention
    made = {(dim, name): CudaPageDecode(dim, kv_format=name) for dim in (64, 128) for name in ("int4", "k5v3")}
    return lambda q, view, exact, **more: made[q.shape[2], view.fmt.name].decode_attention(q, view, exact, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "case"),
    [*(("int4", case) for case in [*SMALL, *LARGE]), *(("k5v3", case) for case in [*SMALL, *LARGE[::3]])],
    ids=str,
)
def test_on_gpu(kernel, name, case, dtype) -> None:
    q, view, exact = make(case, "cuda", name=name)
    for splits in (1, 7, 33):
        check(kernel, q.to(dtype), view, exact, splits)
    assert_close(kernel(q.to(dtype) * 2, view, exact, softmax_scale=0.5), reference(q, view, exact))


def outlying(counts, group, dim, device, seed, q_scale, name):
    """Scores that grow page by page, and one token far above all."""
    q, view, exact = make(Case(counts, group, dim, (64, 5)), device, seed, q_scale, name)
    growth = torch.linspace(-2, 2, view.index.shape[1], device=device, dtype=torch.float16)
    for head, count in enumerate(counts):
        begin = int(view.begins[head])
        view.index[head, view.pages[head, begin : begin + count].long(), 1] += growth[:count, None]
    exact.sink_k[:, 3] = 8 * q[:, 0].bfloat16() / q_scale
    return q, view, exact


@pytest.mark.gpu
@both_formats
def test_rising_and_outlying_scores_on_gpu(kernel, name) -> None:
    """The reference exponent must follow."""
    for seed, q_scale in enumerate((0.01, 3.0, 12.0)):
        q, view, exact = outlying((200, 150), 4, 128, "cuda", seed, q_scale, name)
        expected = reference(q, view, exact)
        space, out, lse = poisoned(q, 2)
        kernel(q, view, exact, workspace=space, out=out, lse=lse)
        assert error(lse, expected[1]) < 1e-3
        assert error(out, expected[0]) < 1e-2 * max(1.0, 3 * q_scale)  # scores of hundreds, rounded likewise


@pytest.mark.gpu
@both_formats
def test_no_bias_over_many_pages_on_gpu(kernel, name) -> None:
    """Values far from zero that average out: what a tensor core cuts off, page after page, would stand out."""
    q, view, exact = make(Case((20_000,), 4, 128, None, other_slot=None), "cuda", q_scale=0.01, name=name)
    expected = reference(q, view, exact)
    out, lse = kernel(q, view, exact, splits=1)
    assert (out - expected[0]).abs().max() < 3e-4 and error(lse, expected[1]) < 1e-3


@pytest.mark.gpu
@both_formats
def test_storage_past_2_to_31_bytes_on_gpu(kernel, name) -> None:
    slots = 3 * 2**31 // 8448  # 6.4 GB
    q, small, exact = make(Case((90,) * 4, 4, 128, (64, 9), other_slot=None), "cuda", name=name)
    big = torch.empty(slots, 8448, dtype=torch.uint8, device="cuda").fill_(0xA5)
    used = small.table >= 0
    order = torch.randperm(slots - 490, device="cuda")[:360] + 400
    order[:90] = torch.arange(slots - 90, slots, device="cuda")  # which none of the others is
    table = small.table.clone()
    table[used] = order.int()
    big[order] = small.storage[small.table[used].long()]
    expected = reference(q, small, exact)
    assert_close(kernel(q, replace(small, storage=big, table=table), exact), expected)
    both = replace(small, table=table + 7 * used.int(), other=big, other_slot=7)  # everything in the other memory
    assert_close(kernel(q, both, exact), expected)


@pytest.mark.gpu
@both_formats
def test_graph_replay_with_other_lists_on_gpu(kernel, name) -> None:
    make_case = lambda seed: make(Case((300,) * 4, 4, 128, (64, 64), skip=5), "cuda", seed, name=name)  # noqa: E731
    q, view, exact = make_case(0)
    space, out, lse = poisoned(q, 33)
    kernel(q, view, exact, workspace=space, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, view, exact, workspace=space, out=out, lse=lse)
    for seed, (counts, lengths, first) in enumerate((
        ((300,) * 4, [64, 64, 20_000], 0),
        ((200, 5, 0, 6), [64, 1, 20_000], 0),
        ((1, 300, 68, 69), [0, 30, 20_000], 9_000),
        ((0,) * 4, [64, 2, 20_000], 20_001),
        ((300, 3, 299, 4), [0, 0, 0], 0),
    )):  # fmt: skip
        other_q, other, other_exact = make_case(seed)  # of the same shapes
        pairs = zip(tensors(view), tensors(other), strict=True)
        for to, of in ((q, other_q), (exact.tail_v, other_exact.tail_v), *pairs):
            to.copy_(of)
        view.counts.copy_(torch.tensor(counts, dtype=torch.int32))
        view.first.fill_(first)
        exact.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        for x in (out, lse, space.out, space.stats):
            x.fill_(float("nan"))
        graph.replay()
        assert_close((out, lse), reference(q, view, exact))


def tensors(view):
    return view.storage, view.other, view.table, view.index, view.pages, view.begins


if __name__ == "__main__":
    print(json.dumps(interpret()))
