"""RoPE of a chunk, and of a token that is stored: interpreted, compiled for sm_80 and sm_90, and on a GPU (`-m gpu`).

How the interpreted tests run: interpreted.py.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreted import INTERPRETED, LIMIT, accesses, compiled, error, interpreted_tests, not_interpreted, same_bits

from longrun.errors import ConfigError
from longrun.model.rope import apply_rope_, signed_sin

pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels.rope_store import rope_store, rope_store_kernel, rope_store_reference
from longrun.kernels.rotary import rotary_, rotary_kernel, rotary_reference
from longrun.quant.rotation import random_signs, rotation_of, rotation_scales

NAN = float("nan")


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


def rotated(turned, qo, retrieval, kv, signs):
    """Query and key heads [qo + kv, dim] with those of retrieval heads rotated, in float64."""
    found = turned.double()
    for_queries, for_keys = (matrix.double() for matrix in rotation_of(signs))
    queries, keys = found[: retrieval * (qo // kv)], found[qo : qo + retrieval]
    queries.copy_(queries @ for_queries)
    keys.copy_(keys @ for_keys)
    return found


def check_token(qo, retrieval, streaming, dim, dtype, cache, norm, device="cpu", rotate=False, values=False):
    given, norms = token_case(qo, retrieval, streaming, dim, dtype, cache, norm, device)
    if rotate:
        norms |= {"signs": random_signs(dim, seed=dim).to(device), "rotate_values": values}
    slots = torch.tensor([37, 18], device=device)
    actual, reference = fresh(given), fresh(given)
    rope_store(*actual, slots, qo, **norms)
    rope_store_reference(*reference, slots, qo, **norms)
    assert same_bits(actual[0], given[0])
    kv = retrieval + streaming
    heads = given[0].view(1, -1, dim)
    weights = (norms["q_norm"], norms["k_norm"]) if norm else None
    turned = decoder_turn(heads[:, : qo + kv], given[1][None], given[2][None], weights, qo, 1e-5)[0]
    if rotate:
        plain, turned = turned, rotated(turned, qo, retrieval, kv, norms["signs"])
        assert retrieval == 0 or error(turned, plain) > 0.5  # streaming heads are some of them
    k, v = turned[qo:].to(cache), heads[0, qo + kv :]
    if values:
        v = torch.cat((v[:retrieval].double() @ rotation_of(norms["signs"])[1].double(), v[retrieval:].double()))
    v = v.to(cache)
    exact = not norm and not (rotate and retrieval) and torch.bfloat16 not in (dtype, cache) and device == "cpu"
    limit = max(LIMIT[dtype], LIMIT[cache]) * (1.5 if rotate and INTERPRETED else 1)  # one rounding more
    outs = [(actual[3], turned[:qo], limit)]
    for place, part, slot in ((4, slice(0, retrieval), 37), (6, slice(retrieval, kv), 18)):
        if given[place] is None:
            continue
        for side, whole, bound in ((0, k, limit), (1, v, limit if values else 0.0 if dtype == cache else LIMIT[cache])):
            found = actual[place + side]
            outs.append((found[:, slot], whole[part], bound))
            assert found.isnan().sum() == found.numel() - found[:, slot].numel()  # nothing else was written
            assert same_bits(reference[place + side].isnan(), found.isnan())
            assert not exact or same_bits(found[:, slot], reference[place + side][:, slot])
    for found, expected, bound in outs:
        assert error(found, expected) <= bound
        assert bound == 0 or not rotate or max(error(*pair) for pair in zip(found, expected, strict=True)) < 1.5 * bound
    assert error(reference[3], actual[3]) <= limit
    assert not exact or same_bits(actual[3], reference[3])


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

    @pytest.mark.parametrize(
        ("dtype", "cache"),
        [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
         (torch.float32, torch.bfloat16)],
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("qo", "retrieval", "streaming", "dim", "norm"),
        [(9, 2, 1, 64, True), (9, 0, 3, 128, False), (4, 1, 0, 64, False), (32, 3, 5, 128, True), (8, 8, 0, 128, False),
         (3, 2, 1, 16, True), (6, 1, 1, 32, False), (2, 1, 0, 256, False)],
    )  # fmt: skip
    def test_interpreted_rope_store_rotates_retrieval_heads(qo, retrieval, streaming, dim, norm, dtype, cache):
        check_token(qo, retrieval, streaming, dim, dtype, cache, norm, rotate=True)
        if dtype == cache:
            check_token(qo, retrieval, streaming, dim, dtype, cache, norm, rotate=True, values=True)


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 105


@not_interpreted
def test_shapes_that_are_not_served_are_refused():
    for dim, dtype, word in ((80, torch.float32, "head_dim 80"), (64, torch.float64, "float64")):
        given, _ = token_case(4, 1, 1, dim, dtype, torch.float32, False)
        with pytest.raises(ConfigError, match=word):
            rope_store(*given, torch.zeros(2, dtype=torch.int64), 4)
        with pytest.raises(ConfigError, match=word):
            rotary_(torch.zeros(3, 2, dim, dtype=dtype), *tables(3, dim))


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("item", ["bf16", "fp32"])
def test_rope_kernels_compile_without_a_gpu(item, capability):
    of, size = f"*{item}", {"bf16": 2, "fp32": 4}[item]
    angles = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    for norm, dim in ((False, 128), (True, 128), (True, 64)):
        pointers = angles | dict.fromkeys(("heads_ptr", "weight_a_ptr", "weight_b_ptr"), of)
        constants = {"D": dim, "BLOCK": 2048 // dim, "NORM": norm}
        ptx = compiled(rotary_kernel, capability, pointers, constants, 4, ("token_stride", "head_stride"))
        stores = [number for kind, number in accesses(ptx) if kind == "st"]
        assert stores and set(stores) == {16}
        names = ("qkv", "q_out", "tail_k", "tail_v", "ring_k", "ring_v", "q_norm", "k_norm")
        pointers = angles | {f"{name}_ptr": of for name in names} | {"slots_ptr": "*i64", "signs_ptr": "*fp32"}
        for rotate, values in ((False, False), (True, False), (True, True)):
            scales = dict(zip(("QUERY_SCALE", "KEY_SCALE"), rotation_scales(dim), strict=True))
            constants = scales | {"D": dim, "NORM": norm, "ROTATE": rotate, "VALUES": values, "PDL": capability >= 90}
            ptx = compiled(rope_store_kernel, capability, pointers, constants, 1, ("tail_stride", "ring_stride"))
            assert {number for kind, number in accesses(ptx) if kind == "st"} == {dim // 2 // 32 * size}
            loads = [number for kind, number in accesses(ptx) if kind == "ld"]
            assert loads.count(dim // 2 // 32 * 4) >= (4 if rotate else 2)  # cos, sin and both halves of the signs
            if capability >= 90:  # nothing is read before the kernel that went before has ended
                assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
            assert "local" not in ptx, "registers are spilled"


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
    check_token(qo, retrieval, streaming, dim, dtype, cache, norm, "cuda", rotate=True)
    check_token(qo, retrieval, streaming, dim, dtype, cache, norm, "cuda", rotate=True, values=True)


@pytest.mark.gpu
@not_interpreted
def test_a_captured_rope_store_follows_slots_angles_and_projection():
    given, norms = token_case(32, 3, 5, 128, torch.bfloat16, torch.bfloat16, True, "cuda", ring=320)
    norms["signs"] = random_signs(128).cuda()
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
def test_rotary_beyond_two_billion_elements():
    """Rows on both sides of 2**31 elements."""
    far = 2**31 + 256
    room = torch.empty(far + 2 * 4096, dtype=torch.bfloat16, device="cuda")
    rows = torch.as_strided(room, (2, 4096), (far, 1)).copy_(torch.randn(2, 4096))
    expected, cos, sin = rows.clone(), *tables(2, 128, device="cuda")
    rotary_(rows.unflatten(1, (32, 128)), cos, sin)
    rotary_reference(expected.view(2, 32, 128), cos, sin)
    assert error(rows, expected) < LIMIT[torch.bfloat16]
