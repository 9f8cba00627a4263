"""Triton page kernels: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

How the interpreted tests run: interpreted.py.
"""

import re
from dataclasses import replace

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted, same_bits
from page_views import FEW_AND_MANY, in_order, scattered_view

from longrun.errors import ConfigError
from longrun.kernels import page_view
from longrun.kernels.page_view import PageView
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.page_dequantize import dequantize_kernel, dequantize_pages
from longrun.kernels.page_store import reference_store_pages, store_kernel, store_pages

POISON = 0xFF  # as float16 or bfloat16 pairs of it are NaN
both_formats = pytest.mark.parametrize("name", ["int4", "k5v3"])


def random_tokens(heads, pages, fmt, dtype, device="cpu", seed=0):
    """k, v [heads, pages * page_size, head_dim] as a step leaves them: heads between tokens, one fused projection."""
    g = torch.Generator().manual_seed(seed)
    fused = torch.randn(pages * fmt.page_size, heads + 1, 2, fmt.head_dim, generator=g)
    size = torch.rand(fmt.head_dim, generator=g) * 4  # channels of unlike size, as keys have
    fused[:, :, 0] = fused[:, :, 0] * size + size.flip(-1)
    fused = fused.to(device, dtype)
    return fused[:, 1:, 0].transpose(0, 1), fused[:, 1:, 1].transpose(0, 1)


def poisoned_pool(heads, pages, fmt, device="cpu", extra_slots=5, max_pages=None, seed=1):
    """storage, slots (scattered, a view of a wider table), index, page numbers (neither first nor in order)."""
    g = torch.Generator().manual_seed(seed)
    storage = torch.full((heads * pages + extra_slots, fmt.payload_bytes), POISON, dtype=torch.uint8)
    table = torch.full((heads, pages + 3), -1, dtype=torch.int32)
    table[:, 2:-1] = torch.randperm(len(storage), generator=g)[: heads * pages].view(heads, pages)
    index = torch.full((heads, pages + 4, 2, fmt.head_dim), float("nan"), dtype=torch.float16)
    numbers = (torch.randperm(pages + 4, generator=g)[:pages]).int()
    return storage.to(device), table.to(device)[:, 2:-1], index.to(device), numbers.to(device)


def store_both(k, v, fmt, slot_offset=0):
    """Pool and index as the kernel leaves them, and as the reference does on the CPU."""
    heads, pages = k.shape[0], k.shape[1] // fmt.page_size
    device = k.device
    storage, slots, index, numbers = poisoned_pool(heads, pages, fmt)
    expected = storage.clone(), index.clone()
    reference_store_pages(k.cpu(), v.cpu(), expected[0], slots, expected[1], numbers, fmt)
    wide = torch.empty(heads, pages + 3, dtype=torch.int32, device=device)
    wide[:, 2:-1] = slots + slot_offset
    actual = storage.to(device), index.to(device)
    store_pages(k, v, actual[0], wide[:, 2:-1], actual[1], numbers.to(device), fmt, slot_offset)
    return [x.cpu() for x in actual], expected


def all_pages(storage, slots, index, fmt):
    """A view of every page, in order."""
    heads, pages = slots.shape
    zeros = torch.zeros(heads, dtype=torch.int32, device=slots.device)
    row = torch.arange(pages, dtype=torch.int32, device=slots.device).expand(heads, -1)
    return PageView(storage, slots, index, row, zeros, zeros + pages, zeros, fmt)


# pages a head, skip, limit, one list for all heads, first slot of a second memory
LISTS = [((1,), 0, 9, False, None), ((5, 0, 3), 2, 2, False, 77), ((3, 3), 0, 9, True, 5000), ((2, 7), 1, 9, False, 0)]


def check_dequantize(name, lists, head_dim, dtype, device="cpu"):
    counts, skip, limit, shared, other_slot = lists
    how = {"skip": skip, "limit": limit, "shared": shared, "other_slot": other_slot}
    view = scattered_view(PageFormat(name, 64, head_dim), counts, device=device, **how)
    tokens = 64 * int(view.num_entries().max())
    expected = torch.full((2, len(counts), tokens, head_dim), float("nan"), dtype=dtype, device=device)
    page_view.dequantize_pages(view, *expected)
    wide = torch.full((2, len(counts), tokens + 3, head_dim), float("nan"), dtype=dtype, device=device)
    dequantize_pages(view, wide[0, :, :tokens], wide[1, :, :tokens])
    assert same_bits(wide[:, :, :tokens], expected) and wide[:, :, tokens:].isnan().all()
    written = 2 * 64 * head_dim * int(view.num_entries().sum())
    assert int(torch.isfinite(expected).sum()) == written > 0
    dense = torch.full_like(expected, float("nan"))
    dequantize_pages(in_order(view), *dense)
    assert same_bits(dense, expected)
    for read in (dequantize_pages, page_view.dequantize_pages):
        dense = torch.full_like(expected, float("nan"))
        read(view, dense[0], None)
        assert same_bits(dense[0], expected[0]) and dense[1].isnan().all()


def steps(payload, fmt):
    """Of every key and value the number of steps: what a page stands for with scales of 1 and minima of 0."""
    ones, payload = torch.tensor([1.0, 0.0], dtype=torch.float16), payload.clone()
    payload[:, fmt.value_scales_offset :] = ones.repeat_interleave(fmt.page_size).view(torch.uint8)
    return torch.cat(decode_pages(payload, ones[:, None].expand(len(payload), 2, fmt.head_dim), fmt))


if INTERPRETED:

    @both_formats
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("heads", "pages", "head_dim"), [(1, 1, 64), (3, 2, 128), (2, 5, 64)])
    def test_interpreted_store(name, heads, pages, head_dim, dtype):
        """Scales and minima are the reference's bits. The interpreter rounds twice in a fused multiply-add, so that a
        quotient within an ulp or two of a half may fall on the other side: one step, in next to no element."""
        fmt = PageFormat(name, 64, head_dim)
        k, v = random_tokens(heads, pages, fmt, dtype)
        (storage, index), (expected, expected_index) = store_both(k, v, fmt, slot_offset=1000)
        assert same_bits(index, expected_index)
        scales = fmt.value_scales_offset
        assert same_bits(storage[:, scales:], expected[:, scales:])
        off = (steps(storage, fmt) - steps(expected, fmt)).abs()
        assert off.max() <= 1 and off.mean() <= 1e-4
        assert (storage == POISON).all(1).sum() == 5  # the slots that are nobody's

    @both_formats
    def test_interpreted_store_of_constant_and_tiny_groups(name):
        fmt = PageFormat(name, 64, 64)
        k = torch.full((1, 64, 64), 0.375)
        k[:, :, 1] = 1000.3  # not a float16: minimum above every value
        k[:, :, 2] = torch.linspace(0, 3e-6, 64)  # scale a float16 subnormal
        k[:, :, 3] = torch.linspace(-1e-9, 1e-9, 64)  # scale 0
        (storage, index), (expected, expected_index) = store_both(k, -k.flip(1), fmt)
        assert same_bits(index, expected_index) and same_bits(storage, expected)

    @both_formats
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("lists", LISTS)
    def test_interpreted_dequantize(name, lists, head_dim, dtype):
        check_dequantize(name, lists, head_dim, dtype)

    @both_formats
    def test_interpreted_round_trip_bounds_the_error(name):
        fmt = PageFormat(name, 64, 64)
        k, v = random_tokens(2, 2, fmt, torch.float32)
        storage, slots, index, _ = poisoned_pool(2, 2, fmt)
        store_pages(k, v, storage, slots, index, torch.tensor([0, 1], dtype=torch.int32), fmt)
        out = torch.full((2, 2, 128, 64), float("nan"))
        dequantize_pages(all_pages(storage, slots, index, fmt), *out)
        for x, y, dim, bits in ((k, out[0], 2, fmt.key_bits), (v, out[1], 3, fmt.value_bits)):
            x = x.unflatten(1, (2, 64))
            step = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
            assert ((x - y.unflatten(1, (2, 64))).abs() <= 0.51 * step + 2e-3 * x.abs().amax()).all()


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 48


@not_interpreted
@pytest.mark.parametrize("fmt", [PageFormat("int4", 32, 64), PageFormat("int4", 64, 80), PageFormat("bf16", 64, 64)])
def test_other_formats_are_refused(fmt):
    word = "bf16.*: use int4 or k5v3" if not fmt.quantized else "page_size 32" if fmt.page_size == 32 else "head_dim 80"
    k = torch.zeros(1, fmt.page_size, fmt.head_dim)
    storage, slots, numbers = torch.zeros(1, fmt.payload_bytes, dtype=torch.uint8), *torch.zeros(2, 1).int()
    index = torch.zeros(1, 1, 2, fmt.head_dim).half()
    with pytest.raises(ConfigError, match=word):
        store_pages(k, k, storage, slots[None], index, numbers, fmt)
    with pytest.raises(ConfigError, match=word):
        dequantize_pages(all_pages(storage, slots[None], index, fmt), k, k)


def signature(kernel, item):
    """Types of the kernel's arguments: pointers by their names, the rest as a large cache would pass them."""
    pointers = {
        "storage": "*u8", "other": "*u8", "halves": "*fp16", "index": "*fp16",
        "pages": "*i32", "begins": "*i32", "counts": "*i32",
        "table": "*i32", "slots": "*i32", "page_numbers": "*i32",
    }  # fmt: skip
    types = {
        name: pointers.get(name, f"*{item}" if name in ("k", "v", "k_out", "v_out") else "i64")
        for name in kernel.arg_names
    }
    return types | {"count": "i32"} | dict.fromkeys(("HEAD_DIM", "PAGE_SIZE", "KEY_BITS"), "constexpr")


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "item", "key_bits"), [(128, "bf16", 4), (64, "fp32", 4), (128, "bf16", 5)])
@pytest.mark.parametrize("kernel", ["store", "dequantize"])
def test_compiles_without_a_gpu(kernel, head_dim, item, key_bits, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, num_warps = (store_kernel, 2 if key_bits == 4 else 4) if kernel == "store" else (dequantize_kernel, 4)
    types = signature(kernel, item)
    names = list(types)
    constants = {"HEAD_DIM": head_dim, "PAGE_SIZE": 64, "KEY_BITS": key_bits}
    constants = {(names.index(n),): value for n, value in constants.items()}
    constants |= {(names.index(n),): 1 for n in names if "channel_stride" in n}
    types |= {n: "constexpr" for n in names if "channel_stride" in n}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or "stride" in n}
    aligned = {key: value for key, value in aligned.items() if key not in constants}
    source = ASTSource(kernel, types, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    assert built.asm["cubin"] and f".target sm_{capability}" in built.asm["ptx"]
    assert re.search(r"(ld|st)\.global[.\w]*\.v4", built.asm["ptx"])  # 16 bytes an access
    slow = "cvt.rn.f32.s32", "cvt.rni", "div.rn"  # conversions at a quarter of the rate, division with a branch
    assert not [name for name in slow if name in built.asm["ptx"]]


@pytest.mark.gpu
@not_interpreted
@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "pages", "head_dim"), [(1, 1, 64), (3, 7, 128), (8, 130, 128), (5, 33, 64)])
def test_store_on_the_gpu_writes_the_reference_bytes(name, heads, pages, head_dim, dtype):
    fmt = PageFormat(name, 64, head_dim)
    k, v = random_tokens(heads, pages, fmt, dtype, "cuda", seed=pages)
    for slot_offset, (x, y) in enumerate([(k, v), (k.contiguous(), v), (k * 1e-3, v * 300)]):
        actual, expected = store_both(x, y, fmt, slot_offset)
        assert same_bits(actual[0], expected[0])
        assert same_bits(actual[1], expected[1])


@pytest.mark.gpu
@not_interpreted
@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lists", [*LISTS, (FEW_AND_MANY, 0, 99, False, 300), ((257,) * 8, 1, 999, True, None)])
def test_dequantize_on_the_gpu_writes_the_reference_bits(name, lists, head_dim, dtype):
    check_dequantize(name, lists, head_dim, dtype, "cuda")


@pytest.mark.gpu
@not_interpreted
@both_formats
def test_offsets_beyond_two_gib_and_four(name):
    """Pages on both sides of 2**31 and 2**32 bytes of the pool; outputs and inputs beyond 2**31 elements."""
    fmt = PageFormat(name, 64, 128)
    bounds = [2**31 // fmt.payload_bytes, 2**32 // fmt.payload_bytes]
    slots = torch.tensor([[0, *(b + d for b in bounds for d in (-1, 0, 1))]], dtype=torch.int32, device="cuda")
    count = slots.shape[1]
    k, v = random_tokens(1, count, fmt, torch.bfloat16, "cuda")
    payload, index = (x.cuda() for x in encode_pages(*(x.cpu().unflatten(1, (-1, 64)) for x in (k, v)), fmt))
    storage = torch.full((bounds[1] + 2, fmt.payload_bytes), POISON, dtype=torch.uint8, device="cuda")
    found = torch.zeros_like(index)
    store_pages(k, v, storage, slots, found, torch.arange(count, dtype=torch.int32, device="cuda"), fmt)
    assert same_bits(storage[slots.long()], payload) and same_bits(found, index)
    assert (storage == POISON).all(1).sum() == len(storage) - count
    tokens, far = count * 64, 2**31 + 64
    room = torch.empty(far + 2 * k.numel(), dtype=torch.bfloat16, device="cuda")
    out = torch.as_strided(room, (2, tokens, 128), (far, 128, 1))  # the second head lies beyond 2**31 elements
    view = all_pages(storage, slots.expand(2, -1), index.expand(2, -1, -1, -1), fmt)
    expected = decode_pages(payload, index, fmt)[0].flatten(1, 2).bfloat16()
    for pages in (view, replace(view, storage=storage[:1], other=storage, other_slot=0)):
        out.fill_(float("nan"))
        dequantize_pages(pages, out, torch.empty_like(out))
        assert same_bits(out, expected.expand(2, -1, -1))
    near = torch.arange(1, 2 * count + 1, dtype=torch.int32, device="cuda").view(2, count)
    found = torch.zeros(2, count, 2, 128, dtype=torch.float16, device="cuda")
    store_pages(out, out, storage, near, found, torch.arange(count, dtype=torch.int32, device="cuda"), fmt)
    payload, index = encode_pages(*[out.cpu().unflatten(1, (-1, 64))] * 2, fmt)
    assert same_bits(storage[near.long()].cpu(), payload) and same_bits(found.cpu(), index)


@pytest.mark.gpu
@not_interpreted
@both_formats
def test_a_captured_store_follows_slots_and_page_numbers(name):
    fmt = PageFormat(name, 64, 128)
    k, v = random_tokens(2, 1, fmt, torch.bfloat16, "cuda")
    storage = torch.zeros(8, fmt.payload_bytes, dtype=torch.uint8, device="cuda")
    index = torch.zeros(2, 9, 2, 128, dtype=torch.float16, device="cuda")
    slots = torch.tensor([[0], [1]], dtype=torch.int32, device="cuda")
    number = torch.zeros(1, dtype=torch.int32, device="cuda")
    store_pages(k, v, storage, slots, index, number, fmt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store_pages(k, v, storage, slots, index, number, fmt)
    slots.copy_(torch.tensor([[7], [4]]))
    number.fill_(5)
    graph.replay()
    assert same_bits(storage[[7, 4]], storage[:2]) and same_bits(index[:, 5], index[:, 0])
    assert storage[7].any() and not storage[[2, 3, 5, 6]].any() and not index[:, 1:5].any()
