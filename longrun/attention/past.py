"""The tokens before a chunk, dequantized piece by piece into a fixed scratch buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from longrun.kernels.page_view import ExactRun, PageRun
from longrun.quant.kv_format import PageFormat


def past_pieces(
    runs: Iterable[PageRun | ExactRun],
    num_heads: int,
    fmt: PageFormat,
    scratch: Tensor,
    dequantize: Callable[[PageRun, Tensor, Tensor], None],
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
        done, total = 0, run.num_tokens if isinstance(run, ExactRun) else run.count * size
        while done < total:
            unit = 1 if isinstance(run, ExactRun) else size
            take = min(total - done, (room - used) // unit * unit)
            if take == 0:
                yield buffer[0, :, :used], buffer[1, :, :used]
                used = 0
                continue
            k, v = buffer[:, :, used : used + take]
            if isinstance(run, ExactRun):
                k.copy_(run.k[:, done : done + take])
                v.copy_(run.v[:, done : done + take])
            else:
                dequantize(run.part(done // size, take // size), k, v)
            used, done = used + take, done + take
    if used:
        yield buffer[0, :, :used], buffer[1, :, :used]
