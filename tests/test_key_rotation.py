"""Rotated keys: the matrices, and attention that turns queries and keys without changing what it answers."""

import pytest
import torch
from driven_attention import attention_over, drive
from driven_attention import cpu_kernels as load_kernels
from test_attention import rms_ratio

from longrun.attention.rotation import HeadRotation
from longrun.errors import InputError
from longrun.quant.kv_format import KV_FORMATS, PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import ROTATION_SEED, hadamard_rotation, key_rotation, random_signs, rotation_of
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.cache_spec import CacheSpec

SINK, RECENT = 8, 24
SPLITS = {"full": (3, 3), "none": (0, 0), "mixed": (1, 2), "uneven": (0, 3)}


@pytest.fixture(scope="module")
def cpu_kernels():
    return load_kernels()


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 96, 112, 128, 256])
def test_the_two_matrices_undo_each_other_and_are_exact(dim):
    for_queries, for_keys = key_rotation(dim)
    assert torch.equal(for_queries @ for_keys.T, torch.eye(dim))
    block = {48: 16, 80: 16, 96: 32, 112: 16}.get(dim, dim)
    for matrix in (for_queries, for_keys):
        (size,) = matrix[matrix != 0].abs().unique().tolist()
        assert torch.tensor(size).log2().item().is_integer()
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(matrix.to(dtype).float(), matrix)
        blocks = torch.block_diag(*[torch.ones(block, block)] * (dim // block))
        assert torch.equal(matrix != 0, blocks != 0)
    assert 1 <= for_queries.max() / for_keys.max() <= 2


def test_the_rotation_is_the_simulations():
    for dim, factor in ((16, 1.0), (64, 1.0), (256, 1.0), (32, 0.5**0.5), (128, 0.5**0.5)):
        assert torch.allclose(key_rotation(dim)[1], hadamard_rotation(dim, ROTATION_SEED) * factor, atol=1e-7)
    assert torch.equal(key_rotation(64)[1], hadamard_rotation(64, ROTATION_SEED))
    assert torch.equal(key_rotation(64)[0], rotation_of(random_signs(64))[0])
    assert not torch.equal(random_signs(64), random_signs(64, seed=1)) and random_signs(64).unique().tolist() == [-1, 1]
    with pytest.raises(InputError, match="head_dim 96 has no Hadamard matrix"):
        hadamard_rotation(96, ROTATION_SEED)


def test_outlier_channels_are_spread_and_cost_less():
    """One channel whose size changes from token to token, as after RoPE: scores err by less than six tenths."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 6, 64, 64, generator=g)
    k[..., 5] *= 30
    fmt, (for_queries, for_keys) = PageFormat("int4", 64, 64), key_rotation(64)
    q = torch.randn(6, 64, 64, generator=g)
    q[..., 5] *= 10
    plain = decode_pages(*encode_pages(k, v, fmt), fmt)[0]
    turned = decode_pages(*encode_pages(k @ for_keys, v, fmt), fmt)[0]
    exact = q @ k.transpose(1, 2)
    assert torch.allclose((q @ for_queries) @ (k @ for_keys).transpose(1, 2), exact, atol=1e-3, rtol=1e-4)
    error = [(scores - exact).norm() for scores in (q @ plain.mT, (q @ for_queries) @ turned.mT)]
    assert error[1] < 0.6 * error[0]


def test_only_quantized_pages_rotate():
    assert [name for name in KV_FORMATS if PageFormat(name, 64, 64).rotates_keys] == ["int4", "k5v3"]
    assert [name for name in KV_FORMATS if PageFormat(name, 64, 64).rotates_values] == ["k5v3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 300, 5000])
def test_views_of_one_buffer_are_turned_in_place(tokens, dtype):
    """Retrieval heads of a fused projection, a chunk of several slices; nothing else in the buffer changes."""
    dim, heads, group, kv = 16, 2, 3, 4
    fused = torch.randn(tokens, (group + 2) * kv, dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    before = fused.clone()
    q, k, v = fused.split((group * kv, kv, kv), dim=1)
    rotation = HeadRotation(PageFormat("k5v3", 64, dim), dtype, torch.device("cpu"))
    rotation.rotate_(q, k, v, heads)
    expected = before.double()
    for_queries, for_keys = (matrix.double() for matrix in key_rotation(dim))
    expected[:, : heads * group] @= for_queries
    turned = torch.zeros(fused.shape[1], dtype=torch.bool)
    turned[: heads * group] = True
    for first in (group * kv, (group + 1) * kv):
        expected[:, first : first + heads] @= for_keys
        turned[first : first + heads] = True
    assert torch.equal(fused[:, ~turned], before[:, ~turned])
    assert rms_ratio(fused[:, turned].double(), expected[:, turned]) < (1e-6 if dtype == torch.float32 else 4e-3)
    rotation.unrotate_(v, heads)
    back = before[:, -kv:]
    assert torch.equal(v[:, heads:], back[:, heads:])
    assert rms_ratio(v[:, :heads], back[:, :heads]) < (1e-6 if dtype == torch.float32 else 6e-3)
    plain = HeadRotation(PageFormat("int4", 64, dim), dtype, torch.device("cpu"))
    held = v.clone()
    plain.rotate_(q, k, v, heads)
    plain.unrotate_(v, heads)
    assert torch.equal(v, held)  # INT4 pages hold plain values


def make(fmt, heads, group, capacity, kernels, device_share=1.0):
    spec = CacheSpec(
        heads, 3, fmt, capacity, SINK, RECENT, int(fmt.pooled_pages(capacity) * device_share), fetch_pages=12
    )
    shape = AttentionSpec(64, max(heads), 3 * group, 3, fmt.head_dim, 4, capacity, SINK, RECENT)
    return attention_over(spec, shape, kernels=kernels)


def tokens_of_exact_rotation(n, group, dim, seed=0):
    """Queries, and keys that are exact in bfloat16 once they are rotated, as the values are."""
    g = torch.Generator().manual_seed(seed)
    for_queries, _ = key_rotation(dim)
    q = torch.randn(2, n, 3 * group, dim, generator=g) * 2
    k = (torch.randn(2, n, 3, dim, generator=g) * 16).round().clamp(-127, 127) / 16
    return q, k @ for_queries.T, torch.randn(2, n, 3, dim, generator=g).bfloat16().float()


def by_mask(q, k, v, heads, group):
    """The definition, over plain queries and keys in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    rows, cols = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    window = (cols <= rows) & ((cols < SINK) | (cols > rows - RECENT))
    for layer, num_retrieval in enumerate(heads):
        for head in range(q.shape[2]):
            kv = head // group
            scores = q[layer, :, head].double() @ k[layer, :, kv].double().T / q.shape[3] ** 0.5
            mask = cols <= rows if kv < num_retrieval else window
            out[layer, :, head] = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[layer, :, kv].double()
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("dim", "group", "name"), [(16, 1, "int4"), (64, 3, "int4"), (96, 2, "int4"), (128, 3, "int4"), (128, 3, "k5v3")]
)
def test_nothing_changes_where_all_tokens_are_exact(cpu_kernels, compiled, split, dim, group, name):
    """Everything stands in the sink page and the tail: chunks and single tokens answer as plain attention does."""
    q, k, v = tokens_of_exact_rotation(128, group, dim)
    assert dim == 16 or not torch.equal(k, k.bfloat16().float())  # stored plain they would be rounded
    for layer, num_retrieval in enumerate(SPLITS[split]):  # rings hold plain keys
        k[layer, :, num_retrieval:] = k[layer, :, num_retrieval:].bfloat16().float()
        if name == "k5v3":  # values that are exact in bfloat16 once they are rotated
            v[layer, :, :num_retrieval] = v[layer, :, :num_retrieval] @ key_rotation(dim)[0].T
    kernels = cpu_kernels if compiled else None
    expected = by_mask(q, k, v, SPLITS[split], group)
    for chunks in ([128], [50, 14, *[1] * 64]):
        attention = make(PageFormat(name, 64, dim), SPLITS[split], group, 128, kernels)
        out = drive(attention, q, k, v, chunks)
        assert all(pages is None or pages.num_pooled == 0 for pages, _ in attention.cache.layers)
        assert rms_ratio(out, expected) < 2e-6


@pytest.mark.parametrize("device_share", [1.0, 0.4])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (96, 1)])
def test_pages_cost_only_their_own_error(cpu_kernels, dim, group, device_share):
    """Pages in use: near to plain attention over exact keys, and nearer than unturned keys come where queries and keys
    are large in the same channel."""
    q, k, v = tokens_of_exact_rotation(500, group, dim, seed=1)
    k[..., 3] *= 8
    q[..., 3] *= 3
    v = v.sign()  # two levels, which a page gives back
    expected = by_mask(q, k, v, SPLITS["mixed"], group)
    errors = {}
    for rotates in (True, False):
        attention = make(PageFormat("int4", 64, dim), SPLITS["mixed"], group, 500, cpu_kernels, device_share)
        assert attention._rotation is not None
        if not rotates:
            attention._rotation = attention.decode._signs = None
        errors[rotates] = rms_ratio(drive(attention, q, k, v, [250, 130, *[1] * 120]), expected)
    assert 1e-3 < errors[True] < 0.85 * errors[False]
