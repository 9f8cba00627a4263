"""The digest kernel: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU."""

import pytest
import torch
from interpreted import INTERPRETED, accesses, compiled, interpreted_tests, not_interpreted, same_bits
from page_views import random_pages

from longrun.errors import ConfigError
from longrun.kernels.page_digest import digest_pages_reference
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import encode_pages
from longrun.quant.page_digest import decode_digest

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.page_digest_triton import digest_kernel, digest_pages

POISON = 0xFF  # as a float16 scale it is NaN
CASES = pytest.mark.parametrize(
    ("name", "head_dim", "centre_bits"), [("int4", 64, 4), ("k5v3", 128, 8), ("int4", 128, 8), ("k5v3", 64, 4)]
)


def check(name, head_dim, centre_bits, heads, pages, device="cpu", special=False):
    """Scattered slots of a wider table, index and output of wider tensors; what is not meant stays as it was."""
    fmt, digest_format = PageFormat(name, 64, head_dim), DigestFormat(64, head_dim, 16, centre_bits)
    k, v = random_pages(heads, pages, fmt, seed=pages)
    if special:
        k[0, 0] = 0
        k[-1, -1] = torch.linspace(-1, 1, head_dim) * 3e-8
        k[0, -1, 5, 3] = 60000.0
    payload, scales = encode_pages(k, v, fmt)
    g = torch.Generator().manual_seed(1)
    storage = torch.full((heads * pages + 5, fmt.payload_bytes), POISON, dtype=torch.uint8)
    table = torch.full((heads, pages + 3), -(2**30), dtype=torch.int32)
    table[:, 2:-1] = torch.randperm(len(storage), generator=g)[: heads * pages].view(heads, pages) + 70
    storage[table[:, 2:-1].long() - 70] = payload
    index = torch.full((heads, pages + 4, 2, head_dim), float("nan"), dtype=torch.float16)
    index[:, 1 : pages + 1] = scales
    expected = torch.full((heads, pages + 4, digest_format.page_bytes), POISON, dtype=torch.uint8)
    found = expected.to(device)
    at = slice(1, pages + 1)
    digest_pages_reference(storage, table[:, 2:-1], index[:, at], expected[:, at], fmt, digest_format, 70)
    storage, table, index = storage.to(device), table.to(device), index.to(device)
    digest_pages(storage, table[:, 2:-1], index[:, at], found[:, at], fmt, digest_format, 70)
    assert same_bits(found.cpu(), expected)
    for part in decode_digest(expected[:, at], digest_format):
        assert part.isfinite().all() and part.any()
    assert (expected[:, 0] == POISON).all() and (expected[:, pages + 1 :] == POISON).all()


if INTERPRETED:

    @CASES
    @pytest.mark.parametrize(("heads", "pages", "special"), [(1, 1, False), (2, 3, True)])
    def test_interpreted_digests(name, head_dim, centre_bits, heads, pages, special):
        check(name, head_dim, centre_bits, heads, pages, special=special)


@not_interpreted
def test_the_interpreter_passes(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) == 8


@not_interpreted
def test_refusals():
    storage = torch.zeros(1, PageFormat("int4", 64, 64).payload_bytes, dtype=torch.uint8)
    slots, index = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 2, 64, dtype=torch.float16)
    for fmt, digest_format, words in (
        (PageFormat("int4", 64, 64), DigestFormat(64, 64, 32), "groups of 32 tokens have no Triton kernel: use 16"),
        (PageFormat("int4", 128, 64), DigestFormat(128, 64), "page_size 128 has no Triton page kernels: use 64"),
        (PageFormat("bf16", 64, 64), DigestFormat(64, 64), "KV format 'bf16' has no Triton page kernels"),
    ):
        out = torch.zeros(1, 1, digest_format.page_bytes, dtype=torch.uint8)
        with pytest.raises(ConfigError, match=words):
            digest_pages(storage, slots, index, out, fmt, digest_format)


@not_interpreted
@CASES
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(name, head_dim, centre_bits, capability):
    pointers = {"storage": "*u8", "slots": "*i32", "index": "*fp16", "out": "*u8"}
    key_bits = 5 if name == "k5v3" else 4
    constants = {
        "SCALE": 0.125, "D": head_dim, "PAGE_SIZE": 64, "GROUP": 16, "KEY_BITS": key_bits, "CENTRE_BITS": centre_bits,
    }  # fmt: skip
    ptx = compiled(digest_kernel, capability, pointers, constants, 4)
    assert max(size for kind, size in accesses(ptx) if kind == "ld") >= 8  # bytes that a thread reads at once


@pytest.mark.gpu
@not_interpreted
@CASES
@pytest.mark.parametrize(("heads", "pages"), [(1, 1), (3, 7), (8, 130)])
def test_digests_on_the_gpu_are_the_reference_bytes(name, head_dim, centre_bits, heads, pages):
    check(name, head_dim, centre_bits, heads, pages, "cuda", special=pages > 1)


@pytest.mark.gpu
@not_interpreted
def test_torch_on_the_gpu_finds_the_same_digests():
    fmt, digest_format = PageFormat("k5v3", 64, 128), DigestFormat(64, 128)
    payload, index = (x[None] for x in encode_pages(*(x[0] for x in random_pages(1, 130, fmt)), fmt))
    slots = torch.arange(130, dtype=torch.int32)[None]
    found = []
    for device in ("cpu", "cuda"):
        out = torch.full((1, 130, digest_format.page_bytes), POISON, dtype=torch.uint8, device=device)
        digest_pages_reference(payload[0].to(device), slots.to(device), index.to(device), out, fmt, digest_format)
        found.append(out.cpu())
    assert torch.equal(*found)


@pytest.mark.gpu
@not_interpreted
def test_offsets_beyond_four_gib_and_pinned_memory():
    """Pages on both sides of 2**32 bytes of the pool, digests beyond 2**31, and a pool that stands on the host."""
    fmt, digest_format = PageFormat("k5v3", 64, 128), DigestFormat(64, 128)
    border = 2**32 // fmt.payload_bytes
    slots = torch.tensor([[0, border - 1, border, border + 1]] * 2, dtype=torch.int32, device="cuda")
    payload, index = (x.cuda() for x in encode_pages(*random_pages(1, 4, fmt), fmt))
    expected = torch.empty(1, 4, digest_format.page_bytes, dtype=torch.uint8)
    digest_pages_reference(
        payload[0].cpu(), torch.arange(4, dtype=torch.int32)[None], index.cpu(), expected, fmt, digest_format
    )
    storage = torch.empty(border + 2, fmt.payload_bytes, dtype=torch.uint8, device="cuda")
    storage[slots[0].long()] = payload[0]
    room = torch.full((2**31 + 2 * expected.numel(),), POISON, dtype=torch.uint8, device="cuda")
    out = torch.as_strided(room, (2, 4, digest_format.page_bytes), (2**31, digest_format.page_bytes, 1))
    digest_pages(storage, slots, index.expand(2, -1, -1, -1), out, fmt, digest_format)
    assert same_bits(out.cpu(), expected.expand(2, -1, -1))
    out.fill_(POISON)
    pinned, near = payload[0].cpu().pin_memory(), torch.arange(4, dtype=torch.int32, device="cuda").expand(2, -1)
    digest_pages(pinned, near, index.expand(2, -1, -1, -1), out, fmt, digest_format)
    assert same_bits(out.cpu(), expected.expand(2, -1, -1))
