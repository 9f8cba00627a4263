"""The compiled CPU kernel that stores a decoded token against the torch reference and against the rotation matrices."""

import pytest
import torch

pytest.importorskip("triton", reason="the reference stands beside the Triton kernel")

from longrun.kernels.cpu_rope_store import CpuRopeStore
from longrun.kernels.rope_store import rope_store_reference
from longrun.paths import cache_dir
from longrun.quant.rotation import key_rotation, random_signs

NAN = float("nan")
F32, BF16 = torch.float32, torch.bfloat16
SLOTS = (5, 11)


@pytest.fixture(scope="module")
def kernel():
    return CpuRopeStore(cache_dir() / "kernels")  # compiled by whichever test comes first


def error(actual, expected):
    """RMS ratio where the token was written; the rest must be poison still."""
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (x.double().nan_to_num() for x in (actual, expected))
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("heads", [(9, 3, 0), (6, 2, 1), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize(("dtype", "cache"), [(F32, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotation", ["none", "keys", "values"])
def test_reference(kernel, heads, dim, dtype, cache, norm, rotation):
    qo, retrieval, streaming = heads
    g = torch.Generator().manual_seed(dim + qo)
    qkv = torch.randn(1, (qo + 2 * (retrieval + streaming)) * dim, generator=g).to(dtype)
    angles = torch.rand(1, dim // 2, generator=g).mul(6.2832).repeat(1, 2)
    weights = (torch.rand(2, dim, generator=g) + 0.5).to(dtype)
    options = {"signs": None if rotation == "none" else random_signs(dim), "rotate_values": rotation == "values"}
    if norm:
        options |= {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-3}
    found = []
    for run in (kernel.rope_store, rope_store_reference):
        rooms = [
            torch.full((count, slots, dim), NAN, dtype=cache) for count, slots in ((retrieval, 8), (streaming, 19))
        ]
        tails, rings = ([room, room.clone()] if len(room) else [None, None] for room in rooms)
        q = torch.full((qo, dim), NAN, dtype=dtype)
        slots = SLOTS if run == kernel.rope_store else torch.tensor(SLOTS)
        run(qkv, angles.cos(), angles.sin(), q, *tails, *rings, slots, qo, **options)
        found.append([q, *(x for x in (*tails, *rings) if x is not None)])
    limit = 1e-6 if cache == F32 else 4e-3  # bf16: a tie may fall either way
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < limit


@pytest.mark.parametrize("dim", [16, 64, 80])
def test_unrotate(kernel, dim):
    out = torch.randn(3, 2, dim, generator=torch.Generator().manual_seed(0))
    for_queries, for_keys = key_rotation(dim)
    rotated = out @ for_keys
    assert error(rotated, out) > 0.5
    kernel.unrotate_(rotated, random_signs(dim))
    assert error(rotated, out) < 1e-6
    rotated = out.clone()
    kernel.unrotate_(rotated, random_signs(dim))
    assert error(rotated, out @ for_queries.T) < 1e-6
