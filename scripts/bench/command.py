#!/usr/bin/env python
"""Benchmarks: ceilings first, then a table, and one JSON object as the last line.

    python scripts/bench.py peer [--model DIR] [--lengths 4K,8K]           longrun and transformers in turn, on a CPU
    python scripts/bench.py llama-cpp --model FILE --python FILE           longrun and llama.cpp in turn, on a CPU
    python scripts/bench.py decode --model DIR --lengths 128K,1M           ms a token, against the bytes' floor
    python scripts/bench.py prefill --model DIR --lengths 128K [--needles 3]    reading, against the compute ceilings
    python scripts/bench.py offload --model DIR --gpu-budget "20 GiB"      decode with most pages in host memory
    python scripts/bench.py formats --model DIR --length 64K               reading, by weight format, in turns
    python scripts/bench.py kernels                                        every kernel alone, in one table
    python scripts/bench.py pinning --gib 8 64                             what a pinned host pool costs and gives
    python scripts/bench.py real --model FILE                              a real model over code: all of it, in one run
    python scripts/bench.py marks --model DIR --windows 256,4096           a session's mark and rewind
    python scripts/bench.py shares                                         hot paths against floors; status 1 below one

`--synthetic-cache` fills the cache with random content instead of reading a text: rows then say "synthetic": true and
are good for timing only. `--help` of each command lists its options. Ratios of `peer` are medians over pairs of runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from longrun import cli
from longrun.arguments import COUNT, real, whole
from longrun.hub.find import add_model_option, find_model
from longrun.paths import path_option


def add_peer(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_json_option
    from scripts.bench.bench_peer import run

    add_model_option(sub)
    sub.add_argument("--lengths", default="4K,8K", help="prompt lengths in tokens (1K = 1,000)")
    sub.add_argument("--repeats", type=COUNT, default=5)
    sub.add_argument("--new-tokens", type=COUNT, default=24)
    sub.add_argument("--chunk-size", type=COUNT, default=1024)
    add_json_option(sub)
    sub.set_defaults(run=run)


def add_llama_cpp(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_json_option
    from scripts.bench.bench_llama_cpp import run

    add_model_option(sub, default=None)
    sub.add_argument(
        "--python", required=True, type=path_option, metavar="FILE",
        help="interpreter of an environment with llama-cpp-python",
    )  # fmt: skip
    sub.add_argument("--lengths", default="1K,8K,30K", help="prompt lengths in tokens (1K = 1,000)")
    sub.add_argument("--weight-formats", default="int4,int8,fp32", help="longrun's, one after the other")
    sub.add_argument("--repeats", type=COUNT, default=3)
    sub.add_argument("--new-tokens", type=COUNT, default=32)
    sub.add_argument("--chunk-size", type=COUNT, default=1024)
    add_json_option(sub)
    sub.set_defaults(run=run)


def add_decode(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_model_options
    from scripts.bench.bench_decode import run

    add_model_options(sub)
    sub.add_argument("--lengths", default="128K,512K,1M,3.3M", help="tokens before the decoded ones")
    add_decode_options(sub)
    sub.add_argument("--peer-lengths", help="lengths at which transformers runs, too")
    sub.set_defaults(run=run)


def add_decode_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--synthetic-cache", action="store_true", help="random cache content instead of a prefill")
    sub.add_argument("--new-tokens", type=COUNT, default=64, help="tokens timed in one repeat")
    sub.add_argument("--repeats", type=COUNT, default=3, help="repeats, one after the other in the same session")


def add_prefill(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_model_options
    from scripts.bench.bench_prefill import run

    add_model_options(sub)
    sub.add_argument("--lengths", default="128K,512K,1M", help="tokens read")
    sub.add_argument("--peer-lengths", help="lengths at which transformers reads, too, in chunks of 16,384")
    sub.add_argument(
        "--needles", type=whole(), default=0, metavar="N", help="read a text that hides N numbers, and ask"
    )
    sub.add_argument(
        "--depth", default="0.5", metavar="D|D,D,...|spread",
        help="where the needles are hidden, 0 to 1: one depth, one a needle, or spread evenly from 0 to 1",
    )  # fmt: skip
    sub.set_defaults(run=run)


def add_offload(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_model_options
    from scripts.bench.bench_offload import run

    add_model_options(sub)
    sub.add_argument("--length", default="1M", help="tokens before the decoded ones")
    sub.add_argument("--gpu-budget", required=True, metavar="SIZE", help='device memory, like "20 GiB"')
    sub.add_argument("--host-budget", metavar="SIZE", help="host memory (default: the budget's)")
    sub.add_argument("--compare-resident", action="store_true", help="the same tokens with every page on the device")
    add_decode_options(sub)
    sub.set_defaults(run=run)


def add_formats(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_model_options
    from scripts.bench.bench_formats import run

    add_model_options(sub)
    sub.add_argument("--length", default="64K", help="tokens read")
    sub.add_argument(
        "--weight-formats", default="nf4,int4,int8", help="formats to compare with bf16; --weight-format is not used"
    )
    sub.add_argument(
        "--kv-formats", metavar="LIST", help="vary the pages instead, the first named being compared with: int4,k5v3"
    )
    sub.add_argument("--repeats", type=COUNT, default=5, help="turns of every format, after one that is not counted")
    sub.set_defaults(run=run)


def add_kernels(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_json_option
    from scripts.bench.bench_kernel_table import run

    sub.add_argument("--only", metavar="NAME,...", help="some of the kernel benchmarks (default: all)")
    add_json_option(sub)
    sub.set_defaults(run=run)


def add_pinning(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_json_option
    from scripts.bench.bench_pinning import run

    sub.add_argument("--gib", type=real(0, above=True), nargs="+", default=[8.0], help="sizes of the pool")
    add_json_option(sub)
    sub.set_defaults(run=run)


def add_marks(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_common import add_model_options
    from scripts.bench.bench_marks import run

    add_model_options(sub)
    sub.add_argument("--length", default="64K", help="tokens of random content before the mark")
    sub.add_argument("--tokens", default="4096", help="tokens read between mark and rewind")
    sub.add_argument("--windows", default="256,4096", help="recent_size of the streaming heads")
    sub.add_argument("--repeats", type=COUNT, default=10)
    sub.set_defaults(run=run)


def add_shares(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_shares import add_options

    add_options(sub)


def add_real(sub: argparse.ArgumentParser) -> None:
    from scripts.bench.bench_real import add_options

    add_options(sub)


COMMANDS = {
    "peer": (add_peer, "side by side with transformers on the CPU"),
    "llama-cpp": (add_llama_cpp, "side by side with llama.cpp on the CPU"),
    "decode": (add_decode, "milliseconds a token at long contexts"),
    "prefill": (add_prefill, "reading long texts"),
    "offload": (add_offload, "decode with pages in host memory"),
    "formats": (add_formats, "reading in several weight or page formats, by turns"),
    "kernels": (add_kernels, "every kernel alone"),
    "pinning": (add_pinning, "what a pinned host pool costs and gives"),
    "marks": (add_marks, "a session's mark and rewind"),
    "real": (add_real, "a real model over real code, beside transformers"),
    "shares": (add_shares, "the hot paths' shares of their ceilings, each with its floor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is asked for. Status 0; bad input raises a LongrunError."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    if getattr(args, "model", None) is not None:
        args.model = find_model(args.model, args.download)
    return args.run(args)
