"""Fused Triton kernels: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

Triton decides when a kernel is decorated whether it is interpreted, so the interpreted tests run in a process of
their own, which collects this file with TRITON_INTERPRET=1.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longrun.errors import ConfigError
from longrun.kernels.dense_attention import merge_partial, reference_attention_with_lse
from longrun.model.rope import apply_rope_, signed_sin

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.merge_partial import (
    merge_into,
    merge_into_reference,
    merge_kernel,
    merge_partial_,
    merge_partial_reference,
)
from longrun.kernels.page_copy import (
    copy_kernel,
    copy_pages,
    copy_pages_reference,
    fetch_kernel,
    fetch_pages,
    fetch_pages_reference,
    row_tiles,
)
from longrun.kernels.rope_store import rope_store, rope_store_kernel, rope_store_reference
from longrun.kernels.rotary import rotary_, rotary_kernel, rotary_reference
from longrun.kernels.silu_mul import silu_mul_, silu_mul_kernel, silu_mul_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the kernels of this process are interpreted")
NAN, INF = float("nan"), float("inf")
# The interpreter cuts bfloat16 off where everything else rounds: twice the error of one rounding.
LIMIT = {
    torch.float32: 1e-6 if INTERPRETED else 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
}
PAYLOADS = (8448, 4352)


def same_bits(actual, expected):
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def error(actual, expected):
    """Norm of the difference over the norm of what is expected; NaN never passes a comparison."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def tables(tokens, dim, seed=5, device="cpu"):
    """cos, sin [tokens, dim] of angles all over the circle, the second half a copy of the first."""
    angles = torch.rand(tokens, dim // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6.2832
    return tuple(f(angles).float().repeat(1, 2).to(device) for f in (torch.cos, torch.sin))


def decoder_turn(heads, cos, sin, weights, split, eps):
    """What the decoder does to heads [T, n, dim]: head norms, then `apply_rope_`."""
    heads = heads.clone()
    if weights is not None:
        for part, weight in ((heads[:, :split], weights[0]), (heads[:, split:], weights[1])):
            part.copy_(F.rms_norm(part, weight.shape, weight, eps))
    return apply_rope_(heads, cos[:, None], signed_sin(sin)[:, None])


def head_weights(dim, dtype, device="cpu", seed=3):
    return (torch.rand(2, dim, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device, dtype)


def check_rotary(tokens, heads, extra, dim, dtype, norm, device="cpu", **how):
    """`heads` of `heads + extra` heads between other columns: only they are turned."""
    g = torch.Generator().manual_seed(tokens)
    fused = (torch.randn(tokens, heads + extra, dim, generator=g) * 3).to(device, dtype)
    cos, sin = tables(tokens, dim, device=device)
    weights, split = (head_weights(dim, dtype, device), heads * 3 // 4) if norm else (None, 0)
    given = {"weight_a": weights[0], "weight_b": weights[1], "split": split, "eps": 1e-6} if norm else {}
    expected, reference, actual = decoder_turn(fused[:, :heads], cos, sin, weights, split, 1e-6), fused.clone(), fused
    rest = fused[:, heads:].clone()
    rotary_reference(reference[:, :heads], cos, sin, **given)
    view = actual[:, :heads]
    assert rotary_(view, cos, sin, **given, **how) is view
    assert same_bits(actual[:, heads:], rest)
    if not norm and dtype != torch.bfloat16 and device == "cpu":
        assert same_bits(view, reference[:, :heads])
    assert error(view, expected) < LIMIT[dtype] and error(reference[:, :heads], expected) < LIMIT[dtype]
    if norm:  # the weights are used, each for its own heads
        assert error(decoder_turn(fused[:, :heads], cos, sin, weights.flip(0), split, 1e-6), expected) > 0.05


def token_case(qo, retrieval, streaming, dim, dtype, cache, norm, device="cpu", seed=0, page=64, ring=19):
    """Arguments of rope_store for one token, outputs poisoned."""
    g = torch.Generator().manual_seed(seed)
    kv = retrieval + streaming
    qkv = torch.randn((qo + 2 * kv) * dim, generator=g).mul_(2).to(device, dtype)
    cos, sin = (x[0] for x in tables(1, dim, seed, device))

    def room(*shape, of):
        return torch.full(shape, NAN, dtype=of, device=device)

    tails = [room(retrieval, page, dim, of=cache) for _ in range(2)] if retrieval else [None, None]
    rings = [room(streaming, ring, dim, of=cache) for _ in range(2)] if streaming else [None, None]
    weights = head_weights(dim, dtype, device)
    norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-5} if norm else {}
    return [qkv, cos, sin, room(qo, dim, of=dtype), *tails, *rings], norms


def fresh(arguments):
    return [None if x is None else x.clone() for x in arguments]


def check_token(qo, retrieval, streaming, dim, dtype, cache, norm, device="cpu"):
    given, norms = token_case(qo, retrieval, streaming, dim, dtype, cache, norm, device)
    slots = torch.tensor([37, 18], device=device)
    actual, reference = fresh(given), fresh(given)
    rope_store(*actual, slots, qo, **norms)
    rope_store_reference(*reference, slots, qo, **norms)
    assert same_bits(actual[0], given[0])
    kv = retrieval + streaming
    heads = given[0].view(1, -1, dim)
    weights = (norms["q_norm"], norms["k_norm"]) if norm else None
    turned = decoder_turn(heads[:, : qo + kv], given[1][None], given[2][None], weights, qo, 1e-5)[0]
    k, v = turned[qo:].to(cache), heads[0, qo + kv :].to(cache)
    exact = not norm and torch.bfloat16 not in (dtype, cache) and device == "cpu"
    limit = max(LIMIT[dtype], LIMIT[cache])
    outs = [(actual[3], turned[:qo], limit)]
    for place, part, slot in ((4, slice(0, retrieval), 37), (6, slice(retrieval, kv), 18)):
        if given[place] is None:
            continue
        for side, whole, bound in ((0, k, limit), (1, v, 0.0 if dtype == cache else LIMIT[cache])):
            found = actual[place + side]
            outs.append((found[:, slot], whole[part], bound))
            assert found.isnan().sum() == found.numel() - found[:, slot].numel()  # nothing else was written
            assert same_bits(reference[place + side].isnan(), found.isnan())
            assert not exact or same_bits(found[:, slot], reference[place + side][:, slot])
    for found, expected, bound in outs:
        assert error(found, expected) <= bound
    assert not exact or same_bits(actual[3], reference[3])


def partial_case(shape, dim, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    out, other = (torch.randn(*shape, dim, generator=g) for _ in range(2))
    lse, other_lse = (torch.randn(shape, generator=g) * 4 for _ in range(2))
    return [x.to(device) for x in (out, lse, other.to(dtype), other_lse)]


def empty_some(out, lse, other, other_lse):
    """Of every 8 rows: other empty (-inf, NaN), own empty, both empty; their outputs hold NaN."""
    flat = [x.view(-1, *x.shape[len(lse.shape) :]) for x in (out, lse, other, other_lse)]
    for row, empty in ((1, -INF), (3, NAN)):
        flat[3][row::8], flat[2][row::8] = empty, NAN
    flat[1][5::8], flat[0][5::8] = -INF, NAN
    for lse_of, out_of in ((1, 0), (3, 2)):
        flat[lse_of][6::8], flat[out_of][6::8] = -INF, NAN


def check_merge(shape, dim, dtype, device="cpu", **how):
    given = partial_case(shape, dim, dtype, device)
    expected = merge_partial(given[0].double(), given[1].double(), given[2].double(), given[3].double())
    actual = [x.clone() for x in given]
    assert merge_partial_(*actual, **how) is None
    assert error(actual[0], expected[0]) < LIMIT[torch.float32] and error(actual[1], expected[1]) < LIMIT[torch.float32]
    assert same_bits(actual[2], given[2]) and same_bits(actual[3], given[3])
    empty_some(*given)
    actual, reference = [x.clone() for x in given], [x.clone() for x in given]
    merge_partial_(*actual, **how)
    merge_partial_reference(*reference)
    lse, both = actual[1].flatten(), torch.zeros_like(actual[1], dtype=torch.bool).flatten()
    both[6::8] = True
    assert (lse[both] == -INF).all() and (actual[0].flatten(0, -2)[both] == 0).all()
    assert (
        error(lse[~both], reference[1].flatten()[~both]) < LIMIT[torch.float32]
        and error(actual[0], reference[0]) < LIMIT[torch.float32]
    )
    only = given[2].flatten(0, -2)[5::8].float(), given[0].flatten(0, -2)[1::8]
    assert same_bits(actual[0].flatten(0, -2)[5::8], only[0]) and same_bits(actual[0].flatten(0, -2)[1::8], only[1])


def check_merge_into(heads, tokens, dim, dtype, final_dtype, device="cpu"):
    given = partial_case((heads, tokens), dim, dtype, device, seed=1)
    empty_some(*given)
    before = [x.clone() for x in given]
    wide = torch.full((tokens, heads + 2, dim), NAN, dtype=final_dtype, device=device)
    final, expected = wide[:, :heads].transpose(0, 1), torch.empty(heads, tokens, dim, dtype=final_dtype, device=device)
    merge_into(*given, final)
    merge_into_reference(*before, expected)
    assert error(final, expected) < LIMIT[final_dtype]
    assert wide[:, heads:].isnan().all()
    assert all(same_bits(x, y) for x, y in zip(given, before, strict=True))


def pools(payload, num_src, num_dst, device="cpu", dst_device=None, seed=0):
    """A pool of random bytes and a poisoned one."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(0, 256, (num_src, payload), dtype=torch.uint8, generator=g)
    return src.to(device), torch.full((num_dst, payload), 0xAA, dtype=torch.uint8, device=dst_device or device)


def scattered(count, of, device="cpu", seed=1):
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].int().to(device)


def check_fetch(storage, heads, per_round, first, limit, device="cpu", slot_offset=1000, **how):
    max_pages = first + per_round + 3
    wide = torch.full((heads, max_pages + 5), -1, dtype=torch.int32, device=device)
    table = wide[:, 2 : 2 + max_pages]
    if limit:
        slots = scattered(heads * limit, len(storage), device).view(heads, limit) + slot_offset
        table[:, :limit] = slots
    lengths = torch.tensor([7, limit, 9], dtype=torch.int32, device=device)
    buffer = torch.full((heads * per_round + 2, storage.shape[1]), 0xAA, dtype=torch.uint8, device=device)
    expected = buffer.clone()
    fetch_pages(storage, table, lengths[1:2], buffer, first, per_round, slot_offset=slot_offset, **how)
    fetch_pages_reference(storage, table, lengths[1:2], expected, first, per_round, slot_offset=slot_offset)
    assert torch.equal(buffer, expected)
    for head in range(heads):  # by hand
        for i in range(per_round):
            row = buffer[head * per_round + i].cpu()
            page = first + i
            assert torch.equal(
                row, storage[int(table[head, page]) - slot_offset].cpu() if page < limit else row * 0 + 0xAA
            )


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize(
        ("tokens", "heads", "extra", "dim"), [(123, 12, 3, 64), (16, 5, 1, 128), (128, 1, 0, 64), (3, 40, 8, 128)]
    )
    def test_interpreted_rotary(tokens, heads, extra, dim, norm, dtype):
        check_rotary(tokens, heads, extra, dim, dtype, norm)

    def test_interpreted_rotary_of_nothing_and_in_small_blocks():
        check_rotary(3, 9, 2, 128, torch.float32, True, block_heads=4, num_warps=2)
        heads = torch.zeros(0, 4, 64)
        assert rotary_(heads, torch.zeros(0, 64), torch.zeros(0, 64)) is heads

    @pytest.mark.parametrize(
        ("dtype", "cache"),
        [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32),
         (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    )  # fmt: skip
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize(
        ("qo", "retrieval", "streaming", "dim"), [(9, 2, 1, 64), (9, 0, 3, 128), (4, 1, 0, 64), (32, 3, 5, 128)]
    )
    def test_interpreted_rope_store(qo, retrieval, streaming, dim, norm, dtype, cache):
        check_token(qo, retrieval, streaming, dim, dtype, cache, norm)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "width", "extra"), [(5, 96, 7), (3, 2048, 0), (2, 2301, 16)])
    def test_interpreted_silu_mul(rows, width, extra, dtype):
        g = torch.Generator().manual_seed(rows)
        wide = (torch.randn(rows, 2 * width + extra, generator=g) * 4).to(dtype)
        wide[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -3e4]).to(dtype)
        given, reference = wide[:, : 2 * width], wide.clone()[:, : 2 * width]
        up, rest = given[:, width:].clone(), wide[:, 2 * width :].clone()
        expected = F.silu(given[:, :width].double()) * up.double()
        found, theirs = silu_mul_(given), silu_mul_reference(reference)
        assert found.shape == (rows, width) and found.data_ptr() == wide.data_ptr() and found.stride() == wide.stride()
        assert error(found, expected) < LIMIT[dtype] and error(theirs, expected) < 2 * LIMIT[dtype]
        assert same_bits(given[:, width:], up) and same_bits(wide[:, 2 * width :], rest)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("shape", "dim"), [((123,), 64), ((3, 41), 128), ((17,), 16)])
    def test_interpreted_merge(shape, dim, dtype):
        check_merge(shape, dim, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_interpreted_merge_into_a_transposed_output(dtype):
        check_merge_into(3, 23, 64, dtype, torch.float32)
        check_merge_into(9, 8, 128, dtype, torch.float16)

    def test_interpreted_merge_of_attention_over_two_halves():
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(3, n, 64, generator=g) for n in (10, 31, 31))
        whole, whole_lse = reference_attention_with_lse(q, k, v, False, 0.125)
        parts = [reference_attention_with_lse(q, k[:, s], v[:, s], False, 0.125) for s in (slice(0, 12), slice(12, 31))]
        (out, lse), (other, other_lse) = parts
        merge_partial_(out, lse, other, other_lse)
        assert error(out, whole) < 1e-6 and error(lse, whole_lse) < 1e-6

    @pytest.mark.parametrize("payload", [*PAYLOADS, 4096, 16, 16400])
    @pytest.mark.parametrize(("programs", "step"), [(None, 1), (3, 1), (2, 4)])
    def test_interpreted_copy_pages(payload, programs, step):
        src, dst = pools(payload, 31, 23)
        of, to = scattered(13, 31) + 100, scattered(13, 23, seed=2) + 7
        expected = dst.clone()
        for i, j in zip(of.tolist(), to.tolist(), strict=True):
            expected[j - 7] = src[i - 100]
        reference = dst.clone()
        copy_pages(
            src, of, dst, to.view(13, 1), src_offset=100, dst_offset=7, num_programs=programs, pages_per_step=step
        )
        copy_pages_reference(src, of, reference, to, src_offset=100, dst_offset=7)
        assert torch.equal(dst, expected) and torch.equal(reference, expected)

    @pytest.mark.parametrize("payload", PAYLOADS)
    @pytest.mark.parametrize(
        ("heads", "per_round", "first", "limit"),
        [(3, 4, 0, 3), (1, 5, 0, 0), (2, 4, 4, 3), (2, 4, 4, 6), (3, 3, 5, 99), (1, 1, 0, 1)],
    )
    def test_interpreted_fetch_pages(heads, per_round, first, limit, payload):
        limit = min(limit, first + per_round + 1)
        storage, _ = pools(payload, 41, 1)
        check_fetch(storage, heads, per_round, first, limit, num_programs=4)
        check_fetch(storage, heads, per_round, first, limit, num_programs=2, pages_per_step=2, num_warps=2)


@not_interpreted
def test_kernels_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100


@not_interpreted
def test_shapes_that_are_not_served_are_refused():
    def token(dim, dtype):
        given, _ = token_case(4, 1, 1, dim, dtype, torch.float32, False)
        rope_store(*given, torch.zeros(2, dtype=torch.int64), 4)

    for dim, dtype, word in ((80, torch.float32, "head_dim 80"), (64, torch.float64, "float64")):
        with pytest.raises(ConfigError, match=word):
            token(dim, dtype)
        with pytest.raises(ConfigError, match=word):
            rotary_(torch.zeros(3, 2, dim, dtype=dtype), *tables(3, dim))
        with pytest.raises(ConfigError, match=word):
            merge_partial_(*partial_case((3,), dim, dtype))
        with pytest.raises(ConfigError, match=word):
            merge_into(*partial_case((3, 2), dim, torch.float32), torch.zeros(3, 2, dim, dtype=dtype))
    with pytest.raises(ConfigError, match="float64"):
        silu_mul_(torch.zeros(2, 8, dtype=torch.float64))
    src, dst = pools(8440, 2, 2)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="8440 bytes"):
        copy_pages(src, slots, dst, slots)
    with pytest.raises(ConfigError, match="8440 bytes"):
        fetch_pages(src, slots[None], slots, dst, 0, 1)


def compiled(kernel, capability, pointers, constants, num_warps, aligned=()):
    """The kernel for a GPU that is not there; arguments that are no pointers as the launcher passes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: pointers.get(n, "fp32" if n == "eps" else "i64" if "stride" in n else "i32") for n in kernel.arg_names}
    names = list(types)
    types |= dict.fromkeys(constants, "constexpr")
    hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or n in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()}, hints)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    assert built.asm["cubin"] and f".target sm_{capability}" in built.asm["ptx"]
    return built.asm["ptx"]


def accesses(ptx):
    """The kernel's accesses to global memory in order: ("ld" or "st", bytes)."""
    found = re.findall(r"(ld|st)\.global(?:\.[a-z_:0-9A-Z]+)*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
    return [(kind, int(many or 1) * int(bits) // 8) for kind, many, bits in found]


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("item", ["bf16", "fp32"])
def test_fused_kernels_compile_without_a_gpu(item, capability):
    of, size = f"*{item}", {"bf16": 2, "fp32": 4}[item]
    angles = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    for norm, dim in ((False, 128), (True, 128), (True, 64)):
        pointers = angles | dict.fromkeys(("heads_ptr", "weight_a_ptr", "weight_b_ptr"), of)
        constants = {"D": dim, "BLOCK": 2048 // dim, "NORM": norm}
        ptx = compiled(rotary_kernel, capability, pointers, constants, 4, ("token_stride", "head_stride"))
        stores = [number for kind, number in accesses(ptx) if kind == "st"]
        assert stores and set(stores) == {16}
        names = ("qkv", "q_out", "tail_k", "tail_v", "ring_k", "ring_v", "q_norm", "k_norm")
        pointers = angles | {f"{name}_ptr": of for name in names} | {"slots_ptr": "*i64"}
        constants = {"D": dim, "NORM": norm, "PDL": capability >= 90}
        ptx = compiled(rope_store_kernel, capability, pointers, constants, 1, ("tail_stride", "ring_stride"))
        assert {number for kind, number in accesses(ptx) if kind == "st"} == {dim // 2 // 32 * size}
    ptx = compiled(silu_mul_kernel, capability, {"gate_up_ptr": of}, {"BLOCK": 2048}, 4, ("row_stride", "width"))
    assert {number for _, number in accesses(ptx)} == {16}
    lse = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "other_lse_ptr": "*fp32", "other_ptr": of}
    for in_place in (True, False):
        pointers = lse | {"to_ptr": "*fp32" if in_place else of}
        constants = {"D": 128, "BLOCK": 16, "IN_PLACE": in_place}
        ptx = compiled(merge_kernel, capability, pointers, constants, 4, ("outer_stride", "inner_stride"))
        wide = [access for access in accesses(ptx) if access[1] == 16]
        assert len(wide) >= 16 * 128 // 128 * (4 + size + (4 if in_place else size)) // 16
        assert {number for _, number in accesses(ptx)} == {16, 4}  # rows, and log-sum-exps


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("pages", [1, 2])
def test_page_copies_compile_without_a_gpu(pages, payload, capability):
    """16 bytes an access, and every load of a step before its first store."""
    names = ("src", "src_slots", "dst", "dst_slots", "storage", "table", "limit", "buffer")
    for kernel in (copy_kernel, fetch_kernel):
        constants = row_tiles(payload, 4) | {"PAGES": pages}
        pointers = {f"{name}_ptr": "*i32" for name in names if f"{name}_ptr" in kernel.arg_names}
        found = accesses(compiled(kernel, capability, pointers, constants, 4))
        wide = [kind for kind, number in found if number == 16]
        per_thread = pages * (payload // 2048 + 1)
        assert wide == ["ld"] * per_thread + ["st"] * per_thread
        assert {number for kind, number in found if kind == "st"} == {16}


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "extra", "dim"), [(2048, 40, 8, 128), (123, 12, 3, 64), (128, 5, 1, 128), (1, 40, 8, 128)]
)
def test_rotary_on_the_gpu(tokens, heads, extra, dim, norm, dtype):
    check_rotary(tokens, heads, extra, dim, dtype, norm, "cuda")
    check_rotary(tokens, heads, extra, dim, dtype, norm, "cuda", block_heads=8, num_warps=2)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("qo", "retrieval", "streaming", "dim"), [(32, 4, 4, 128), (32, 8, 0, 128), (9, 0, 3, 64), (4, 1, 0, 64)]
)
def test_rope_store_on_the_gpu(qo, retrieval, streaming, dim, norm, dtype, cache):
    check_token(qo, retrieval, streaming, dim, dtype, cache, norm, "cuda")


@pytest.mark.gpu
@not_interpreted
def test_a_captured_rope_store_follows_slots_angles_and_projection():
    given, norms = token_case(32, 3, 5, 128, torch.bfloat16, torch.bfloat16, True, "cuda", ring=320)
    slots = torch.zeros(2, dtype=torch.int64, device="cuda")
    rope_store(*given, slots, 32, **norms)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_store(*given, slots, 32, **norms)
    for seed, (tail, ring) in enumerate(((0, 0), (63, 319), (1, 128)), start=7):
        case, _ = token_case(32, 3, 5, 128, torch.bfloat16, torch.bfloat16, True, "cuda", seed=seed)
        for to, new in zip(given[:3], case[:3], strict=True):
            to.copy_(new)
        for out in given[3:]:
            out.fill_(NAN)
        expected = fresh(given)
        slots.copy_(torch.tensor([tail, ring]))
        graph.replay()
        rope_store_reference(*expected, slots, 32, **norms)
        for found, wanted in zip(given[3:], expected[3:], strict=True):
            assert same_bits(found.isnan(), wanted.isnan())
            assert error(found.nan_to_num(), wanted.nan_to_num()) < LIMIT[torch.bfloat16]


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "extra"), [(1024, 14336, 0), (123, 2301, 16), (1, 14336, 0)])
def test_silu_mul_on_the_gpu(rows, width, extra, dtype):
    wide = (torch.randn(rows, 2 * width + extra, device="cuda") * 4).to(dtype)
    wide[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -3e4])
    given, before = wide[:, : 2 * width], wide.clone()
    expected = F.silu(given[:, :width].double()) * given[:, width:].double()
    assert error(silu_mul_(given), expected) < LIMIT[dtype]
    assert same_bits(wide[:, width:], before[:, width:])


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "dim"), [((32, 4096), 128), ((123,), 64), ((9, 128), 128)])
def test_merge_on_the_gpu(shape, dim, dtype):
    check_merge(shape, dim, dtype, "cuda")
    check_merge(shape, dim, dtype, "cuda", block_rows=8, num_warps=2)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_into_on_the_gpu(dtype):
    check_merge_into(32, 2048, 128, dtype, torch.bfloat16, "cuda")
    check_merge_into(9, 123, 64, dtype, torch.float32, "cuda")


@pytest.mark.gpu
@not_interpreted
def test_fused_kernels_beyond_two_billion_elements():
    """Rows on both sides of 2**31 elements: token and row strides, and rows of a merge."""
    far = 2**31 + 256
    room = torch.empty(far + 2 * 4096, dtype=torch.bfloat16, device="cuda")
    rows = torch.as_strided(room, (2, 4096), (far, 1)).copy_(torch.randn(2, 4096))
    expected, cos, sin = rows.clone(), *tables(2, 128, device="cuda")
    rotary_(rows.unflatten(1, (32, 128)), cos, sin)
    rotary_reference(expected.view(2, 32, 128), cos, sin)
    assert error(rows, expected) < LIMIT[torch.bfloat16]
    expected = silu_mul_reference(rows.clone())
    assert error(silu_mul_(rows), expected) < 2 * LIMIT[torch.bfloat16]
    del room, rows
    count = 2**24 + 24  # of 128 channels
    out, other = (torch.empty(count, 128, dtype=d, device="cuda") for d in (torch.float32, torch.bfloat16))
    lse, other_lse = torch.randn(2, count, device="cuda")
    ends = [slice(0, 64), slice(count - 64, count)]
    for part in ends:
        out[part].normal_(), other[part].normal_()
    given = [[x[part].clone() for x in (out, lse, other, other_lse)] for part in ends]
    merge_partial_(out, lse, other, other_lse)
    for part, case in zip(ends, given, strict=True):
        merge_partial_reference(*case)
        assert error(out[part], case[0]) < 2e-6 and error(lse[part], case[1]) < 2e-6


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("pinned", "cuda"), ("cuda", "pinned")])
def test_copy_pages_on_the_gpu(source, target, payload):
    src, dst = pools(payload, 3001, 2003)
    wanted = dst.clone()
    src, dst = (pool.pin_memory() if kind == "pinned" else pool.cuda() for pool, kind in ((src, source), (dst, target)))
    of, to = scattered(1500, 3001, "cuda") + 100, scattered(1500, 2003, "cuda", seed=2) + 7
    wanted[(to.cpu() - 7).long()] = src.cpu()[(of.cpu() - 100).long()]
    for programs, step, warps in ((None, 1, 4), (32, 1, 4), (7, 2, 2), (64, 4, 8)):
        dst.fill_(0xAA)
        copy_pages(
            src, of, dst, to, src_offset=100, dst_offset=7, num_programs=programs, pages_per_step=step, num_warps=warps
        )
        torch.cuda.synchronize()  # the host's pool is read next
        assert torch.equal(dst.cpu(), wanted)


@pytest.mark.gpu
@not_interpreted
def test_page_copies_beyond_two_gib_and_four():
    bounds = [2**31 // 8448, 2**32 // 8448]
    slots = torch.tensor([0, *(b + d for b in bounds for d in (-1, 0, 1))], dtype=torch.int32, device="cuda")
    pages, _ = pools(8448, len(slots), 1, "cuda")
    order = torch.arange(len(slots), dtype=torch.int32, device="cuda")
    pool = torch.full((bounds[1] + 2, 8448), 0xAA, dtype=torch.uint8, device="cuda")
    copy_pages(pages, order, pool, slots + 9, dst_offset=9)
    assert torch.equal(pool[slots.long()], pages) and (pool == 0xAA).all(1).sum() == len(pool) - len(slots)
    back = torch.zeros_like(pages)
    copy_pages(pool, slots + 9, back, order, src_offset=9)
    assert torch.equal(back, pages)
    back = torch.zeros_like(pages)
    limit = torch.tensor([len(slots)], dtype=torch.int32, device="cuda")
    fetch_pages(pool, slots[None] + 9, limit, back, 0, len(slots), slot_offset=9)
    assert torch.equal(back, pages)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(("per_round", "first", "limit"), [(64, 0, 64), (64, 64, 100), (64, 128, 100), (33, 7, 22)])
def test_fetch_pages_from_pinned_memory(per_round, first, limit, payload):
    storage, _ = pools(payload, 1024, 1)
    check_fetch(storage.pin_memory(), 8, per_round, first, limit, "cuda")
    check_fetch(storage.pin_memory(), 8, per_round, first, limit, "cuda", num_programs=5, pages_per_step=4)


@pytest.mark.gpu
@not_interpreted
def test_a_captured_fetch_follows_limit_table_and_host_pages():
    storage = pools(8448, 900, 1)[0].pin_memory()
    table = scattered(800, 900, "cuda").view(8, 100)
    limit = torch.ones(1, dtype=torch.int32, device="cuda")
    buffers = [torch.zeros(8 * 40, 8448, dtype=torch.uint8, device="cuda") for _ in range(3)]

    def rounds(fetch):
        for i, buffer in enumerate(buffers):
            fetch(storage, table, limit, buffer, 40 * i, 40)

    rounds(fetch_pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds(fetch_pages)
    for step, number in enumerate((1, 39, 0, 40, 41, 99, 100)):
        limit.fill_(number)
        table.copy_(scattered(800, 900, "cuda", seed=step).view(8, 100))
        torch.cuda.synchronize()
        storage[step * 100 : step * 100 + 50] ^= 0x5A  # the host writes between replays
        for buffer in buffers:
            buffer.fill_(0xAA)
        graph.replay()
        found = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.fill_(0xAA)
        rounds(fetch_pages_reference)
        assert all(torch.equal(x, y) for x, y in zip(found, buffers, strict=True))


@pytest.mark.gpu
@not_interpreted
def test_host_memory_that_cuda_does_not_know_is_refused():
    src, dst = pools(8448, 4, 4, "cpu", "cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed"):
        copy_pages(src, slots, dst, slots)
