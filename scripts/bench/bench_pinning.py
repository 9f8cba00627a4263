"""What pinning the host pool costs and gives on this machine: `bench_pinning.py --gib 8 64 --json FILE`.

For every size, with and without huge pages: seconds to pin (of which in the driver's registering) and to give back, and
GB/s at which a kernel reads and writes randomly chosen pages of 8,448 bytes straight in host memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longrun.arguments import real
from longrun.cache.pinned import PIECE_BYTES, CudaRegistrar, pinned_bytes
from longrun.cli import Parser, run
from longrun.lab.report_env import environment
from longrun.paths import path_option
from scripts.bench.bench_ceilings import transfer_ceilings

PAYLOAD_BYTES = 8448  # INT4, head_dim 128
PAGES_A_CALL = 65_536


class TimedRegistrar(CudaRegistrar):
    """Adds up the seconds spent in the driver."""

    seconds = 0.0

    def register(self, address: int, size: int) -> None:
        begin = time.perf_counter()
        super().register(address, size)
        self.seconds += time.perf_counter() - begin


@triton.jit
def copy_pages(source, from_slots, target, to_slots, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: pages. Page from_slots[i] of `source` to page to_slots[i] of `target`; int32 words, int64 slots."""
    begin = tl.load(from_slots + tl.program_id(0)) * WORDS
    end = tl.load(to_slots + tl.program_id(0)) * WORDS
    at = tl.arange(0, BLOCK)
    tl.store(target + end + at, tl.load(source + begin + at, mask=at < WORDS), mask=at < WORDS)


def gigabytes_per_second(source: Tensor, from_slots: Tensor, target: Tensor, to_slots: Tensor) -> float:
    """Median of 5 calls, by CUDA events."""
    words, rates = PAYLOAD_BYTES // 4, []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        copy_pages[(len(from_slots),)](source, from_slots, target, to_slots, words, triton.next_power_of_2(words))
        stop.record()
        stop.synchronize()
        rates.append(len(from_slots) * PAYLOAD_BYTES / 1e6 / start.elapsed_time(stop))
    return statistics.median(rates[1:])


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
    num_slots = int(gib * 2**30) // PAYLOAD_BYTES
    registrar = TimedRegistrar()
    begin = time.perf_counter()
    buffer = pinned_bytes(num_slots * PAYLOAD_BYTES, registrar=registrar, huge_pages=huge_pages)
    pinned_seconds = time.perf_counter() - begin
    words = buffer.tensor.view(torch.int32)
    count = min(PAGES_A_CALL, num_slots)
    on_host = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0))[:count].cuda()
    on_device = torch.arange(count, device="cuda")
    pages = torch.randint(-(2**31), 2**31 - 1, (count * PAYLOAD_BYTES // 4,), dtype=torch.int32, device="cuda")
    back = torch.empty_like(pages)
    row = {
        "gib": gib,
        "huge_pages": huge_pages,
        "pin_s": round(pinned_seconds, 2),
        "register_s": round(registrar.seconds, 2),
        "write_gb_s": round(gigabytes_per_second(pages, on_device, words, on_host), 1),
        "read_gb_s": round(gigabytes_per_second(words, on_host, back, on_device), 1),
        "same": torch.equal(pages, back),
    }
    row["write_share"] = row["write_gb_s"] / ceilings["device_to_host_gb_s"]
    row["read_share"] = row["read_gb_s"] / ceilings["host_to_device_gb_s"]
    if buffer.nbytes > PIECE_BYTES:
        row["copies_across_pieces"] = copies_across_pieces(words)
    begin = time.perf_counter()
    del words
    buffer.close()
    del buffer
    return row | {"give_back_s": round(time.perf_counter() - begin, 2)}


def main() -> int:
    """Print one line of JSON a row, and write all of them with the environment to --json."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=real(0, above=True), nargs="+", default=[8.0], help="sizes of the pool")
    parser.add_argument("--json", type=path_option, help="file to write")
    arguments = parser.parse_args()
    rows, ceilings = [], transfer_ceilings(torch.device("cuda"))
    for gib in arguments.gib:
        for huge_pages in (True, False):
            rows.append(measure(gib, huge_pages, ceilings))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"environment": environment(), "ceilings": ceilings, "rows": rows}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    run(main)
