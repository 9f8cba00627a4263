"""Streaming-head attention of one token over its ring in Triton, in one launch of fixed shape.

The number of valid slots is read on the device when the kernel runs, so one captured CUDA graph serves every length.
Each query head takes `num_splits` programs, and a program takes its share of the slots as one tile, so that all its
loads are in flight at once. With more than one split, the program that finishes last merges the partial results by
log-sum-exp (as in Flash-Decoding, Dao et al., 2023) and sets its counter back for the next call.

Moves 2 * num_heads * num_valid * head_dim items of the ring, once from memory and `group` times from the L2 cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.errors import ConfigError
from longrun.kernels.overlap import overlaps

TRITON_HEAD_DIMS = (64, 128)
MAX_TILE = 512  # slots of a program
MAX_SPLITS = 65535  # of a launch
_TILE = 64  # slots of a program, where nothing else is asked for
MAX_SLOTS = MAX_SPLITS * _TILE
_MERGED_AT_ONCE = 128  # partial results, in registers


@triton.jit
def _partials(partial, split, column, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Largest scores, weights and sums of some splits; -inf, 0 and 0 beyond the last."""
    rows, held = partial + split * (HEAD_DIM + 2), split < SPLITS
    # .cg: past the L1 cache, which other multiprocessors do not write to
    top = tl.load(rows + HEAD_DIM + 1, mask=held, other=float("-inf"), cache_modifier=".cg")
    weight = tl.load(rows + HEAD_DIM, mask=held, other=0.0, cache_modifier=".cg")
    sums = tl.load(rows[:, None] + column[None, :], mask=held[:, None], other=0.0, cache_modifier=".cg")
    return top, weight, sums


@triton.jit
def _merge(partial, column, out, SPLITS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of `partial`: HEAD_DIM sums, then their weight, then the largest score, in base 2; WIDTH at a time."""
    split = tl.arange(0, WIDTH)
    if SPLITS <= WIDTH:
        top, weight, sums = _partials(partial, split, column, SPLITS, HEAD_DIM)
        share = tl.exp2(top - tl.max(top, 0))
        found = tl.sum(sums * share[:, None], 0) / tl.sum(weight * share, 0)
    else:
        best, total = tl.full([], -1e38, tl.float32), tl.zeros([], tl.float32)
        found = tl.zeros([HEAD_DIM], tl.float32)
        for first in range(0, SPLITS, WIDTH):
            top, weight, sums = _partials(partial, first + split, column, SPLITS, HEAD_DIM)
            new_best = tl.maximum(best, tl.max(top, 0))
            share, shrink = tl.exp2(top - new_best), tl.exp2(best - new_best)
            total = total * shrink + tl.sum(weight * share, 0)
            found = found * shrink + tl.sum(sums * share[:, None], 0)
            best = new_best
        found = found / total
    tl.store(out + column, found.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_slots"])
def ring_decode_kernel(
    q, ring_k, ring_v, lengths, out, partials, counters, num_slots, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (query head, split) takes slots [split * share, (split + 1) * share) of its KV head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    query = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    share = tl.cdiv(num_slots, SPLITS)
    slot, column = tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    stop = tl.minimum(tl.minimum(tl.load(lengths), num_slots), (split + 1) * share)
    held = split * share + slot < stop
    base = (query // GROUP * num_slots + split * share) * HEAD_DIM
    place = base + slot[:, None] * HEAD_DIM + column[None, :]
    keys = tl.load(ring_k + place, mask=held[:, None], other=0.0)
    values = tl.load(ring_v + place, mask=held[:, None], other=0.0)
    scaled = tl.load(q + query * HEAD_DIM + column).to(tl.float32) * scale_log2

    scores = tl.where(held, tl.sum(keys.to(tl.float32) * scaled[None, :], 1), float("-inf"))
    top = tl.maximum(tl.max(scores, 0), -1e38)  # finite, for a program without slots
    weights = tl.exp2(scores - top)
    total = tl.sum(weights, 0)
    sums = tl.sum(weights[:, None] * values.to(tl.float32), 0)
    if SPLITS == 1:
        tl.store(out + query * HEAD_DIM + column, (sums / total).to(out.dtype.element_ty))
    else:
        mine = partials + query * SPLITS * (HEAD_DIM + 2)
        row = mine + split * (HEAD_DIM + 2)
        tl.store(row + column, sums, cache_modifier=".cg")
        tl.store(row + HEAD_DIM, total)
        tl.store(row + HEAD_DIM + 1, top)
        tl.debug_barrier()  # every thread's stores, before the one thread's count
        if tl.atomic_add(counters + query, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            _merge(mine, column, out + query * HEAD_DIM, SPLITS, WIDTH, HEAD_DIM)
            tl.store(counters + query, 0)


@dataclass(frozen=True)
class RingWorkspace:
    """What the programs of one call leave for each other; calls that may run at the same time need one each.

    Attributes:
        partials: [num_qo_heads * num_splits, head_dim + 2] float32, or more rows.
        counters: [num_qo_heads] int32, or more, zeros before and after a call.
    """

    partials: Tensor
    counters: Tensor

    @classmethod
    def make(cls, num_qo_heads: int, num_splits: int, head_dim: int, device: torch.device | str) -> RingWorkspace:
        """Of the size that `ring_decode` asks for at these shapes."""
        partials = torch.zeros(num_qo_heads * num_splits, head_dim + 2, device=device)
        return cls(partials, torch.zeros(num_qo_heads, dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.partials.nbytes + self.counters.nbytes


def default_splits(num_slots: int) -> int:
    """Programs a query head, where none is given: a tile holds up to 64 slots (of 1 to 12 programs and 2 to 16 warps
    the fastest at 384 slots on an H100: 4.5 us, where 3 programs of 8 warps took 5.9)."""
    return triton.cdiv(num_slots, _TILE)


def check_ring_decode(
    q: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, out: Tensor, num_splits: int,
    workspace: RingWorkspace | None,
) -> None:  # fmt: skip
    """Raises ConfigError where the arguments do not fit together or the kernel does not serve them."""
    heads, group, dim = q.shape
    if dim not in TRITON_HEAD_DIMS:
        raise ConfigError(
            f"head_dim {dim} has no Triton streaming kernels: use a model with {TRITON_HEAD_DIMS[0]} or "
            f"{TRITON_HEAD_DIMS[1]}, or the torch backend"
        )
    if ring_k.shape != ring_v.shape or ring_k.shape[::2] != (heads, dim) or ring_k.shape[1] < 1:
        raise ConfigError(
            f"ring_k and ring_v have shapes {list(ring_k.shape)} and {list(ring_v.shape)}, q {list(q.shape)} asks for "
            f"[{heads}, 1 or more slots, {dim}]: pass the ring of this layer's streaming heads"
        )
    if out.shape != q.shape:
        raise ConfigError(f"out has shape {list(out.shape)}, q has {list(q.shape)}: make out as large as q")
    if lengths.dtype != torch.int32 or lengths.numel() != 1 or lengths.device != q.device:
        raise ConfigError(
            f"lengths is {lengths.numel()} x {lengths.dtype} on {lengths.device}: pass one int32 on {q.device}"
        )
    if ring_k.shape[1] > MAX_SLOTS:
        raise ConfigError(
            f"the kernel for streaming heads serves rings of {MAX_SLOTS:,} tokens, and sinks and window have "
            f"{ring_k.shape[1]:,}: keep fewer first tokens, or take a smaller window"
        )
    tensors = {"q": q, "ring_k": ring_k, "ring_v": ring_v, "out": out}
    if loose := [name for name, x in tensors.items() if not x.is_contiguous()]:
        raise ConfigError(f"{', '.join(loose)} not contiguous: make a contiguous copy")
    least = triton.cdiv(ring_k.shape[1], MAX_TILE)
    if not least <= num_splits <= MAX_SPLITS:
        raise ConfigError(f"num_splits {num_splits} at {ring_k.shape[1]} slots: take {least} to {MAX_SPLITS}")
    if num_splits > 1 and workspace is not None:
        rows = heads * group * num_splits
        held = workspace.partials.shape
        if held[0] < rows or held[1] != dim + 2 or workspace.counters.numel() < heads * group:
            raise ConfigError(
                f"workspace holds {list(held)}, the call asks for {[rows, dim + 2]}: "
                f"make one with RingWorkspace.make({heads * group}, {num_splits}, {dim}, ...)"
            )


def ring_decode(
    q: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, softmax_scale: float, out: Tensor,
    workspace: RingWorkspace | None = None, num_splits: int | None = None, num_warps: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of one token's streaming heads over the first `lengths` slots of the ring, in float32.

    Args:
        q: [num_heads, group, head_dim], contiguous, bfloat16, float16 or float32.
        ring_k, ring_v: [num_heads, num_slots, head_dim], contiguous, one dtype of the three; the token itself is in.
        lengths: one int32 on the device, from 1 to num_slots; read when the kernel runs. More counts as num_slots.
        softmax_scale: factor of the scores.
        out: [num_heads, group, head_dim], contiguous, any of the three dtypes; every element is written.
        workspace: for num_splits above 1 (None: made in this call). A captured graph needs one that outlives it.
        num_splits: programs a query head (None: `default_splits`).
        overlap: see `vector_linear`.

    Returns:
        out.

    Raises:
        ConfigError: head_dim other than 64 and 128, or arguments that do not fit together.
    """
    (heads, group, dim), num_slots = q.shape, ring_k.shape[1]
    num_splits = default_splits(num_slots) if num_splits is None else num_splits
    check_ring_decode(q, ring_k, ring_v, lengths, out, num_splits, workspace)
    if q.numel() == 0:
        return out
    if workspace is None:
        workspace = RingWorkspace.make(heads * group, num_splits, dim, q.device)
    overlap = overlap and overlaps(q.device)
    ring_decode_kernel[(heads * group, num_splits)](
        q, ring_k, ring_v, lengths, out, workspace.partials, workspace.counters, num_slots,
        softmax_scale * math.log2(math.e),
        GROUP=group, HEAD_DIM=dim, SPLITS=num_splits, TILE=triton.next_power_of_2(triton.cdiv(num_slots, num_splits)),
        WIDTH=min(triton.next_power_of_2(num_splits), _MERGED_AT_ONCE), num_warps=num_warps,
        PDL=overlap, launch_pdl=overlap,
    )  # fmt: skip
    return out


def ring_decode_reference(
    q: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, softmax_scale: float, out: Tensor,
    workspace: RingWorkspace | None = None, num_splits: int | None = None, num_warps: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """`ring_decode` in torch, in float32: a mask over all slots. Same arguments, the last three unused; any
    head_dim."""
    hidden = torch.arange(ring_k.shape[1], device=q.device) >= lengths
    scores = torch.einsum("hgd,hsd->hgs", q.float(), ring_k.float()) * softmax_scale
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    values = ring_v.float().masked_fill(hidden[:, None], 0)  # slots not yet written may hold anything
    return out.copy_(torch.einsum("hgs,hsd->hgd", weights, values))
