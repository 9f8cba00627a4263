"""Sessions whose pages hold what a simulated format would give back, in the runtime's own bf16 cache.

A page is put onto the format's grid and taken off it again at the moment it is finished, where an INT4 cache would
quantize it, and is stored as bf16: attention, paging, rewinding and offloading are those of `kv_format` bf16, on a CPU
as on a GPU. The exceptions are those of INT4 pages: sink page and tail stay exact, and a running chunk sees
its own keys exact. Rings of streaming heads are exact in every format.

INT4 pages hold rotated keys and are read with rotated queries; here keys are rotated, put onto the grid and rotated
back, which gives the same scores. The rotation here is orthogonal; that of INT4 pages is the same where head_dim is a
square, and sqrt(2) smaller where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrun.cache.dual import DualCache
from longrun.cache.page_movers import TorchPageMover
from longrun.cache.pool import PagePool
from longrun.errors import InputError
from longrun.lab.quality.formats import SimulatedFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import exact_dtype
from longrun.quant.rotation import ROTATION_SEED, hadamard_rotation
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session

STORED_AS = "bf16"  # the page format that simulated pages are held in
SINK_PAGES = 1  # stays exact, as in INT4 caches
_PAGES_AT_ONCE = 64  # a head; bounds the float32 temporaries of a long chunk


def make_session(runtime: Runtime, fmt: SimulatedFormat, capacity: int) -> Session:
    """An empty session whose finished pages go through `fmt`. It cannot be saved.

    Raises:
        InputError: the runtime's pages are not bf16, or the format rotates and head_dim is no power of two.
        PlanError: the bf16 pages do not fit in the budget.
    """
    if runtime.plan.kv_format != STORED_AS:
        raise InputError(
            f"{fmt.name} is simulated in {STORED_AS} pages and the model was loaded with kv_format "
            f"{runtime.plan.kv_format}: load it with kv_format {STORED_AS}"
        )
    rotation = hadamard_rotation(runtime.config.head_dim, ROTATION_SEED) if fmt.rotates else None
    session = runtime.new_session(capacity)
    mover = SimulatingMover(fmt, None if rotation is None else rotation.to(session.cache.device))
    for pages, _ in session.cache.layers:
        if pages is not None:
            pages.mover = mover
    session.forbid_saving(f"its pages simulate {fmt.name}, which the session format cannot say")
    return session


class SimulatingMover(TorchPageMover):
    """Stores finished pages as a simulated format would give them back; copies and fetches as any other pages.

    Args:
        fmt: the format.
        rotation: float32 [head_dim, head_dim] on the pages' device where the format rotates, else None.
    """

    def __init__(self, fmt: SimulatedFormat, rotation: Tensor | None) -> None:
        assert (rotation is not None) == fmt.rotates
        self.simulated, self._rotation = fmt, rotation

    def quantize(
        self, k: Tensor, v: Tensor, pool: PagePool, slots: Tensor, index: Tensor | None, first: int, fmt: PageFormat
    ) -> None:
        """See `PageMover.quantize`; `fmt` is the exact format that the pages are stored in."""
        assert fmt.name == STORED_AS and index is None
        exact, dtype = max(0, SINK_PAGES - first), exact_dtype(fmt)
        if exact:
            super().quantize(k[:, :exact], v[:, :exact], pool, slots[:, :exact], None, first, fmt)
        for begin in range(exact, k.shape[1], _PAGES_AT_ONCE):
            part = slice(begin, begin + _PAGES_AT_ONCE)
            dk, dv = simulate_pages(k[:, part], v[:, part], self.simulated, self._rotation)
            super().quantize(dk.to(dtype), dv.to(dtype), pool, slots[:, part], None, first + begin, fmt)


def simulate_pages(k: Tensor, v: Tensor, fmt: SimulatedFormat, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
    """Full pages as `fmt` gives them back, float32 [..., page_size, head_dim] each.

    Args:
        k, v: [..., page_size, head_dim], any float dtype, finite; keys after RoPE.
        rotation: float32 [head_dim, head_dim], orthogonal; used where the format rotates, None if it does not.
    """
    key_dim = -2 if fmt.keys_per == "channel" else -1
    return (
        _through_grid(k, key_dim, fmt.key_bits, rotation if fmt.rotate_keys else None),
        _through_grid(v, -1, fmt.value_bits, rotation if fmt.rotate_values else None),
    )


def _through_grid(x: Tensor, dim: int, bits: int, rotation: Tensor | None) -> Tensor:
    """Rotated, quantized along `dim`, dequantized, rotated back: float32.

    The grid is `quant.page_codec`'s with 2^bits levels: asymmetric, steps counted from the float16 minimum in float16
    scales.
    """
    x = x.float()
    if rotation is not None:
        x = x @ rotation
    low, high = x.aminmax(dim=dim, keepdim=True)
    minimum = low.half().float()
    scale = ((high - minimum) / (2**bits - 1)).clamp_min(0).half().float()
    steps = ((x - minimum) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, 2**bits - 1)
    found = minimum + scale * steps
    return found if rotation is None else found @ rotation.T


def computed_bytes(cache: DualCache, fmt: SimulatedFormat) -> int:
    """Bytes that a cache in `fmt` would have in use for the tokens of `cache`, which holds bf16 pages.

    Counted as an INT4 cache's bytes in use are measured: finished pages with scales and table entries, sink pages and
    tails whole, ring slots that hold a token.
    """
    total = 0
    for pages, ring in cache.layers:
        if pages is not None:
            own = pages.fmt
            quantized = max(0, pages.num_pooled - SINK_PAGES)
            page = fmt.page_bytes(own.page_size, own.head_dim) + pages.places.table.itemsize
            total += pages.num_heads * (quantized * page + (SINK_PAGES + 1) * own.exact_page_bytes)
        if ring is not None and ring.num_slots:
            total += ring.nbytes // ring.num_slots * min(ring.num_slots, cache.seq_len)
    return total
