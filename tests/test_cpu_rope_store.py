"""The compiled CPU kernel that stores a decoded token against the torch reference and against the rotation matrices."""

import pytest
import torch

pytest.importorskip("triton", reason="the reference stands beside the Triton kernel")

from longrun.kernels.cpu_rope_store import CpuRopeStore
from longrun.kernels.rope_store import rope_store_reference
from longrun.kernels.unrotate import unrotate_reference
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
    for run in (kernel.prepare, rope_store_reference):
        rooms = [
            torch.full((count, slots, dim), NAN, dtype=cache) for count, slots in ((retrieval, 8), (streaming, 19))
        ]
        tails, rings = ([room, room.clone()] if len(room) else [None, None] for room in rooms)
        q = torch.full((qo, dim), NAN, dtype=dtype)
        given = qkv.clone(), angles.cos(), angles.sin(), q, *tails, *rings, torch.tensor(SLOTS), qo
        prepared = run(*given, **options)
        if prepared is not None:
            del given  # it keeps what it reads
            prepared()
        found.append([q, *(x for x in (*tails, *rings) if x is not None)])
    limit = 1e-6 if cache == F32 else 4e-3  # bf16: a tie may fall either way
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < limit


def test_a_prepared_call_reads_what_stands_there_when_it_runs(kernel):
    dim, slots = 16, torch.tensor([2, 0])
    qkv, tail = torch.randn(1, 3 * dim), torch.zeros(2, 1, 8, dim)
    q, one = torch.empty(1, dim), torch.ones(dim)
    call = kernel.prepare(qkv, one, 0 * one, q, *tail, None, None, slots, 1)
    call()
    slots[0] = 5
    qkv.mul_(2)
    call()
    assert torch.equal(q, qkv[:, :dim]) and torch.equal(tail[0, 0, 5], 2 * tail[0, 0, 2])
    assert (tail[1, 0].abs().sum(-1) > 0).tolist() == [i in (2, 5) for i in range(8)]


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("num_rotated", [0, 4, 6])
def test_unrotate(kernel, dim, dtype, num_rotated):
    found = torch.randn(6, dim, generator=torch.Generator().manual_seed(0))
    signs, out, expected = random_signs(dim), *torch.full((2, 6, dim), NAN, dtype=dtype)
    kernel.prepare_unrotate(found, signs if num_rotated else None, num_rotated, out)()
    unrotate_reference(found, signs, num_rotated, expected)
    assert error(out, expected) < (1e-6 if dtype == F32 else 4e-3)


@pytest.mark.parametrize("dim", [16, 64, 80])
def test_unrotate_undoes_the_keys_rotation(kernel, dim):
    out = torch.randn(6, dim, generator=torch.Generator().manual_seed(0))
    rotated, back = out @ key_rotation(dim)[1], torch.empty_like(out)
    assert error(rotated, out) > 0.5
    kernel.prepare_unrotate(rotated, random_signs(dim), 6, back)()
    assert error(back, out) < 1e-6
