"""The fused Triton kernels, alone, in Llama-3-8B's shapes.

Every input and output byte counts once; of a page copy over the link, bytes moved once. Everything that is timed is
compared with its torch reference on the same tensors. `torch_microseconds` is the time of what the decoder runs without
the kernel, `speedup` how many times longer it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.kernels.dense_attention import merge_partial
from longrun.kernels.merge_partial import merge_into, merge_into_reference, merge_partial_, merge_partial_reference
from longrun.kernels.page_copy import copy_pages, fetch_pages, fetch_pages_reference
from longrun.kernels.page_view import PageView, view_of_all
from longrun.kernels.rope_store import rope_store, rope_store_reference
from longrun.kernels.rotary import rotary_, rotary_reference
from longrun.kernels.silu_mul import silu_mul_, silu_mul_reference
from longrun.model.rope import apply_rope_, signed_sin
from longrun.quant.kv_format import PageFormat
from longrun.quant.rotation import random_signs
from scripts.bench.gpu_timer import Times, gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row

LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM, WIDTH = 32, 32, 8, 128, 14336  # Llama-3-8B
PAYLOAD = 8448  # an INT4 page of head_dim 128
BF16_LIMIT = 4e-3  # relative error: two roundings of bfloat16 that differ
PROGRAMS = (8, 16, 32, 64, 132)
Rows = Iterator[dict[str, Any]]


def measure(tokens: int = 8192, merged_rows: int = 4 * 131072, pool_gib: float = 2.0) -> Rows:
    """Rows of all fused kernels: `tokens` of a prefill chunk, rows of a merge, size of the page pool on each side."""
    torch.manual_seed(0)
    yield from measure_rope_store()
    yield from measure_rotary(tokens)
    yield from measure_silu_mul(tokens)
    yield from measure_merge(merged_rows)
    torch.cuda.empty_cache()
    yield from measure_pages(pool_gib)


def against_torch(torch_times: Times, times: Times) -> dict[str, float]:
    return {"torch_microseconds": 1e6 * torch_times.seconds, "speedup": torch_times.seconds / times.seconds}


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    turn = torch.rand(tokens, HEAD_DIM // 2, dtype=torch.float64, device="cuda") * 6.2832
    cos, sin = (f(turn).float().repeat(1, 2) for f in (torch.cos, torch.sin))
    return cos, sin


def measure_rope_store() -> Rows:
    """One token: a launch a layer, every layer with its own projection and cache, half of the heads retrieval: without
    rotation, with that of keys, as decode over INT4 pages runs, and with that of values as well, as over k5v3 pages."""
    half, bf16 = KV_HEADS // 2, torch.bfloat16
    cos, sin = angles(1)
    slots = torch.tensor([37, 211], device="cuda")
    layers = []
    for _ in range(LAYERS):
        qkv = torch.randn((QO_HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=bf16, device="cuda")
        q_out = torch.full((QO_HEADS, HEAD_DIM), float("nan"), dtype=bf16, device="cuda")
        caches = [torch.zeros(half, n, HEAD_DIM, dtype=bf16, device="cuda") for n in (64, 64, 1088, 1088)]
        layers.append([qkv, cos[0], sin[0], q_out, *caches])
    moved = 2 * 2 * layers[0][0].numel() + 4 * HEAD_DIM
    signs = random_signs(HEAD_DIM).cuda()
    rotations = {"": {}, ", rotated": {"signs": signs}, ", values rotated": {"signs": signs, "rotate_values": True}}
    for name, rotation in rotations.items():
        expected = [x.clone() for x in layers[-1]]
        rope_store_reference(*expected, slots, QO_HEADS, **rotation)
        times = gpu_times(*(partial(rope_store, *layer, slots, QO_HEADS, **rotation) for layer in layers))
        for found, wanted in zip(layers[-1][3:], expected[3:], strict=True):
            error_of(found, wanted, BF16_LIMIT)
        num_bytes = moved + (4 * HEAD_DIM if rotation else 0)
        yield kernel_row("rope_store", f"1 token, {LAYERS} layers in a graph{name}", times, num_bytes=num_bytes)


def measure_rotary(tokens: int) -> Rows:
    """Several chunks in turn, so that none stands in the L2 cache."""
    turned = QO_HEADS + KV_HEADS
    cos, sin = angles(tokens)
    signed = signed_sin(sin)
    wide = torch.randn(4, tokens, turned + KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    views = [x[:, :turned] for x in wide]
    theirs = gpu_times(*(partial(apply_rope_, x, cos[:, None], signed[:, None]) for x in views))
    expected, found = views[0].clone(), views[0].clone()
    error_of(rotary_(found, cos, sin), rotary_reference(expected, cos, sin), BF16_LIMIT)
    times = gpu_times(*(partial(rotary_, x, cos, sin) for x in views))
    assert wide.isfinite().all()
    moved = 2 * 2 * tokens * turned * HEAD_DIM + 4 * tokens * HEAD_DIM
    shape = f"[{tokens}, {turned}, {HEAD_DIM}] bf16"
    yield kernel_row("rotary_", shape, times, num_bytes=moved, **against_torch(theirs, times))


def measure_silu_mul(tokens: int) -> Rows:
    """The gate is restored before every call: applied again and again it would run to zeros."""
    given = torch.randn(tokens, 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
    work = given.clone()
    restore = partial(work.copy_, given)
    theirs = gpu_times(partial(silu_mul_reference, work), prepare=restore)
    times = gpu_times(partial(silu_mul_, work), prepare=restore)
    part = slice(-256, None)
    expected = F.silu(given[part, :WIDTH].float()) * given[part, WIDTH:].float()
    error_of(work[part, :WIDTH], expected, BF16_LIMIT)
    moved, shape = 2 * 3 * tokens * WIDTH, f"[{tokens}, 2 x {WIDTH}] bf16"
    yield kernel_row("silu_mul_", shape, times, num_bytes=moved, **against_torch(theirs, times))


def measure_merge(count: int) -> Rows:
    given = torch.randn(count, HEAD_DIM, device="cuda")
    other = torch.randn(count, HEAD_DIM, device="cuda").bfloat16()
    lse, other_lse = torch.randn(2, count, device="cuda")
    out, total = given.clone(), lse.clone()

    def restore() -> None:
        out.copy_(given)
        total.copy_(lse)

    theirs = gpu_times(partial(merge_partial, out, total, other, other_lse), prepare=restore)
    expected = given.clone(), lse.clone()
    merge_partial_reference(*expected, other, other_lse)
    times = gpu_times(partial(merge_partial_, out, total, other, other_lse), prepare=restore)
    error_of(out, expected[0], 1e-5)
    error_of(total, expected[1], 1e-5)
    shape, moved = f"[{count}, {HEAD_DIM}] and bf16", count * (HEAD_DIM * (4 + 4 + 2) + 12)
    yield kernel_row("merge_partial_", shape, times, num_bytes=moved, **against_torch(theirs, times))
    tokens = count // 4
    final = torch.full((tokens, 4, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    split = [x.view(4, tokens, *x.shape[1:]) for x in (given, lse, other, other_lse)]
    merge_into_reference(*split, wanted := torch.empty(4, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda"))
    times = gpu_times(partial(merge_into, *split, final))
    error_of(final, wanted, BF16_LIMIT)
    moved = count * (HEAD_DIM * (4 + 2 + 2) + 8)
    yield kernel_row("merge_into", shape + ", transposed", times, num_bytes=moved)


def host_view(host: Tensor, heads: int, count: int | None = None) -> tuple[PageView, Tensor, Tensor]:
    """A view of `count` pages of each head (all that the memory holds) at random slots of host memory, with a buffer
    and a table for fetching them."""
    slots = len(host)
    table = torch.randperm(slots, device="cuda").int()
    table = table[: heads * (count or slots // heads)].view(heads, -1)
    fmt = PageFormat("int4", 64, HEAD_DIM)
    index = torch.zeros(*table.shape, 2, HEAD_DIM, dtype=torch.float16, device="cuda")
    nothing = torch.zeros(0, PAYLOAD, dtype=torch.uint8, device="cuda")
    view = view_of_all(nothing, table, index, fmt, other=host, other_slot=0, limit=table.shape[1])
    buffer = torch.full((table.numel(), PAYLOAD), 0xAA, dtype=torch.uint8, device="cuda")
    return view, buffer, torch.empty_like(table)


def measure_pages(pool_gib: float) -> Rows:
    """Scattered pages within the device, to it (`fetch_pages`, whose source is the host's pool) and from it."""
    slots = int(pool_gib * 2**30) // PAYLOAD
    heads, per_round = KV_HEADS, min(4096, slots // KV_HEADS)
    count = heads * per_round
    pool = torch.randint(0, 256, (slots, PAYLOAD), dtype=torch.uint8, device="cuda")
    host = torch.empty(slots, PAYLOAD, dtype=torch.uint8, pin_memory=True)
    host.copy_(pool)
    view, buffer, entered = host_view(host, heads, per_round)
    table, fetch = view.table, partial(fetch_pages, view, buffer, entered, per_round)
    wanted, moved, shape = buffer.clone(), count * PAYLOAD, f"{count} pages of {PAYLOAD} bytes"
    fetch_pages_reference(view, wanted, torch.empty_like(table), per_round)
    order = torch.arange(count, dtype=torch.int32, device="cuda")
    times = gpu_times(*[partial(copy_pages, pool, table, buffer, order)] * 4)
    assert torch.equal(buffer, wanted), "the timed kernel copied other bytes"
    theirs = gpu_times(*[lambda: torch.index_select(pool, 0, table.flatten(), out=buffer)] * 4)
    yield kernel_row("copy_pages device", shape, times, num_bytes=2 * moved, **against_torch(theirs, times))
    for programs in PROGRAMS:
        buffer.fill_(0xAA)
        times = gpu_times(partial(fetch, num_programs=programs))
        assert torch.equal(buffer, wanted), "the timed kernel fetched other bytes"
        settings = {"num_programs": programs}
        yield kernel_row(
            "fetch_pages", shape, times, num_bytes=moved, ceiling="host_to_device", settings=settings
        )  # fmt: skip
    for programs in PROGRAMS:
        host.fill_(0xAA)
        times = gpu_times(partial(copy_pages, buffer, order, host, table, num_programs=programs))
        assert torch.equal(host[table.flatten().long().cpu()], wanted.cpu()), "the timed kernel wrote other bytes"
        settings = {"num_programs": programs}
        yield kernel_row(
            "copy_pages to host", shape, times, num_bytes=moved, ceiling="device_to_host", settings=settings
        )  # fmt: skip
    view.counts.fill_(0)
    for programs in PROGRAMS:
        idle = partial(fetch, num_programs=programs)
        settings = {"num_programs": programs}
        yield kernel_row("fetch_pages of nothing", "0 pages", gpu_times(*[idle] * 32), num_bytes=0, settings=settings)
