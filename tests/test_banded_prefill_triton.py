"""Triton's prefill of streaming heads: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

How the interpreted tests run: interpreted.py. They use float32 and float16, because the interpreter multiplies bfloat16
matrices as if they were integers.
"""

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from streaming_kernels import TOLERANCE, compiled, random_ring, rms_ratio, stack_bytes

from longrun.cache.ring import Ring
from longrun.errors import ConfigError
from longrun.kernels.banded_attention import banded_attention, plan_band

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.banded_prefill import (
    BandConfig,
    banded_prefill,
    banded_prefill_kernel,
    banded_prefill_reference,
    default_config,
)

SMALL = {"packed": BandConfig(32, 16), "apart": BandConfig(16, 32, packed=False), "wide": BandConfig(64, 16)}


def fused_chunk(tokens, heads, group, head_dim, dtype, device="cpu", seed=0):
    """q [T, heads, group, head_dim], k and v [heads, T, head_dim]: views of one projection, other heads before them."""
    g = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(tokens, (heads + 1) * (group + 2), head_dim, generator=g, device=device).to(dtype)
    q, k, v = rows.split(((heads + 1) * group, heads + 1, heads + 1), dim=1)
    q = 2 * q.unflatten(1, (heads + 1, group))  # not too flat a softmax
    return q[:, 1:], k[:, 1:].transpose(0, 1), v[:, 1:].transpose(0, 1)


def check_prefill(tokens, heads, group, head_dim, start, window, dtype, config=None, device="cpu"):
    q, k, v = fused_chunk(tokens, heads, group, head_dim, dtype, device)
    ring_k, ring_v = random_ring(heads, *window, head_dim, dtype, start, device)
    wide = torch.full((tokens, heads, group + 1, head_dim), float("nan"), dtype=dtype, device=device)
    expected = torch.empty_like(q)
    arguments = (q, k, v, ring_k, ring_v, start, *window, head_dim**-0.5)
    banded_prefill(*arguments, wide[:, :, :group], config)
    banded_prefill_reference(*arguments, expected)
    assert rms_ratio(wide[:, :, :group], expected) < TOLERANCE[dtype]
    assert wide[:, :, group:].isnan().all()


def torch_path(q, k, v, ring, start, scale):
    """The same by `banded_attention`, keys gathered from a ring in the order of positions."""
    tokens, size = q.shape[0], ring.sink_size
    plan = plan_band(start, tokens, size, ring.recent_size, q.dtype, q.device)
    held = torch.arange(max(0, start - ring.recent_size), start) if start else torch.arange(0)
    sides = []
    for old, new in zip((ring.k, ring.v), (k, v), strict=True):
        slots = [p if p < size else size + (p - size) % ring.recent_size for p in held.tolist()]
        everything = torch.cat((old[:, slots].to(new.dtype), new), dim=1)  # positions from start - len(held)
        first = start - len(held)
        sinks = torch.cat((old[:, : min(size, start)].to(new.dtype), new[:, : max(0, plan.num_sinks - start)]), dim=1)
        sides.append((sinks, everything[:, plan.window_start - first :]))
    (sink_k, window_k), (sink_v, window_v) = sides
    found = banded_attention(q.permute(1, 2, 0, 3), sink_k, sink_v, window_k, window_v, plan, scale)
    return found.permute(2, 0, 1, 3)


def chunks_through_a_ring(kernel, sink_size, recent_size, chunks, dtype, device="cpu", head_dim=64):
    """RMS ratio of `kernel` to the torch path over consecutive chunks."""
    heads, group, start, errors = 2, 3, 0, []
    memory = torch.zeros(2, heads, sink_size + recent_size, head_dim, dtype=dtype, device=device)
    ring = Ring(*memory, sink_size, recent_size)
    for tokens in chunks:
        q, k, v = fused_chunk(tokens, heads, group, head_dim, dtype, device, seed=start)
        expected = torch_path(q, k, v, ring, start, head_dim**-0.5)
        out = torch.full_like(q, float("nan"))
        kernel(q, k, v, ring.k, ring.v, start, sink_size, recent_size, head_dim**-0.5, out)
        errors.append(rms_ratio(out, expected))
        in_order = [x.contiguous() for x in ring.in_order(start)]
        out.fill_(float("nan"))
        kernel(q, k, v, *in_order, start, sink_size, recent_size, head_dim**-0.5, out, in_order=True)
        errors.append(rms_ratio(out, expected))
        ring.append(k, v, start)
        start += tokens
    return max(errors)


if INTERPRETED:

    @pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
    @pytest.mark.parametrize(
        ("tokens", "start", "window"),
        [
            (1, 0, (4, 8)),  # one token, its own key only
            (1, 41, (4, 8)),
            (5, 0, (7, 3)),  # a chunk within the sinks
            (70, 3, (5, 9)),  # sinks from both sides
            (50, 13, (20, 30)),  # window not full yet
            (37, 21, (0, 24)),  # no sinks
            (33, 100, (0, 7)),
            (80, 48, (16, 32)),  # everything a multiple of the tile; the ring just full
            (40, 60, (33, 1)),  # a window of one
            (75, 3_000_001, (7, 19)),
            (20, 2**33 + 5, (7, 19)),  # positions beyond int32
        ],
    )
    def test_interpreted_prefill(tokens, start, window, config):
        check_prefill(tokens, 1, 3, 64, start, window, torch.float32, config)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("heads", "group", "head_dim"), [(1, 1, 128), (2, 4, 128), (1, 8, 64), (1, 40, 64)])
    def test_interpreted_prefill_shapes(heads, group, head_dim, dtype):
        check_prefill(19, heads, group, head_dim, 29, (5, 17), dtype, BandConfig(32, 16))

    def test_interpreted_prefill_default_config():
        check_prefill(45, 1, 2, 64, 77, (8, 40), torch.float16)
        check_prefill(45, 1, 2, 64, 0, (8, 40), torch.float32)

    def test_interpreted_prefill_from_a_ring_of_another_dtype():
        q, k, v = fused_chunk(20, 2, 2, 64, torch.float16)
        ring_k, ring_v = random_ring(2, 4, 16, 64, torch.bfloat16, 30)
        out, expected = torch.full_like(q, float("nan")), torch.empty_like(q)
        banded_prefill(q, k, v, ring_k, ring_v, 30, 4, 16, 0.125, out)
        banded_prefill_reference(q, k, v, ring_k, ring_v, 30, 4, 16, 0.125, expected)
        assert rms_ratio(out, expected) < TOLERANCE[torch.float16]

    def test_interpreted_prefill_sees_the_window_and_no_more():
        """An off-by-one of the window or of the sinks is far outside the tolerance."""
        q, k, v = fused_chunk(60, 1, 2, 64, torch.float32)
        ring_k, ring_v = random_ring(1, 6, 20, 64, torch.float32, 0)
        found = torch.empty(4, *q.shape)
        banded_prefill(q, k, v, ring_k, ring_v, 0, 6, 20, 0.125, found[0])
        for x, window in zip(found[1:], [(6, 20), (6, 19), (5, 20)], strict=True):
            banded_prefill_reference(q, k, v, ring_k, ring_v, 0, *window, 0.125, x)
        errors = [rms_ratio(found[0], x) for x in found[1:]]
        assert errors[0] < TOLERANCE[torch.float32] and min(errors[1:]) > 0.05

    @pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
    def test_interpreted_prefill_in_chunks_is_the_torch_path(config):
        def kernel(*arguments, in_order=False):
            banded_prefill(*arguments, config, in_order)

        chunks = (3, 1, 20, 7, 45, 2, 16)  # below the sinks, within the window, beyond it
        assert chunks_through_a_ring(kernel, 9, 16, chunks, torch.float32) < TOLERANCE[torch.float32]


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 47


@not_interpreted
def test_prefill_reference_is_the_torch_path():
    chunks = (3, 1, 20, 7, 345, 2, 16)
    assert chunks_through_a_ring(banded_prefill_reference, 9, 16, chunks, torch.float32) < TOLERANCE[torch.float32]


@not_interpreted
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"k": torch.zeros(2, 9, 64)}, r"k has shape \[2, 9, 64\]"),
        ({"v": torch.zeros(2, 10, 64).half()}, "float16"),
        ({"q": torch.zeros(10, 2, 3, 128)[..., ::2]}, "q not contiguous"),
        ({"ring_k": torch.zeros(2, 11, 64)}, r"\[2, 11, 64\]"),
        ({"ring_k": torch.zeros(2, 11, 64), "ring_v": torch.zeros(2, 11, 64)}, r"\[2, 12, 64\] or more"),
        ({"ring_v": torch.zeros(2, 24, 64)[:, ::2]}, "ring_v not contiguous"),
        ({"out": torch.zeros(10, 3, 2, 64)}, "out has shape"),
        ({"start": -1}, "start -1"),
        ({"recent_size": 0}, "recent_size 0"),
        ({"recent_size": 2**30, "start": 12}, "1073741824"),
    ],
)
def test_prefill_refuses(change, word):
    dim = change.pop("head_dim", 64)
    given = {
        "q": torch.zeros(10, 2, 3, dim), "k": torch.zeros(2, 10, dim), "v": torch.zeros(2, 10, dim),
        "ring_k": torch.zeros(2, 12, dim), "ring_v": torch.zeros(2, 12, dim), "start": 20, "sink_size": 4,
        "recent_size": 8, "softmax_scale": 0.125, "out": torch.zeros(10, 2, 3, dim),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=word):
        banded_prefill(**(given | change))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "item"), [(64, "bf16"), (128, "bf16"), (128, "fp32")])
def test_prefill_compiles_without_a_gpu(head_dim, item, capability, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[item]
    config = default_config(head_dim, dtype, torch.device("cuda"))
    constants = {
        "GROUP": 4, "PACK": 4, "HEAD_DIM": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if item == "fp32" else "tf32",
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    built = compiled(banded_prefill_kernel, item, constants, capability, **options)
    ptx = built.asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes a copy, pipelined
    if item == "bf16":
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
        assert built.metadata.shared <= (227 if capability == 90 else 163) * 1024
    assert stack_bytes(built, tmp_path) == 0


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("start", [0, 77, 3_000_000])
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "head_dim", "window"),
    [
        (32768, 4, 4, 128, (128, 256)), (1000, 4, 4, 128, (128, 256)), (1000, 8, 1, 64, (64, 256)),
        (777, 3, 7, 128, (4, 1020)), (130, 2, 8, 64, (0, 333)),
    ],
)  # fmt: skip
def test_prefill_on_the_gpu(tokens, heads, group, head_dim, window, start):
    check_prefill(tokens, heads, group, head_dim, start, window, torch.bfloat16, device="cuda")


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_prefill_on_the_gpu_in_other_dtypes(dtype):
    for head_dim in (64, 128):
        check_prefill(1000, 2, 4, head_dim, 500, (100, 200), dtype, device="cuda")


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("block_m", "block_n", "num_warps", "num_stages"), [(128, 64, 8, 2), (64, 64, 4, 3)])
def test_prefill_on_the_gpu_with_other_tiles(block_m, block_n, num_warps, num_stages, packed):
    config = BandConfig(block_m, block_n, num_warps, num_stages, packed)
    for start in (0, 200, 12345):
        check_prefill(1500, 3, 5, 128, start, (100, 300), torch.bfloat16, config, "cuda")


@pytest.mark.gpu
@not_interpreted
def test_prefill_in_chunks_on_the_gpu_is_the_torch_path():
    chunks = (50, 1, 200, 700, 3000, 7)
    for dtype, bound in (
        (torch.bfloat16, 1e-2),
        (torch.float32, 1e-4),
    ):  # both sides round, torch's float32 its own way
        assert chunks_through_a_ring(banded_prefill, 100, 256, chunks, dtype, "cuda", 128) < bound


@pytest.mark.gpu
@not_interpreted
def test_prefill_of_rows_beyond_four_gib_elements():
    """Token offsets beyond 2**31 and 2**32 elements in q, k and out."""
    tokens, far = 2**15 + 100, 2**17
    q, k, v = fused_chunk(tokens, 1, 2, 64, torch.bfloat16, "cuda")
    ring_k, ring_v = random_ring(1, 16, 64, 64, torch.bfloat16, 1000, "cuda")
    spread = []
    for x in (q, torch.full_like(q, float("nan"))):
        room = torch.empty(tokens * far, dtype=x.dtype, device="cuda")
        spread.append(torch.as_strided(room, x.shape, (far, 128, 64, 1)).copy_(x))
    room = torch.empty(tokens * far, dtype=k.dtype, device="cuda")
    far_k = torch.as_strided(room, k.shape, (tokens * far, far, 1)).copy_(k)
    expected = torch.empty_like(q)
    banded_prefill(spread[0], far_k, v, ring_k, ring_v, 1000, 16, 64, 0.125, spread[1])
    banded_prefill_reference(q, k, v, ring_k, ring_v, 1000, 16, 64, 0.125, expected)
    assert rms_ratio(spread[1], expected) < TOLERANCE[torch.bfloat16]
