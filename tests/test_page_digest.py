"""Page digests: layout, what they stand for, and that a page's digest does not depend on its neighbours."""

import numpy as np
import pytest
import torch

from longrun.errors import ConfigError, InputError
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_digest import decode_digest, encode_digest
from longrun.quant.rotation import key_rotation
from longrun.specs.selection_spec import Selection

FORMATS = [DigestFormat(size, dim, 16, bits) for size, dim, bits in ((64, 128, 8), (64, 64, 4), (16, 64, 8))]
FORMATS += [DigestFormat(64, 128, 16, 4), DigestFormat(256, 64, 32, 8)]


def random_keys(fmt: DigestFormat, *lead: int, seed: int = 0) -> torch.Tensor:
    keys = torch.randn(*lead, fmt.page_size, fmt.head_dim, generator=torch.Generator().manual_seed(seed))
    keys[..., 5] = keys[..., 5] * 4 + 9
    return keys


def by_hand(keys: np.ndarray, fmt: DigestFormat) -> bytes:
    """One page's digest: keys [page_size, head_dim], element by element from the words of the format."""
    for_queries = key_rotation(fmt.head_dim)[0].double().numpy()
    found = b""
    for group in keys.astype(np.float64).reshape(-1, fmt.group_size, fmt.head_dim):
        turned_back = group @ for_queries.T
        half = (turned_back.max(0) - turned_back.min(0)) / 2
        codes, scales = [], []
        for values, last in ((group.mean(0), 2 ** (fmt.centre_bits - 1) - 1), (half, 15)):
            scale = max(np.float16(np.abs(values).max() / last), np.float16(2.0**-24))
            codes.append(np.clip(np.rint(values / float(scale)), -last, last).astype(int))
            scales.append(scale)
        nibbles = [codes[1]] if fmt.centre_bits == 8 else [codes[0] + 8, codes[1]]
        if fmt.centre_bits == 8:
            found += codes[0].astype(np.int8).tobytes()
        for row in nibbles:
            middle = fmt.head_dim // 2
            found += bytes(int(low) | int(high) << 4 for low, high in zip(row[:middle], row[middle:], strict=True))
        found += np.array(scales, dtype="<f2").tobytes()
    return found


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_digest_is_what_the_format_says(fmt):
    keys = random_keys(fmt, 3, 5)
    digest = encode_digest(keys, fmt)
    assert digest.shape == (3, 5, fmt.page_bytes) and digest.dtype == torch.uint8
    same = [np.frombuffer(by_hand(keys[at].numpy(), fmt), np.uint8) == digest[at].numpy() for at in np.ndindex(3, 5)]
    assert np.mean(same) > 0.999  # values that lie between two codes may fall to either


def test_bytes_of_a_page():
    assert [fmt.page_bytes for fmt in FORMATS[:2]] == [784, 4 * (32 + 32 + 4)]
    assert DigestFormat(64, 128, 16, 4).page_bytes == 528


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_decoding_finds_the_mean_and_half_the_range_of_unrotated_keys(fmt):
    for_queries, for_keys = key_rotation(fmt.head_dim)
    plain = random_keys(fmt, 7)
    centre, half = decode_digest(encode_digest(plain @ for_keys, fmt), fmt)
    groups = plain.unflatten(1, (fmt.groups, fmt.group_size))
    for found, expected, last in (
        (centre @ for_queries.T, groups.mean(-2), fmt.last_centre),
        (half, (groups.amax(-2) - groups.amin(-2)) / 2, 15),
    ):
        assert found.shape == (7, fmt.groups, fmt.head_dim)
        assert (found - expected).norm() / expected.norm() < 1.5 / last
    q = torch.randn(fmt.head_dim, generator=torch.Generator().manual_seed(1))
    products = plain.unflatten(1, (fmt.groups, fmt.group_size)) @ q
    bound = (q @ for_queries) @ centre.mT + q.abs() @ half.mT
    assert bound.shape == (7, fmt.groups) and (bound > products.amax(-1)).all()  # lam 1 bounds every key's product


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_a_page_alone_and_among_others_has_the_same_digest(fmt):
    keys = random_keys(fmt, 4, 33)
    together = encode_digest(keys, fmt)
    for at in ((0, 0), (1, 32), (3, 17)):
        assert torch.equal(encode_digest(keys[at], fmt), together[at])
    assert torch.equal(encode_digest(keys[1:3, 5:9], fmt), together[1:3, 5:9])


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_odd_values(fmt):
    """Zeros, equal keys, single outliers, the smallest and the largest of float16."""
    keys = torch.zeros(6, fmt.page_size, fmt.head_dim)
    keys[1] = 3.25
    keys[2, 7, 3] = -1000.0
    keys[3] = 2.0**-24 * torch.arange(-8, 8).repeat(fmt.page_size * fmt.head_dim // 16).view(keys[3].shape)
    keys[4, ::2], keys[4, 1::2] = 65504.0, -65504.0
    keys[5] = 65504.0
    centre, half = decode_digest(encode_digest(keys, fmt), fmt)
    assert centre.isfinite().all() and half.isfinite().all() and (half >= 0).all()
    assert centre[0].abs().max() == 0 and half[0].max() == 0 and half[1].max() == 0 and centre[4].max() == 0
    assert torch.allclose(centre[1], torch.tensor(3.25), rtol=1e-3)
    lone = centre[2] != 0
    assert lone.nonzero().tolist() == [[0, 3]] and torch.allclose(centre[2, 0, 3], torch.tensor(-62.5), rtol=1e-3)
    query_scale = key_rotation(fmt.head_dim)[0].max()
    assert torch.allclose(half[2, 0], 500 * query_scale, rtol=1e-3) and half[2, 1:].max() == 0
    assert centre[5].min() > 65000 * (1 - 1 / fmt.last_centre)


def test_no_byte_is_left_unwritten():
    """Scales poisoned with NaN come back as they were written: what encoding gives covers the page."""
    fmt = FORMATS[0]
    memory = torch.full((2, 9, fmt.page_bytes), 0xFF, dtype=torch.uint8)
    assert not decode_digest(memory, fmt)[0].isfinite().any()
    memory[:, 3:7] = encode_digest(random_keys(fmt, 2, 4), fmt)
    centre, half = decode_digest(memory[:, 3:7], fmt)
    assert centre.isfinite().all() and half.isfinite().all()


def test_refusals():
    with pytest.raises(ConfigError, match="head_dim 96 has no page digests"):
        DigestFormat(64, 96)
    with pytest.raises(ConfigError, match="KV format bf16 cannot be selected: use int4 or k5v3, or turn selection off"):
        Selection(8).digest_format(PageFormat("bf16", 64, 128))
    for settings, words in (
        ({"pages_per_head": 0}, "pages_per_head 0 is too small: it must be at least 5"),
        ({"pages_per_head": 4}, "pages_per_head 4 is too small: it must be at least 5"),
        ({"pages_per_head": 8, "selector": "best"}, "selector 'best' is unknown: use top"),
        ({"pages_per_head": 8, "lam": -0.5}, "lam -0.5 is outside the range"),
        ({"pages_per_head": 8, "share": 1.5}, "share 1.5 is outside the range"),
        ({"pages_per_head": 8, "newest": 8}, "pages_per_head 8 is too small: it must be at least 9"),
    ):
        with pytest.raises(InputError, match=words):
            Selection(**settings)
    assert Selection(5).digest_format(PageFormat("k5v3", 64, 128)) == DigestFormat(64, 128)
