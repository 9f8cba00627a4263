"""The torch attention backend over the dual cache, against a [T, T] mask per head, at every chunk size."""

import pytest
import torch
from driven_attention import attention_over, drive
from driven_attention import cpu_kernels as load_kernels

from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import key_rotation
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import CacheSpec

DIM, KV_HEADS, GROUP = 32, 4, 2
SPLITS = {"full": (4, 4), "none": (0, 0), "mixed": (1, 3)}
ONE_LAYER = (4,)
SINK, RECENT = 20, 50


@pytest.fixture(scope="module")
def cpu_kernels():
    return load_kernels()


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def make(split, kv, capacity, kernels=None, device_share=1.0, page_size=16, scratch_tokens=64, dtype=torch.float32):
    heads = SPLITS.get(split, split)
    fmt = PageFormat(kv, page_size, DIM)
    pages = fmt.pooled_pages(capacity)
    spec = CacheSpec(
        retrieval_heads=heads,
        num_kv_heads=KV_HEADS,
        page_format=fmt,
        capacity=capacity,
        sink_size=SINK,
        recent_size=RECENT,
        device_pages_per_head=int(pages * device_share),
        fetch_pages=9,
    )
    shape = AttentionSpec(scratch_tokens, max(heads), KV_HEADS * GROUP, KV_HEADS, DIM, 4, capacity, SINK, RECENT)
    return attention_over(spec, shape, dtype, kernels)


def random_tokens(n, layers=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(layers, n, KV_HEADS * GROUP, DIM, generator=g) * 2
    k, v = torch.randn(2, layers, n, KV_HEADS, DIM, generator=g)
    return q, k, v


def chunked(n, size):
    return [size] * (n // size) + ([n % size] if n % size else [])


def by_mask(q, k, v, split):
    """The definition: float64 softmax under one mask per head."""
    layers, n = q.shape[:2]
    rows, cols = torch.arange(n)[:, None], torch.arange(n)[None]
    causal = cols <= rows
    window = causal & ((cols < SINK) | (cols > rows - RECENT))
    out = torch.empty(q.shape, dtype=torch.float64)
    for layer in range(layers):
        for head in range(q.shape[2]):
            kv = head // GROUP
            scores = q[layer, :, head].double() @ k[layer, :, kv].double().T / DIM**0.5
            mask = causal if kv < SPLITS[split][layer] else window
            out[layer, :, head] = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[layer, :, kv].double()
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kv", ["fp32", "bf16"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk", [7, 64, 301, 1000])
def test_exact_pages_equal_the_mask(cpu_kernels, compiled, kv, split, chunk):
    n = 301
    q, k, v = random_tokens(n)
    if kv == "bf16":
        k, v = k.bfloat16().float(), v.bfloat16().float()  # what the cache holds is what attention means
    attention = make(split, kv, n, cpu_kernels if compiled else None, device_share=0.4)
    out = drive(attention, q, k, v, chunked(n, chunk))
    assert rms_ratio(out, by_mask(q, k, v, split)) < 2e-6


@pytest.mark.parametrize("kv", ["fp32", "bf16"])
@pytest.mark.parametrize("split", SPLITS)
def test_one_token_at_a_time(cpu_kernels, kv, split):
    n = 150
    q, k, v = random_tokens(n)
    whole = drive(make(split, kv, n), q, k, v, [n])
    for kernels in (cpu_kernels, None):
        single = drive(make(split, kv, n, kernels, device_share=0.5), q, k, v, [1] * n)
        assert rms_ratio(single, whole) < 2e-6


def test_bf16_pages_round_once_whatever_the_chunk():
    q, k, v = random_tokens(200)
    outs = [drive(make("mixed", "bf16", 200), q, k, v, chunked(200, size)) for size in (1, 33, 200)]
    assert rms_ratio(outs[0], outs[2]) < 2e-6
    assert rms_ratio(outs[1], outs[2]) < 2e-6


def as_cached(x_k, x_v, start, stop, fmt):
    """Keys and values of [0, start) as an INT4 cache gives them back, the rest up to `stop` as the chunk has them."""
    k, v = x_k.bfloat16().float().clone(), x_v.bfloat16().float().clone()
    size = fmt.page_size
    for page in range(1, fmt.closed_pages(start)):
        at = slice(page * size, (page + 1) * size)
        dk, dv = decode_pages(*encode_pages(k[at].transpose(0, 1), v[at].transpose(0, 1), fmt), fmt)
        k[at], v[at] = dk.transpose(0, 1), dv.transpose(0, 1)
    return k[:stop], v[:stop]


@pytest.mark.parametrize("name", ["int4", "k5v3"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("device_share", [0.0, 0.5, 1.0])
def test_quantized_equals_attention_over_dequantized_pages(cpu_kernels, compiled, device_share, name):
    """Chunks, then single tokens: every output against float64 attention over what the cache holds by then."""
    n = 230
    q, k, v = random_tokens(n, layers=1)
    k, v = ((x * 32).round() / 32 for x in (k, v))  # few bits: exact when rotated, in whatever order they are summed up
    for_queries, for_keys = key_rotation(DIM)
    fmt = PageFormat(name, 16, DIM)
    turn_v, unrotate = (for_keys, for_queries.T.double()) if fmt.rotates_values else (torch.eye(DIM),) * 2
    attention = make(ONE_LAYER, name, n, cpu_kernels if compiled else None, device_share=device_share)
    chunks = [100, 64, 7, *[1] * (n - 171)]
    out = drive(attention, q, k, v, chunks)
    start = 0
    for size in chunks:
        cached_from = start if size > 1 else start + 1  # a lone token is appended first: it may flush the tail
        ck, cv = as_cached(k[0] @ for_keys, v[0] @ turn_v, cached_from, start + size, fmt)
        for head in range(q.shape[2]):
            rotated = q[0, start : start + size, head].double() @ for_queries.double()
            scores = rotated @ ck[:, head // GROUP].double().T / DIM**0.5
            future = torch.arange(start + size)[None] > torch.arange(start, start + size)[:, None]
            expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ cv[:, head // GROUP].double()
            assert rms_ratio(out[0, start : start + size, head], expected @ unrotate.double()) < 1e-5
        start += size


@pytest.mark.parametrize("split", ["full", "mixed"])
def test_int4_stays_within_the_quantization_error(cpu_kernels, split):
    n = 400
    q, k, v = random_tokens(n)
    exact = by_mask(q, k, v, split)
    for chunk in (64, 400):
        out = drive(make(split, "int4", n, cpu_kernels), q, k, v, chunked(n, chunk))
        error = rms_ratio(out, exact)
        assert 1e-4 < error < 0.15  # real quantization, on random data whose softmax is sharp


def test_placement_does_not_change_the_answer(cpu_kernels):
    q, k, v = random_tokens(333)
    chunks = [*chunked(300, 50), *[1] * 33]
    outs = [
        drive(make("mixed", "int4", 333, cpu_kernels, device_share=share), q, k, v, chunks) for share in (1, 0.5, 0)
    ]
    assert rms_ratio(outs[1], outs[0]) < 1e-5
    assert rms_ratio(outs[2], outs[0]) < 1e-5


def test_unseen_tokens_do_not_matter_outside_the_window():
    """The streaming window is exact: changing a token just outside it changes nothing, just inside it does."""
    n = 200
    q, k, v = random_tokens(n, layers=2)
    base = drive(make("none", "fp32", n), q, k, v, chunked(n, 32))
    for position, matters in ((n - 1 - RECENT, False), (n - RECENT, True), (SINK - 1, True), (SINK, False)):
        changed = v.clone()
        changed[:, position] += 10
        out = drive(make("none", "fp32", n), q, k, changed, chunked(n, 32))
        assert (not torch.equal(out[:, -1], base[:, -1])) == matters, position
