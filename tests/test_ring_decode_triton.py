"""Triton's decode of streaming heads: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

How the interpreted tests run: interpreted.py. They use float32 and float16, because the interpreter multiplies bfloat16
matrices as if they were integers.
"""

import re

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from streaming_kernels import TOLERANCE, compiled, random_ring, rms_ratio, stack_bytes

from longrun.errors import ConfigError

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.ring_decode import RingWorkspace, ring_decode, ring_decode_kernel, ring_decode_reference


def check_decode(heads, group, num_slots, head_dim, length, dtype, num_splits=None, device="cpu", out_dtype=None):
    g = torch.Generator(device).manual_seed(num_slots + length)
    q = 2 * torch.randn(heads, group, head_dim, generator=g, device=device).to(dtype)
    ring_k, ring_v = random_ring(heads, 0, num_slots, head_dim, dtype, length, device)
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    out = torch.full_like(q, float("nan"), dtype=out_dtype or dtype)
    expected = torch.empty_like(q, dtype=torch.float32)
    arguments = q, ring_k, ring_v, lengths, head_dim**-0.5
    assert ring_decode(*arguments, out, num_splits=num_splits) is out
    ring_decode_reference(*arguments, expected)
    assert rms_ratio(out, expected) < TOLERANCE[out.dtype]


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("heads", "group", "num_slots", "head_dim", "length", "num_splits"),
        [
            (1, 1, 1, 64, 1, None), (2, 3, 123, 64, 1, 1), (2, 3, 123, 64, 50, 5), (3, 4, 320, 128, 320, None),
            (1, 4, 384, 128, 129, None), (1, 8, 576, 64, 575, 2), (1, 2, 5, 64, 5, 9), (1, 1, 700, 64, 699, 300),
        ],
    )  # fmt: skip
    def test_interpreted_decode(heads, group, num_slots, head_dim, length, num_splits, dtype):
        check_decode(heads, group, num_slots, head_dim, length, dtype, num_splits)

    def test_interpreted_decode_mixes_dtypes_and_counts_too_many_as_all():
        check_decode(2, 3, 70, 64, 70, torch.bfloat16, 2, out_dtype=torch.float32)
        q, ring_k, ring_v = torch.randn(2, 3, 64), *torch.randn(2, 2, 70, 64)
        out = torch.empty(2, 2, 3, 64)
        for x, length in zip(out, (70, 1000), strict=True):
            ring_decode(q, ring_k, ring_v, torch.tensor([length], dtype=torch.int32), 0.125, x)
        assert torch.equal(*out)

    def test_interpreted_decode_leaves_its_counters_at_zero():
        q, ring_k, ring_v = torch.randn(2, 3, 64), *torch.randn(2, 2, 70, 64)
        space = RingWorkspace.make(6, 4, 64, "cpu")
        space.partials.fill_(float("nan"))
        expected = torch.empty_like(q)
        for length in (70, 3, 41):
            lengths, out = torch.tensor([length], dtype=torch.int32), torch.full_like(q, float("nan"))
            ring_decode(q, ring_k, ring_v, lengths, 0.125, out, space, 4)
            ring_decode_reference(q, ring_k, ring_v, lengths, 0.125, expected)
            assert rms_ratio(out, expected) < TOLERANCE[torch.float32] and not space.counters.any()


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 16


@not_interpreted
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"ring_k": torch.zeros(1, 12, 64)}, r"\[1, 12, 64\]"),
        ({"q": torch.zeros(2, 3, 128)[..., ::2]}, "q not contiguous"),
        ({"out": torch.zeros(3, 2, 64)}, "out has shape"),
        ({"lengths": torch.tensor([3])}, "int64"),
        ({"lengths": torch.tensor([3, 4], dtype=torch.int32)}, "2 x torch.int32"),
        ({"num_splits": 0}, "num_splits 0"),
        (dict.fromkeys(("ring_k", "ring_v"), torch.zeros(2, 1, 64).expand(2, 5 * 10**6, 64)), "keep fewer"),
        ({"num_splits": 3, "workspace": RingWorkspace.make(6, 2, 64, "cpu")}, r"asks for \[18, 66\]"),
    ],
)
def test_decode_refuses(change, word):
    dim = change.pop("head_dim", 64)
    given = {
        "q": torch.zeros(2, 3, dim), "ring_k": torch.zeros(2, 12, dim), "ring_v": torch.zeros(2, 12, dim),
        "lengths": torch.tensor([3], dtype=torch.int32), "softmax_scale": 0.125, "out": torch.zeros(2, 3, dim),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=word):
        ring_decode(**(given | change))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "item"), [(64, "bf16"), (128, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("num_splits", [1, 3, 1000])
def test_decode_compiles_without_a_gpu(num_splits, head_dim, item, capability, tmp_path):
    tile, width = {1: (512, 1), 3: (128, 4), 1000: (64, 64)}[num_splits]
    constants = {"GROUP": 4, "HEAD_DIM": head_dim, "SPLITS": num_splits, "TILE": tile, "WIDTH": width}
    constants["PDL"] = capability >= 90
    built = compiled(ring_decode_kernel, item, constants, capability, num_warps=8)
    assert re.search(r"ld\.global[.\w]*\.v4", built.asm["ptx"])
    assert num_splits == 1 or stack_bytes(built, tmp_path) == 0


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("num_splits", [None, 1, 7])
@pytest.mark.parametrize(
    ("heads", "group", "num_slots", "head_dim"), [(1, 1, 123, 64), (4, 4, 384, 128), (8, 7, 320, 64)]
)
def test_decode_on_the_gpu(heads, group, num_slots, head_dim, num_splits):
    for dtype in (torch.bfloat16, torch.float32):
        for length in (1, num_slots // 3, num_slots):
            check_decode(heads, group, num_slots, head_dim, length, dtype, num_splits, "cuda")
            check_decode(heads, group, num_slots, head_dim, length, dtype, num_splits, "cuda", torch.float32)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("num_splits", [1, 3, 6])
def test_a_captured_decode_follows_the_length(num_splits):
    """Every replay counts its splits from zero, on poisoned outputs, many times in a row."""
    num_slots, device = 384, torch.device("cuda")
    q = torch.randn(4, 4, 128, device=device).bfloat16()
    ring_k, ring_v = torch.randn(2, 4, num_slots, 128, device=device).bfloat16()
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    out = torch.empty(40, *q.shape, dtype=torch.float32, device=device)
    space = RingWorkspace.make(16, num_splits, 128, device)
    ring_decode(q, ring_k, ring_v, lengths, 0.1, out[0], space, num_splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in out:
            ring_decode(q, ring_k, ring_v, lengths, 0.1, x, space, num_splits)
    expected = torch.empty_like(out[0])
    for length in (1, 2, 127, 128, 129, 256, 383, 384, 1000, 5):
        out.fill_(float("nan"))
        lengths.fill_(length)
        graph.replay()
        ring_decode_reference(q, ring_k, ring_v, lengths, 0.1, expected)
        assert max(rms_ratio(x, expected) for x in out) < TOLERANCE[torch.float32]
        assert not space.counters.any()
