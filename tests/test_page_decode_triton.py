"""Decode from quantized pages on a GPU: the Triton kernel in its interpreter and compiled for two architectures, the
CUDA kernel compiled where a compiler is found, and both on a real GPU (`-m gpu`) against the torch reference.

Run as a program with TRITON_INTERPRET=1, this file prints what the interpreter finds as JSON: the variable must be set
before Triton is imported, which other tests of one process may have done.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_by_hand import run_ptx

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

triton = pytest.importorskip("triton", reason="Triton is made for Linux")

from longrun.errors import ConfigError  # noqa: E402
from longrun.kernels import page_decode  # noqa: E402
from longrun.kernels.page_decode import DecodePages, Workspace  # noqa: E402
from longrun.kernels.page_decode_cuda import SOURCE, CudaPageDecode, stage_bytes  # noqa: E402
from longrun.kernels.page_view import ExactRun, PageRun  # noqa: E402
from longrun.kernels.page_view import decode_attention as reference  # noqa: E402
from longrun.quant.kv_format import PageFormat  # noqa: E402
from longrun.quant.page_codec import encode_pages  # noqa: E402

# heads, group, head_dim, pages of the table, first page, pages read, sink tokens, tail tokens
SMALL = [
    (1, 1, 64, 3, 0, 3, 64, 64),
    (2, 3, 128, 7, 2, 5, 64, 1),
    (3, 4, 128, 5, 0, 0, 64, 37),
    (2, 8, 64, 4, 1, 3, 0, 0),
    (1, 4, 128, 2, 0, 1, 0, 5),
]
LARGE = [
    (heads, group, dim, 400, first, count, sinks, tails)
    for (heads, group), dim, (first, count), (sinks, tails) in itertools.product(
        [(1, 4), (4, 4), (3, 3), (8, 1), (2, 8)],
        [64, 128],
        [(0, 0), (7, 1), (0, 131), (3, 397)],
        [(0, 1), (64, 64), (64, 33), (0, 0)],
    )
    if count + sinks + tails
]
both_formats = pytest.mark.parametrize("name", ["int4", "k5v3"])

# q * key scale and p * value scale are rounded to float16; over keys of this spread scores differ by some 1e-3
TOLERANCE = 4e-3


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS; not a number where anything is not finite."""
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def make(case, device="cpu", seed=0, extra_slots=3, slot_offset=5, q_scale=0.3, name="int4"):
    """q, DecodePages at random slots of a garbage-filled pool, and the reference's (out, lse) as a function."""
    heads, group, dim, max_pages, first, count, sinks, tails = case
    fmt = PageFormat(name, 64, dim)
    g = torch.Generator(device).manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    sizes = torch.rand(dim, generator=g, device=device) * 3  # channels of unlike size and offset, as keys have
    k = randn(heads, max_pages, 64, dim) * sizes + sizes.flip(0)
    v = randn(heads, max_pages, 64, dim) + randn(heads, max_pages, 1, dim)
    payload, index = encode_pages(k, v, fmt)
    slots = torch.randperm(heads * max_pages + extra_slots, generator=g, device=device)
    storage = torch.randint(0, 256, (len(slots), fmt.payload_bytes), dtype=torch.uint8, generator=g, device=device)
    chosen = slots[: heads * max_pages].view(heads, max_pages)
    storage[chosen] = payload
    exact = [randn(heads, 64, dim).bfloat16() for _ in range(4)]
    for x, used in zip(exact, (sinks, sinks, tails, tails), strict=True):
        x[:, used:] = float("nan")  # what is not named must not be read into the result
    lengths = torch.tensor([first, count, sinks, tails], dtype=torch.int32, device=device)
    table = (chosen + slot_offset).int()
    table[:, :first] = table[:, first + count :] = -(2**30)  # nor this
    pages = DecodePages(storage, table, index, *exact, lengths, slot_offset, name)
    q = (randn(heads, group, dim) * q_scale).bfloat16().float()
    return q, pages


def expected_of(q, pages):
    first, count, sinks, tails = pages.lengths.tolist()
    fmt = PageFormat(pages.kv_format, 64, q.shape[2])
    run = PageRun(pages.storage, pages.table, pages.index, first, count, fmt, pages.slot_offset)
    exact = [ExactRun(pages.sink_k, pages.sink_v, sinks), ExactRun(pages.tail_k, pages.tail_v, tails)]
    return reference(q, run if count else None, tuple(exact))


def poisoned(q, splits):
    heads, group, dim = q.shape
    space = Workspace.empty(heads, splits, group, dim, q.device)
    found = torch.full_like(q, float("nan")), q.new_full((heads, group), float("nan"))
    for x in (space.out, space.stats):
        x.fill_(float("nan"))
    return space, *found


def interpret() -> list[list[float]]:
    errors = []
    for case, splits, name in itertools.product(SMALL, (1, 3), ("int4", "k5v3")):
        q, pages = make(case, name=name)
        space, out, lse = poisoned(q, splits)
        page_decode.decode_attention(q, pages, workspace=space, out=out, lse=lse, packed=False)
        errors.append([error(a, b) for a, b in zip((out, lse), expected_of(q, pages), strict=True)])
    return errors


def test_triton_kernel_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4 * len(SMALL)
    assert all(out < TOLERANCE and lse < 1e-3 for out, lse in errors), errors


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
        "q_ptr": "*fp32", "storage_ptr": "*u8", "slot_stride": "i64", "table_ptr": "*i32", "table_stride": "i64",
        "index_ptr": "*fp16", "index_stride": "i64", "lengths_ptr": "*i32", "sink_k_ptr": "*bf16",
        "sink_v_ptr": "*bf16", "sink_stride": "i64", "tail_k_ptr": "*bf16", "tail_v_ptr": "*bf16",
        "tail_stride": "i64", "out_ptr": "*fp32", "stats_ptr": "*fp32", "group": "i32", "splits": "i32",
        "slot_offset": "i64", "to_log2": "fp32",
    }  # fmt: skip
    constants = {"D": dim, "ROWS": 16, "PACKED": packed, "STAGES": 3, "KEY_BITS": key_bits}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    aligned |= {(i,): [["tt.divisibility", 16]] for i in (2, 6)}
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
    q, pages = make((1, 1, 64, 2, 0, 2, 0, 0))
    with pytest.raises(ConfigError, match=r"head_dim 80 .* \(64, 128\)"):
        page_decode.check_shapes(q.new_zeros(1, 1, 80), pages)
    with pytest.raises(ConfigError, match="9 query heads"):
        page_decode.check_shapes(q.new_zeros(1, 9, 64), pages)
    short = DecodePages(pages.storage, pages.table, pages.index, *(torch.zeros(1, 32, 64),) * 4, pages.lengths)
    with pytest.raises(ConfigError, match="page_size 32"):
        page_decode.check_shapes(q, short)


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
    return lambda q, pages, **more: made[q.shape[2], pages.kv_format].decode_attention(q, pages, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "case"),
    [*(("int4", case) for case in [*SMALL, *LARGE]), *(("k5v3", case) for case in [*SMALL, *LARGE[::3]])],
    ids=str,
)
def test_on_gpu(kernel, name, case, dtype) -> None:
    q, pages = make(case, "cuda", name=name)
    expected = expected_of(q, pages)
    for splits in (1, 7, 33):
        space, out, lse = poisoned(q, splits)
        kernel(q.to(dtype), pages, workspace=space, out=out, lse=lse)
        assert error(out, expected[0]) < TOLERANCE
        assert error(lse, expected[1]) < 1e-3
    scaled = kernel(q.to(dtype) * 2, pages, softmax_scale=0.5)
    assert error(scaled[0], expected[0]) < TOLERANCE


@pytest.mark.gpu
@both_formats
def test_rising_and_outlying_scores_on_gpu(kernel, name) -> None:
    """The reference exponent must follow: scores that grow page by page, and one token far above all."""
    for seed, q_scale in enumerate((0.01, 3.0, 12.0)):
        q, pages = make((2, 4, 128, 200, 0, 200, 64, 5), "cuda", seed, q_scale=q_scale, name=name)
        pages.index[:, :, 1] += torch.linspace(-2, 2, 200, device="cuda", dtype=torch.float16)[None, :, None]
        pages.sink_k[:, 3] = 8 * q[:, 0].bfloat16() / q_scale
        expected = expected_of(q, pages)
        space, out, lse = poisoned(q, 2)
        kernel(q, pages, workspace=space, out=out, lse=lse)
        assert error(lse, expected[1]) < 1e-3
        assert error(out, expected[0]) < 1e-2 * max(1.0, 3 * q_scale)  # scores of hundreds, rounded likewise


@pytest.mark.gpu
@both_formats
def test_no_bias_over_many_pages_on_gpu(kernel, name) -> None:
    """Values far from zero that average out: what a tensor core cuts off, page after page, would stand out."""
    q, pages = make((1, 4, 128, 20_000, 0, 20_000, 0, 0), "cuda", q_scale=0.01, name=name)
    expected = expected_of(q, pages)
    out, lse = kernel(q, pages, splits=1)
    assert (out - expected[0]).abs().max() < 3e-4 and error(lse, expected[1]) < 1e-3


@pytest.mark.gpu
@both_formats
def test_storage_past_2_to_31_bytes_on_gpu(kernel, name) -> None:
    slots = 3 * 2**31 // 8448  # 6.4 GB
    q, small = make((4, 4, 128, 90, 0, 90, 64, 9), "cuda", slot_offset=0, name=name)
    big = torch.empty(slots, 8448, dtype=torch.uint8, device="cuda").fill_(0xA5)
    order = torch.randperm(slots - 490, device="cuda")[:360] + 400
    order[:90] = torch.arange(slots - 90, slots, device="cuda")  # which none of the others is
    table = order.view(4, 90).int()
    big[table.long()] = small.storage[small.table.long()]
    expected = expected_of(q, small)
    out, lse = kernel(q, replace(small, storage=big, table=table))
    assert error(out, expected[0]) < TOLERANCE and error(lse, expected[1]) < 1e-3


@pytest.mark.gpu
@both_formats
def test_graph_replay_with_other_lengths_on_gpu(kernel, name) -> None:
    q, pages = make((4, 4, 128, 300, 0, 300, 64, 64), "cuda", name=name)
    space, out, lse = poisoned(q, 33)
    kernel(q, pages, workspace=space, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, pages, workspace=space, out=out, lse=lse)
    for lengths in ([0, 300, 64, 64], [11, 200, 64, 1], [0, 1, 0, 30], [5, 0, 64, 2], [0, 300, 0, 0]):
        pages.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        q.copy_(torch.randn_like(q).mul_(0.3).bfloat16())
        for x in (out, lse, space.out, space.stats):
            x.fill_(float("nan"))
        graph.replay()
        expected = expected_of(q, pages)
        assert error(out, expected[0]) < TOLERANCE and error(lse, expected[1]) < 1e-3


if __name__ == "__main__":
    print(json.dumps(interpret()))
