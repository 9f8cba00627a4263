"""The tokens before a chunk, dequantized piece by piece into a fixed scratch buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from longrun.kernels.page_view import PageView
from longrun.quant.kv_format import PageFormat

Run = PageView | tuple[Tensor, Tensor]  # `limit` pages of every head, or exact keys and values [num_heads, n, head_dim]


def past_pieces(
    runs: Iterable[Run],
    num_heads: int,
    fmt: PageFormat,
    scratch: Tensor,
    dequantize: Callable[[PageView, Tensor, Tensor], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the runs' tokens in as few pieces as the scratch allows; every page is dequantized once.

    Args:
        runs: in any order; a run is used up before the next is asked for.
        scratch: [2, elements] of the compute dtype, room for at least one page of `num_heads` heads.

    Yields:
        k, v: [num_heads, n, head_dim] views of the scratch, overwritten by the next piece.
    """
    room = scratch.shape[1] // (num_heads * fmt.head_dim)
    buffer = scratch[:, : num_heads * room * fmt.head_dim].view(2, num_heads, room, fmt.head_dim)
    used, size = 0, fmt.page_size
    for run in runs:
        in_pages = isinstance(run, PageView)
        done, total = 0, run.limit * size if in_pages else run[0].shape[1]
        while done < total:
            unit = size if in_pages else 1
            take = min(total - done, (room - used) // unit * unit)
            if take == 0:
                yield buffer[0, :, :used], buffer[1, :, :used]
                used = 0
                continue
            k, v = buffer[:, :, used : used + take]
            if in_pages:
                dequantize(run.part(done // size, take // size), k, v)
            else:
                k.copy_(run[0][:, done : done + take])
                v.copy_(run[1][:, done : done + take])
            used, done = used + take, done + take
    if used:
        yield buffer[0, :, :used], buffer[1, :, :used]
