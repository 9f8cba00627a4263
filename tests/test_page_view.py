"""Pages: the codec against plain quantization, the torch references against loops over tokens, the compiled CPU kernels
against the references."""

from dataclasses import replace

import pytest
import torch
from page_views import FEW_AND_MANY, exact_tokens, in_order, listed, page_tensors, random_pages, scattered_view

from longrun.errors import ConfigError
from longrun.kernels.cpu_pages import CpuPageKernels
from longrun.kernels.page_view import ExactTokens, PageView, decode_attention, dequantize_pages
from longrun.paths import cache_dir
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages

QUANTIZED = ("int4", "k5v3")


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def assert_close(out, lse, expected, expected_lse):
    """Head by head: one of them may have large values, another none at all."""
    for head in range(len(out)):
        assert torch.equal(out[head], expected[head]) or rms_ratio(out[head], expected[head]) < 2e-5
    assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def cpu_kernels():
    return CpuPageKernels(cache_dir() / "kernels")  # compiled by whichever test comes first


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


# page counts, skip, limit, one list for all heads
LISTS = [((1,), 0, 100, False), ((11, 0, 9), 4, 6, False), ((37, 37), 0, 100, True), ((9, 2, 30), 1, 100, False)]


@pytest.mark.parametrize("name", ["int4", "k5v3", "fp32"])
@pytest.mark.parametrize(("counts", "skip", "limit", "shared"), LISTS)
@pytest.mark.parametrize("split", [False, True])
def test_reference_dequantizes_page_by_page(name, counts, skip, limit, shared, split):
    fmt = PageFormat(name, 16, 32)
    view = scattered_view(fmt, counts, skip=skip, limit=limit, shared=shared)
    if split:  # a part of a part
        view = replace(view, skip=0, limit=2**31 - 1).part(skip - skip // 2, 99).part(skip // 2, limit)
    expected = [[page_tensors(view, head, page) for page in listed(view, head)] for head in range(len(counts))]
    assert [len(pages) for pages in expected] == view.num_entries().tolist()
    out = torch.full((2, len(counts), 16 * max(map(len, expected)), 32), float("nan"))
    dequantize_pages(view, *out)
    for head, pages in enumerate(expected):
        for side in (0, 1):
            of = torch.cat([page[side] for page in pages]) if pages else torch.empty(0, 32)
            assert torch.equal(out[side, head, : len(of)], of) and out[side, head, len(of) :].isnan().all()


def attention_by_token(q, view, exact, softmax_scale):
    """Token by token in float64, each asked for by its position."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for head in range(q.shape[0]):
        keys, values = [], []

        def add(position, k, v, head=head, keys=keys, values=values):
            if view is None or position < view.sink_size or position >= int(view.first[head]):
                keys.append(k.double()), values.append(v.double())

        for page in listed(view, head) if view is not None else ():
            for token, (k, v) in enumerate(zip(*page_tensors(view, head, page), strict=True)):
                add((page + view.fmt.sink_pages) * view.fmt.page_size + token, k, v)
        sinks, tails, start = exact.lengths.tolist() if exact is not None else (0, 0, 0)
        for token in range(sinks):
            add(token, exact.sink_k[head, token], exact.sink_v[head, token])
        for token in range(tails):
            add(start + token, exact.tail_k[head, token], exact.tail_v[head, token])
        if keys:
            scores = q[head].double() * softmax_scale @ torch.stack(keys).T
            lse[head] = scores.exp().sum(-1).log()
            out[head] = scores.softmax(-1) @ torch.stack(values)
    return out.float(), lse.float()


# sinks, oldest position seen beside them, by head: nothing hidden, halves of pages, whole pages, all of them
MASKS = [(0, 0), (5, (0, 37, 64, 1000)), (20, (33, 2**31 - 1, 16, 160)), (0, (2**31 - 1, 200, 0, 90))]


@pytest.mark.parametrize("name", ["k5v3", "fp32"])
@pytest.mark.parametrize(("sink_size", "first"), MASKS)
def test_reference_attends_to_what_is_seen(name, sink_size, first):
    fmt = PageFormat(name, 16, 32)
    view = scattered_view(fmt, (9, 1, 12, 7), skip=1, limit=8, sink_size=sink_size, first=first)
    q = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1))
    for exact in (exact_tokens(4, fmt, 16, 7, 208), exact_tokens(4, fmt, 16, 0, 0), None):
        for pages in (view, None):
            expected, expected_lse = attention_by_token(q, pages, exact, 0.25)
            out, lse = decode_attention(q, pages, exact, softmax_scale=0.25)
            assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(lse, expected_lse, atol=1e-5)
            held = torch.empty_like(out), torch.empty_like(lse)
            decode_attention(q, pages, exact, softmax_scale=0.25, out=held[0], lse=held[1])
            assert torch.equal(held[0], out) and torch.equal(held[1], lse)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("counts", "skip", "limit", "shared"), [*LISTS, (FEW_AND_MANY, 0, 100, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dequantize(cpu_kernels, name, head_dim, counts, skip, limit, shared, dtype):
    fmt = PageFormat(name, 64, head_dim)
    view = scattered_view(fmt, counts, skip=skip, limit=limit, shared=shared)
    tokens = 64 * int(view.num_entries().max())
    expected = torch.full((2, len(counts), tokens, head_dim), float("nan"), dtype=dtype)
    dequantize_pages(view, *expected)
    wide = torch.full((2, len(counts), tokens + 3, head_dim), float("nan"), dtype=dtype)  # poisoned, strided
    out = wide[:, :, :tokens]
    cpu_kernels.dequantize_pages(view, *out)
    written = ~expected.isnan()
    assert torch.equal(written, ~out.isnan()) and wide[:, :, tokens:].isnan().all()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3  # a fused multiply-add may round the other way
    for side in (0, 1):
        assert rms_ratio(out[side][written[side]].float(), expected[side][written[side]].float()) < tolerance
    dense = torch.full_like(expected, float("nan"))
    cpu_kernels.dequantize_pages(in_order(view), *dense)
    assert torch.equal(dense[written], out[written])
    with pytest.raises(AssertionError, match="room"):
        cpu_kernels.dequantize_pages(view, *dense[:, :, :-1])


def page_of_steps(fmt, keys, values):
    """One page of these bytes that stands for its steps: every scale is 1, every minimum 0."""
    one_and_zero = torch.tensor([1, 0]).half()
    payload = torch.cat((keys, values, one_and_zero.repeat_interleave(fmt.page_size).view(torch.uint8)))
    index = one_and_zero.repeat_interleave(fmt.head_dim).view(1, 1, 2, fmt.head_dim)
    zero, one = torch.zeros(1).int(), torch.ones(1).int()
    return PageView(payload[None], zero[None], index, zero[None], zero, one, zero, fmt)


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
    for read in (dequantize_pages, cpu_kernels.dequantize_pages):
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
        view = page_of_steps(fmt, torch.zeros_like(plain), values)
        row = plain.view(page_size, head_dim // 2)[chosen]
        expected = torch.cat((row & 7, row >> 4 & 7)).float().expand(1, group, head_dim)
        for read in (decode_attention, cpu_kernels.decode_attention):
            out, lse = read(q, view, None)
            assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(lse, torch.full_like(lse, 64.0))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (64, 64), (80, 32), (96, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize("pages", [0, 1, 45])
def test_compiled_decode(cpu_kernels, name, group, head_dim, page_size, pages):
    heads, fmt = 3, PageFormat(name, page_size, head_dim)
    g = torch.Generator().manual_seed(group)
    q = torch.randn(heads, group, head_dim, generator=g) * 0.3
    view = scattered_view(fmt, [pages] * heads, seed=group) if pages else None
    both = exact_tokens(heads, fmt, page_size, page_size - 3, 1000)
    for exact in (both, replace(both, lengths=torch.tensor([0, 5, 1000]).int()), None):
        expected, expected_lse = decode_attention(q, view, exact)
        out, lse = cpu_kernels.decode_attention(q, view, exact)
        assert_close(out, lse, expected, expected_lse)


def view_and_q(name, page_size, head_dim, **more):
    fmt = PageFormat(name, page_size, head_dim)
    view = scattered_view(fmt, FEW_AND_MANY, **more)
    q = torch.randn(len(FEW_AND_MANY), 3, head_dim, generator=torch.Generator().manual_seed(5)) * 0.3
    return view, q, exact_tokens(len(FEW_AND_MANY), fmt, page_size, page_size - 3, page_size * 136)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (80, 32), (64, 64), (96, 128)])
@pytest.mark.parametrize(("skip", "limit", "shared"), [(0, 1000, False), (1, 63, False), (62, 40, True)])
def test_compiled_decode_of_a_list_a_head(cpu_kernels, name, head_dim, page_size, skip, limit, shared):
    """The same pages give the same bits, wherever they stand, whatever their numbers."""
    view, q, exact = view_and_q(name, page_size, head_dim, skip=skip, limit=limit, shared=shared)
    for more in (exact, None):
        found = cpu_kernels.decode_attention(q, view, more, softmax_scale=0.5)
        assert_close(*found, *decode_attention(q, view, more, softmax_scale=0.5))
        dense = cpu_kernels.decode_attention(q, in_order(view), more, softmax_scale=0.5)
        assert torch.equal(found[0], dense[0]) and torch.equal(found[1], dense[1])


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_compiled_decode_sees_what_is_not_hidden(cpu_kernels, name, page_size):
    """In pages, sinks and tail: the ends of pages, their middle, all of some, all of everything."""
    last = page_size * 136
    for sink_size, first in (
        (0, (3, 2 * page_size - 1, last // 2, page_size * 9, last // 2 + 13)),
        (page_size + 5, (page_size, 2 * page_size, 2 * page_size - 5, last - 1, last + 2)),
        (7, (0, 8, 2**31 - 1, last + page_size - 4, last)),
        (0, 2**31 - 1),
    ):
        view, q, exact = view_and_q(name, page_size, 64, sink_size=sink_size, first=first)
        for more in (exact, None):
            expected, expected_lse = decode_attention(q, view, more)
            out, lse = cpu_kernels.decode_attention(q, view, more)
            assert_close(out, lse, expected, expected_lse)
            unseen = expected_lse == -torch.inf
            assert (out[unseen] == 0).all() and unseen.any() == (more is None or first == 2**31 - 1)


def test_nothing_hidden_is_the_same_bits(cpu_kernels):
    """Where the mask hides no token, its way through the kernel changes nothing."""
    plain, q, exact = view_and_q("k5v3", 64, 64)
    for sink_size, first in ((10**6, 2**31 - 1), (64 * 100, 64 * 100), (700, 650)):
        masked = replace(plain, sink_size=sink_size, first=torch.full_like(plain.first, first))
        for x, y in zip(*(cpu_kernels.decode_attention(q, v, exact) for v in (plain, masked)), strict=True):
            assert torch.equal(x, y)


def test_compiled_decode_over_exact_float32(cpu_kernels):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 3, 64, generator=g)
    ring = ExactTokens(*torch.randn(4, 2, 321, 64, generator=g), torch.tensor([123, 300, 400]).int())
    expected, expected_lse = decode_attention(q, None, ring)
    out, lse = cpu_kernels.decode_attention(q, None, ring)
    assert rms_ratio(out, expected) < 1e-5 and torch.allclose(lse, expected_lse, rtol=1e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_large_scores_do_not_overflow(cpu_kernels, name):
    view = scattered_view(PageFormat(name, 64, 64), (3,))
    q = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)) * 100
    expected, expected_lse = decode_attention(q, view, None)
    out, lse = cpu_kernels.decode_attention(q, view, None)
    assert rms_ratio(out, expected) < 1e-4 and torch.allclose(lse, expected_lse, rtol=1e-5)
