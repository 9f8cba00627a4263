"""Pages: the codec against plain quantization, the compiled CPU kernels against the torch references."""

import pytest
import torch

from longrun.errors import ConfigError
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.page_view import ExactRun, PageRun, decode_attention, dequantize_run
from longrun.paths import cache_dir
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages

QUANTIZED = ("int4", "k5v3")


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


@pytest.fixture(scope="module")
def cpu_kernels():
    return CpuPageKernels(cache_dir() / "kernels")  # compiled by whichever test comes first


def random_pages(heads, pages, fmt, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, 1, 1, fmt.head_dim, generator=g) * 4  # channels of unlike size, as keys have
    k = torch.randn(heads, pages, fmt.page_size, fmt.head_dim, generator=g) * scale + scale.flip(-1)
    v = torch.randn(heads, pages, fmt.page_size, fmt.head_dim, generator=g)
    return k, v


def test_bytes_of_the_design():
    fmt = PageFormat("int4", 64, 128)
    assert (fmt.payload_bytes, fmt.index_bytes, fmt.page_bytes) == (4096 + 4096 + 256, 512, 8960)
    assert 128 * fmt.page_bytes / 64 == 17920  # Llama-3-8B, half of its 256 KV heads kept
    assert PageFormat("k5v3", 64, 128).page_bytes == fmt.page_bytes
    assert PageFormat("bf16", 64, 128).page_bytes == 2 * 64 * 128 * 2
    assert PageFormat("fp32", 64, 128).page_bytes == 2 * 64 * 128 * 4


@pytest.mark.parametrize("bad", [("k6v2", 64, 128), ("int4", 63, 128), ("int4", 64, 72), ("int4", 64, 0)])
def test_bad_formats_are_refused(bad):
    with pytest.raises(ConfigError, match=str(bad[1]) if bad[1] == 63 else str(bad[2]) if bad[0] == "int4" else bad[0]):
        PageFormat(*bad)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_codec_error_is_half_a_step_and_bounds_hold(name, page_size, head_dim):
    fmt = PageFormat(name, page_size, head_dim)
    last_key, last_value = 2**fmt.key_bits - 1, 2**fmt.value_bits - 1
    k, v = random_pages(2, 3, fmt)
    payload, index = encode_pages(k, v, fmt)
    assert payload.shape == (2, 3, fmt.payload_bytes) and payload.dtype == torch.uint8
    assert index.nbytes == 6 * fmt.index_bytes
    dk, dv = decode_pages(payload, index, fmt)
    k_step = (k.amax(2, keepdim=True) - k.amin(2, keepdim=True)) / last_key
    v_step = (v.amax(3, keepdim=True) - v.amin(3, keepdim=True)) / last_value
    assert ((dk - k).abs() <= 0.51 * k_step + 2e-3 * k.abs().amax()).all()
    assert ((dv - v).abs() <= 0.51 * v_step + 2e-3 * v.abs().amax()).all()
    low = index[:, :, 1].float()
    high = low + last_key * index[:, :, 0].float()
    assert (dk.amin(2) >= low).all() and (dk.amax(2) <= high).all()  # the index bounds every channel


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_exact_formats_round_trip(name):
    fmt = PageFormat(name, 32, 48)
    k, v = (x.bfloat16().float() for x in random_pages(2, 3, fmt))
    payload, index = encode_pages(k, v, fmt)
    assert index is None and payload.shape[-1] == fmt.payload_bytes
    dk, dv = decode_pages(payload, index, fmt)
    assert torch.equal(dk, k) and torch.equal(dv, v)


@pytest.mark.parametrize("name", QUANTIZED)
def test_constant_page_survives(name):
    fmt = PageFormat(name, 16, 16)
    k = torch.full((1, 1, 16, 16), 0.375)
    dk, dv = decode_pages(*encode_pages(k, -k, fmt), fmt)
    assert torch.equal(dk, k) and torch.equal(dv, -k)


def scattered_run(heads, pages, fmt, seed=0, first=0, extra_slots=5):
    """Pages at random slots of a pool whose other slots are garbage."""
    k, v = random_pages(heads, pages, fmt, seed)
    payload, index = encode_pages(k, v, fmt)
    g = torch.Generator().manual_seed(seed + 1)
    slots = torch.randperm(heads * pages + extra_slots, generator=g)
    storage = torch.randint(0, 256, (len(slots), fmt.payload_bytes), dtype=torch.uint8, generator=g)
    table = slots[: heads * pages].view(heads, pages).int()
    storage[table.long()] = payload
    return PageRun(storage, table, index, first, pages - first, fmt)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "pages", "first"), [(1, 1, 0), (3, 11, 4), (2, 37, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dequantize(cpu_kernels, name, head_dim, heads, pages, first, dtype):
    fmt = PageFormat(name, 64, head_dim)
    run = scattered_run(heads, pages, fmt, first=first)
    shape = (heads, run.count * 64, head_dim)
    expected = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    dequantize_run(run, *expected)
    wide = torch.full((2, heads, run.count * 64 + 3, head_dim), float("nan"), dtype=dtype)  # poisoned, strided
    out_k, out_v = wide[0, :, : shape[1]], wide[1, :, : shape[1]]
    cpu_kernels.dequantize_run(run, out_k, out_v)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3  # a fused multiply-add may round the other way
    assert rms_ratio(out_k.float(), expected[0].float()) < tolerance
    assert rms_ratio(out_v.float(), expected[1].float()) < tolerance
    assert wide[:, :, shape[1] :].isnan().all()


def page_of_steps(fmt, keys, values):
    """One page of these bytes that stands for its steps: every scale is 1, every minimum 0."""
    one_and_zero = torch.tensor([1, 0]).half()
    payload = torch.cat((keys, values, one_and_zero.repeat_interleave(fmt.page_size).view(torch.uint8)))
    index = one_and_zero.repeat_interleave(fmt.head_dim).view(1, 1, 2, fmt.head_dim)
    return PageRun(payload[None], torch.zeros(1, 1).int(), index, 0, 1, fmt)


@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 64), (80, 32), (128, 16)])
def test_k5v3_steps_by_hand(cpu_kernels, head_dim, page_size):
    fmt, half = PageFormat("k5v3", page_size, head_dim), page_size // 2
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randint(0, 256, (2, fmt.keys_bytes), dtype=torch.uint8, generator=g)
    expected = torch.empty(2, 1, page_size, head_dim)
    for n, (key, value) in enumerate(zip(keys.tolist(), values.tolist(), strict=True)):
        channel, token = divmod(n, half)
        expected[0, 0, token, channel] = key % 16 + 16 * (value >> 3 & 1)
        expected[0, 0, token + half, channel] = key // 16 + 16 * (value >> 7)
        token, channel = divmod(n, head_dim // 2)
        expected[1, 0, token, channel] = value & 7
        expected[1, 0, token, channel + head_dim // 2] = value >> 4 & 7
    for read in (dequantize_run, cpu_kernels.dequantize_run):
        out = torch.full_like(expected, float("nan"))
        read(page_of_steps(fmt, keys, values), *out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 64), (80, 32), (128, 16)])
@pytest.mark.parametrize("group", [1, 4])
def test_a_fifth_bit_of_a_key_decides(cpu_kernels, head_dim, page_size, group):
    """The query reads a channel where one key has the bit: its token takes all attention. Values, whose bytes hold the
    bits of the other channels, come unspoilt by them."""
    fmt = PageFormat("k5v3", page_size, head_dim)
    channel, token, half = head_dim // 2 + 3, page_size // 4 + 1, page_size // 2
    g = torch.Generator().manual_seed(0)
    plain = torch.randint(0, 256, (fmt.keys_bytes,), dtype=torch.uint8, generator=g)
    plain[channel * half : (channel + 1) * half] &= 0x77
    q = torch.zeros(1, group, head_dim)
    q[..., channel] = 4
    for bit, chosen in ((8, token), (128, token + half)):
        values = plain.clone()
        values[channel * half + token] |= bit
        run = page_of_steps(fmt, torch.zeros_like(plain), values)
        row = plain.view(page_size, head_dim // 2)[chosen]
        expected = torch.cat((row & 7, row >> 4 & 7)).float().expand(1, group, head_dim)
        for read in (decode_attention, cpu_kernels.decode_attention):
            out, lse = read(q, run, ())
            assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(lse, torch.full_like(lse, 64.0))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (64, 64), (80, 32), (96, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize("pages", [0, 1, 45])
def test_compiled_decode(cpu_kernels, name, group, head_dim, page_size, pages):
    heads, fmt = 3, PageFormat(name, page_size, head_dim)
    g = torch.Generator().manual_seed(group)
    q = torch.randn(heads, group, head_dim, generator=g) * 0.3
    run = scattered_run(heads, pages, fmt, seed=group) if pages else None
    sink = ExactRun(*torch.randn(2, heads, page_size, head_dim, generator=g).bfloat16(), page_size)
    tail = ExactRun(*torch.randn(2, heads, page_size, head_dim, generator=g).bfloat16(), page_size - 3)
    for exact in ((sink, tail), (tail,), ()):
        if not exact and run is None:
            continue
        expected, expected_lse = decode_attention(q, run, exact)
        out, lse = cpu_kernels.decode_attention(q, run, exact)
        assert rms_ratio(out, expected) < 1e-5
        assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_compiled_decode_over_exact_float32(cpu_kernels):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 3, 64, generator=g)
    ring = ExactRun(*torch.randn(2, 2, 321, 64, generator=g), 123)
    expected, expected_lse = decode_attention(q, None, (ring,))
    out, lse = cpu_kernels.decode_attention(q, None, (ring,))
    assert rms_ratio(out, expected) < 1e-5 and torch.allclose(lse, expected_lse, rtol=1e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_large_scores_do_not_overflow(cpu_kernels, name):
    fmt = PageFormat(name, 64, 64)
    run = scattered_run(1, 3, fmt)
    q = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)) * 100
    expected, expected_lse = decode_attention(q, run, ())
    out, lse = cpu_kernels.decode_attention(q, run, ())
    assert rms_ratio(out, expected) < 1e-4 and torch.allclose(lse, expected_lse, rtol=1e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_slot_offset(cpu_kernels, name):
    fmt = PageFormat(name, 64, 64)
    run = scattered_run(2, 9, fmt)
    moved = PageRun(run.storage, run.table + 1000, run.index, 0, 9, fmt, slot_offset=1000)
    q = torch.randn(2, 2, 64)
    for read in (decode_attention, cpu_kernels.decode_attention):
        assert torch.equal(read(q, run, ())[0], read(q, moved, ())[0])
