"""What pinning the host pool costs and gives on this machine, by its size, with and without huge pages.

Seconds to pin (of which in the driver's registering) and to give back, and GB/s at which a kernel reads and writes
randomly chosen pages straight in host memory, compared with one large pinned copy in the same direction.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longrun.cache.pinned import PIECE_BYTES, CudaRegistrar, pinned_bytes
from scripts.bench.bench_common import check_device, figure, finish_timed, percent, save
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.gpu_timer import gpu_times

PAYLOAD_BYTES = 8448  # INT4, head_dim 128
PAGES_A_CALL = 65_536


class TimedRegistrar(CudaRegistrar):
    """Adds up the seconds spent in the driver."""

    seconds = 0.0

    def register(self, address: int, size: int) -> None:
        begin = time.perf_counter()
        super().register(address, size)
        self.seconds += time.perf_counter() - begin


def copies_across_pieces(words: Tensor) -> bool:
    """Whether one cudaMemcpy may cross from one registered piece into the next."""
    middle = PIECE_BYTES // 4
    try:
        return torch.equal(words[middle - 1000 : middle + 1000].to("cuda").cpu(), words[middle - 1000 : middle + 1000])
    except RuntimeError as error:
        print(f"a copy across two pieces fails: {str(error).splitlines()[0]}", file=sys.stderr)
        return False


def measure(gib: float, huge_pages: bool, ceilings: dict[str, Any]) -> dict[str, Any]:
    """One row; the shares are those of one large pinned copy in the same direction."""
    from longrun.kernels.page_copy import copy_pages  # needs Triton, which other commands of bench.py do without

    num_slots = int(gib * 2**30) // PAYLOAD_BYTES
    registrar = TimedRegistrar()
    begin = time.perf_counter()
    buffer = pinned_bytes(num_slots * PAYLOAD_BYTES, registrar=registrar, huge_pages=huge_pages)
    pinned_seconds = time.perf_counter() - begin
    pool = buffer.tensor.view(num_slots, PAYLOAD_BYTES)
    count = min(PAGES_A_CALL, num_slots)
    on_host = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0))[:count].int().cuda()
    on_device = torch.arange(count, dtype=torch.int32, device="cuda")
    pages = torch.randint(0, 256, (count, PAYLOAD_BYTES), dtype=torch.uint8, device="cuda")
    back = torch.empty_like(pages)
    written = gpu_times(partial(copy_pages, pages, on_device, pool, on_host), captured=False)
    read = gpu_times(partial(copy_pages, pool, on_host, back, on_device), captured=False)
    assert torch.equal(pages, back), "the timed kernel moved other bytes"
    write_gb_s, read_gb_s = (pages.nbytes / times.seconds / 1e9 for times in (written, read))
    row = {
        "gib": gib, "huge_pages": huge_pages, "pin_s": pinned_seconds, "register_s": registrar.seconds,
        "write_gb_s": write_gb_s, "write_share": write_gb_s / ceilings["device_to_host_gb_s"],
        "read_gb_s": read_gb_s, "read_share": read_gb_s / ceilings["host_to_device_gb_s"],
    }  # fmt: skip
    if buffer.nbytes > PIECE_BYTES:
        row["copies_across_pieces"] = copies_across_pieces(buffer.tensor.view(torch.int32))
    begin = time.perf_counter()
    del pool
    buffer.close()
    del buffer
    return row | {"give_back_s": time.perf_counter() - begin}


def run(args: argparse.Namespace) -> int:
    """The command `pinning`."""
    device, rows = check_device("cuda"), []
    ceilings = measure_ceilings(device, "transfer")
    result = {"benchmark": "pinning", "ceilings": ceilings, "rows": rows}
    for gib, huge_pages in product(args.gib, (True, False)):
        rows.append(measure(gib, huge_pages, ceilings))
        save(result, args)
    table = Table("GiB", "huge pages", "s to pin", "in the driver", "to give back", "GB/s read", "", "GB/s written", "")
    for row in rows:
        table.add_row(
            figure(row["gib"], 1), "yes" if row["huge_pages"] else "no",
            *(figure(row[key]) for key in ("pin_s", "register_s", "give_back_s")),
            figure(row["read_gb_s"], 1), percent(row["read_share"]),
            figure(row["write_gb_s"], 1), percent(row["write_share"]),
        )  # fmt: skip
    Console(width=120).print(table)
    return finish_timed(result, args)
