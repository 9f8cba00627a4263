"""The Triton kernels of streaming heads, alone, and torch's way of doing the same.

A row of prefill counts useful operations only: two products over the keys that a query sees; what the masks of edge
tiles waste is not work. A row of decode counts keys and values of the ring once; its calls rotate over rings of many
layers, more than the L2 cache holds. Every row is compared with the torch reference on poisoned outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longrun.kernels.banded_attention import banded_attention, plan_band
from longrun.kernels.banded_prefill import banded_prefill, banded_prefill_reference, default_config
from longrun.kernels.ring_decode import RingWorkspace, default_splits, ring_decode, ring_decode_reference
from scripts.bench.gpu_timer import gpu_times
from scripts.bench.kernel_rows import error_of, kernel_row

KV_HEADS, GROUP, HEAD_DIM, SINKS, RECENT = 4, 4, 128, 128, 256
RING_BYTES = 2**27  # of all layers, more than L2 holds
LENGTHS, START = (4096, 32768), 3_000_000  # tokens of a chunk, and where it starts
LIMIT = 6e-3  # relative error of a bfloat16 result to the float32 reference
HEADS = f"{KV_HEADS} x {GROUP} x {HEAD_DIM}"


def measure(lengths: Sequence[int] = LENGTHS, ring_bytes: int = RING_BYTES) -> Iterator[dict[str, Any]]:
    """Rows of both kernels and of what torch does in their place."""
    for tokens in lengths:
        yield from measure_prefill(tokens)
    yield from measure_decode(ring_bytes)


def useful_operations(tokens: int, start: int, heads: int, head_dim: int) -> int:
    """Two products of head_dim over every key that a query sees."""
    p = torch.arange(start, start + tokens)
    keys = (p + 1).clamp(max=RECENT) + (p + 1 - RECENT).clamp(min=0, max=SINKS)
    return 4 * heads * head_dim * int(keys.sum())


def torch_window(q: Tensor, sides: tuple, start: int) -> Callable[[], Tensor]:
    """`banded_attention` on keys and values already gathered from ring and chunk: its attention alone."""
    plan = plan_band(start, q.shape[0], SINKS, RECENT, q.dtype, q.device)
    sinks, windows = [], []
    for ring, new in sides:
        positions = torch.arange(max(start - RECENT, 0), start, device=q.device)
        slots = torch.where(positions < SINKS, positions, SINKS + (positions - SINKS) % RECENT)
        keys = torch.cat((ring[:, slots], new), dim=1)
        sinks.append(torch.cat((ring[:, : min(SINKS, start)], new[:, : max(0, plan.num_sinks - start)]), dim=1))
        windows.append(keys[:, plan.window_start - start + len(positions) :].contiguous())
    by_head = q.permute(1, 2, 0, 3)
    scale = q.shape[3] ** -0.5
    return lambda: banded_attention(by_head, *sinks, *windows, plan, scale).permute(2, 0, 1, 3)


def measure_prefill(tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of one chunk: bfloat16, views of one fused projection."""
    torch.manual_seed(tokens)
    fused = torch.randn(tokens, KV_HEADS * (GROUP + 2), HEAD_DIM, device="cuda").bfloat16()
    q, k, v = fused.split((KV_HEADS * GROUP, KV_HEADS, KV_HEADS), dim=1)
    q, k, v = q.unflatten(1, (KV_HEADS, GROUP)), k.transpose(0, 1), v.transpose(0, 1)
    rings = torch.randn(2, KV_HEADS, SINKS + RECENT, HEAD_DIM, device="cuda").bfloat16()
    inputs = (q, k, v, *rings, START, SINKS, RECENT, HEAD_DIM**-0.5)
    expected = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    banded_prefill_reference(*inputs, expected)
    shape, flops = f"{HEADS}, {tokens:,} tokens", useful_operations(tokens, START, KV_HEADS * GROUP, HEAD_DIM)
    add = partial(kernel_row, shape=shape, flops=flops, ceiling="matrix product")
    config, out = default_config(HEAD_DIM, q.dtype, q.device), torch.full_like(q, float("nan"))
    times = gpu_times(*[partial(banded_prefill, *inputs, out, config)] * max(2, 65536 // tokens))
    error = error_of(out, expected, LIMIT)
    yield add("banded_prefill", times=times, relative_error=error, settings=asdict(config), start=START)
    attend = torch_window(q, ((rings[0], k), (rings[1], v)), START)
    error = error_of(attend(), expected, LIMIT)
    yield add("torch banded_attention", times=gpu_times(attend), relative_error=error, start=START)


def measure_decode(ring_bytes: int) -> Iterator[dict[str, Any]]:
    """Rows of one token over full rings in bfloat16."""
    num_slots = SINKS + RECENT
    layers = -(-ring_bytes // (2 * KV_HEADS * num_slots * HEAD_DIM * 2))
    torch.manual_seed(num_slots)
    rings = torch.randn(layers, 2, KV_HEADS, num_slots, HEAD_DIM, device="cuda").bfloat16()
    q = torch.randn(layers, KV_HEADS, GROUP, HEAD_DIM, device="cuda").bfloat16()
    out, expected = torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
    lengths = torch.tensor([num_slots], dtype=torch.int32, device="cuda")
    scale, num_splits, num_warps = HEAD_DIM**-0.5, default_splits(num_slots), 8
    for i in range(layers):
        ring_decode_reference(q[i], *rings[i], lengths, scale, expected[i])
    space = RingWorkspace.make(KV_HEADS * GROUP, num_splits, HEAD_DIM, q.device)

    def decode(i: int) -> None:
        ring_decode(q[i], *rings[i], lengths, scale, out[i], space, num_splits, num_warps)

    def attend(i: int) -> None:
        k, v = rings[i].float()
        out[i] = torch.softmax((q[i].float() * scale) @ k.transpose(1, 2), dim=-1) @ v

    for kernel, work, settings in (
        ("ring_decode", decode, {"num_splits": num_splits, "num_warps": num_warps}), ("torch decode", attend, {}),
    ):  # fmt: skip
        out.fill_(float("nan"))
        times = gpu_times(*(partial(work, i) for i in range(layers)))
        error = error_of(out, expected, LIMIT)
        yield kernel_row(
            kernel, f"{HEADS}, {num_slots:,} slots", times, num_bytes=rings[0].nbytes, relative_error=error,
            settings=settings,
        )  # fmt: skip
