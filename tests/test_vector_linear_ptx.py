"""The PTX of the one-token linear kernels: their own text, instruction by instruction, against products by hand."""

import numpy as np
import pytest
import torch
from ptx_by_hand import run_ptx, signed, words

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels import vector_linear_packed
from longrun.kernels.vector_linear_packed import code_planes


def test_code_planes_are_near_the_code():
    code = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).square()
    planes = code_planes(code).view(torch.uint8).view(2, 16).int()
    assert planes.max() < 128
    assert ((planes[0] * 128 + planes[1] - 8256) / 8127 - code).abs().max() <= 0.51 / 8127
    assert planes[:, code == 0].tolist() == [[64] * int((code == 0).sum())] * 2


def test_ptx_of_a_word_decodes_every_nibble():
    """One nonzero activation at a time: a is 1 and b is 0, then the other way round."""
    code = torch.linspace(-1, 1, 16)
    tables = [np.uint32(t & 0xFFFFFFFF) for t in code_planes(code).tolist()]
    steps = (code.double() * 8127).round().long() + 8256
    g = np.random.default_rng(0)
    for place in range(8):
        word = g.integers(0, 2**32, 200, dtype=np.uint32)
        one = np.full_like(word, 1 << (8 * (place % 4)))
        none = np.zeros_like(word)
        pair = [one, none] if place < 4 else [none, one]
        full = [np.full_like(word, t) for t in tables]
        h, hb, low = run_ptx(vector_linear_packed.NF4_PTX.value, [word, *pair, none, none, none, none, none, *full], 3)
        nibble = torch.from_numpy(((word >> np.uint32(4 * place)) & 15).astype(np.int64))
        assert not hb.any() and torch.equal(torch.from_numpy((h * 128 + low).astype(np.int64)), steps[nibble])
        _, hb, _ = run_ptx(vector_linear_packed.NF4_PTX.value, [word, none, none, *pair, none, none, none, *full], 3)
        assert np.array_equal(hb, h)


def test_ptx_of_an_int4_chunk_multiplies_every_nibble():
    """Random words and activations, and those of the largest sums, against the products of the weights by hand."""
    g = np.random.default_rng(1)
    words = g.integers(0, 2**32, (4, 200), dtype=np.uint32)
    planes = g.integers(-128, 128, (2, 32, 200))
    words[:, 0], planes[:, :, 0] = 0, -128  # all weights are -8
    words[:, 1], planes[:, :, 1] = 0xFFFFFFFF, 127
    packed = [
        [sum((plane[4 * j + i].astype(np.uint32) & 255) << np.uint32(8 * i) for i in range(4)) for j in range(8)]
        for plane in planes
    ]
    start = np.full(200, 0x4B400000, dtype=np.uint32)
    starts = []
    for plane in packed:
        total = start
        for word in plane:
            (total,) = run_ptx(vector_linear_packed.INT4_OFFSET_PTX.value, [word, total], 1)
        starts.append(total)
    found = run_ptx(vector_linear_packed.INT4_PTX.value, [*words, *packed[0], *packed[1], *starts], 2)
    bytes_of = words[:, None] >> (8 * np.arange(4, dtype=np.uint32))[:, None] & 255  # [word, byte, 200]
    weights = np.stack((bytes_of & 15, bytes_of >> 4), axis=1).reshape(32, 200).astype(np.int64) - 8
    for total, plane in zip(found, planes, strict=True):
        value = total.view(np.float32).astype(np.float64) - 12582912  # the kernel reads the bits as a float
        assert np.array_equal(value, 16 * (weights * plane).sum(0))


def test_ptx_packs_bytes_in_order():
    numbers = [-32639, -129, 1000, 32639]
    bits = [int(np.float32(12582912 + 128 + v).view(np.uint32)) for v in numbers]
    a, b = (signed(w >> (8 * np.arange(4, dtype=np.uint32)) << np.uint32(24)) >> 24 for w in
            run_ptx(vector_linear_packed.PACK_PTX.value, words(*bits), 2))  # fmt: skip
    assert (256 * a + b).tolist() == numbers
