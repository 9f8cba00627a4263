#!/usr/bin/env python
"""Benchmarks: ceilings first, then a table, and one JSON object as the last line.

    python scripts/bench.py peer [--model DIR] [--lengths 4K,8K]           longrun and transformers in turn, on a CPU
    python scripts/bench.py llama-cpp --model FILE --python FILE           longrun and llama.cpp in turn, on a CPU
    python scripts/bench.py decode --model DIR --lengths 128K,1M           ms a token, against the bytes' floor
    python scripts/bench.py prefill --model DIR --lengths 128K [--needles 3]    reading, against the compute ceilings
    python scripts/bench.py reading --model DIR --length 3.3M [-- OPTION]    the same by longrun.chat, as it is used
    python scripts/bench.py chunks --model DIR --lengths 128K,6M --device-share 1,0.5    chunks far into a text
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
from importlib import import_module
from types import ModuleType

from longrun import cli
from longrun.arguments import COUNT, SEED, SHARE, real, whole
from longrun.hub.find import add_model_option, find_model
from longrun.paths import path_option
from longrun.units import TOKENS


def add_peer(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    add_model_option(sub)
    sub.add_argument("--lengths", default="4K,8K", help="prompt lengths in tokens (1K = 1,000)")
    sub.add_argument("--repeats", type=COUNT, default=5)
    sub.add_argument("--new-tokens", type=COUNT, default=24)
    sub.add_argument("--chunk-size", type=COUNT, default=1024)
    common.add_json_option(sub)


def add_llama_cpp(sub: argparse.ArgumentParser, common: ModuleType) -> None:
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
    common.add_json_option(sub)


def add_decode(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--lengths", default="128K,512K,1M,3.3M", help="tokens before the decoded ones")
    add_decode_options(sub)
    sub.add_argument("--peer-lengths", help="lengths at which transformers runs, too")


def add_decode_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--synthetic-cache", action="store_true", help="random cache content instead of a prefill")
    sub.add_argument("--new-tokens", type=COUNT, default=64, help="tokens timed in one repeat")
    sub.add_argument("--repeats", type=COUNT, default=3, help="repeats, one after the other in the same session")


def add_prefill(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--lengths", default="128K,512K,1M", help="tokens read")
    sub.add_argument("--peer-lengths", help="lengths at which transformers reads, too, in chunks of 16,384")
    sub.add_argument(
        "--needles", type=whole(), default=0, metavar="N", help="read a text that hides N numbers, and ask"
    )
    sub.add_argument(
        "--depth", default="0.5", metavar="D|D,D,...|spread",
        help="where the needles are hidden, 0 to 1: one depth, one a needle, or spread evenly from 0 to 1",
    )  # fmt: skip


def add_chunks(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--lengths", default="128K,1M", help="tokens of random content before the chunks")
    sub.add_argument("--shares", default="all,8%,15%", help="of the pages that are read, `all` being exact prefill")
    sub.add_argument(
        "--device-share", type=lambda text: [SHARE(part) for part in text.split(",")], default="1", metavar="S,S,...",
        help="the most of a head's pages that stand on the device; the others go to the host (default: 1)",
    )  # fmt: skip
    sub.add_argument("--chunks", type=COUNT, default=2, help="chunks that are timed, after one that is not")


def add_offload(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--length", default="1M", help="tokens before the decoded ones")
    sub.add_argument("--gpu-budget", required=True, metavar="SIZE", help='device memory, like "20 GiB"')
    sub.add_argument("--host-budget", metavar="SIZE", help="host memory (default: the budget's)")
    sub.add_argument("--compare-resident", action="store_true", help="the same tokens with every page on the device")
    add_decode_options(sub)


def add_formats(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--length", default="64K", help="tokens read")
    sub.add_argument(
        "--weight-formats", default="nf4,int4,int8", help="formats to compare with bf16; --weight-format is not used"
    )
    sub.add_argument(
        "--kv-formats", metavar="LIST", help="vary the pages instead, the first named being compared with: int4,k5v3"
    )
    sub.add_argument("--repeats", type=COUNT, default=5, help="turns of every format, after one that is not counted")


def add_kernels(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    sub.add_argument("--only", metavar="NAME,...", help="some of the kernel benchmarks (default: all)")
    sub.add_argument("--tokens", default="1,048,576", help="tokens of the past that `tiles` chooses from")
    sub.add_argument("--chunk", default="32,768", help="tokens of the chunk that `tiles` reads it for")
    sub.add_argument("--tune", action="store_true", help="`tiles` times its attention in many cuts of the work as well")
    common.add_json_option(sub)


def add_pinning(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    sub.add_argument("--gib", type=real(0, above=True), nargs="+", default=[8.0], help="sizes of the pool")
    common.add_json_option(sub)


def add_marks(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    common.add_model_options(sub)
    sub.add_argument("--length", default="64K", help="tokens of random content before the mark")
    sub.add_argument("--tokens", default="4096", help="tokens read between mark and rewind")
    sub.add_argument("--windows", default="256,4096", help="recent_size of the streaming heads")
    sub.add_argument("--repeats", type=COUNT, default=10)


def add_reading(sub: argparse.ArgumentParser, common: ModuleType) -> None:
    add_model_option(sub, default=None)
    sub.add_argument("--length", required=True, type=TOKENS, metavar="N", help="tokens of text, question and answer")
    sub.add_argument("--needles", type=COUNT, default=8, metavar="N", help="numbers hidden at even depths")
    sub.add_argument("--seed", type=SEED, default=0)
    common.add_json_option(sub)
    sub.add_argument("chat", nargs="*", metavar="-- OPTION", help="options of longrun.chat")


COMMANDS = {
    "peer": ("bench_peer", add_peer, "side by side with transformers on the CPU"),
    "llama-cpp": ("bench_llama_cpp", add_llama_cpp, "side by side with llama.cpp on the CPU"),
    "decode": ("bench_decode", add_decode, "milliseconds a token at long contexts"),
    "prefill": ("bench_prefill", add_prefill, "reading long texts"),
    "reading": ("bench_reading", add_reading, "a text read and asked about by longrun.chat, as its users run it"),
    "chunks": ("bench_chunks", add_chunks, "single chunks behind long texts, exact and sparse, with pages on the host"),
    "offload": ("bench_offload", add_offload, "decode with pages in host memory"),
    "formats": ("bench_formats", add_formats, "reading in several weight or page formats, by turns"),
    "kernels": ("bench_kernel_table", add_kernels, "every kernel alone"),
    "pinning": ("bench_pinning", add_pinning, "what a pinned host pool costs and gives"),
    "marks": ("bench_marks", add_marks, "a session's mark and rewind"),
    "real": ("bench_real", None, "a real model over real code, beside transformers"),
    "shares": ("bench_shares", None, "the hot paths' shares of their ceilings, each with its floor"),
}
"""Command -> module of scripts.bench, with `run`; what adds the options (None: the module itself); and help."""


def add_command(sub: argparse.ArgumentParser, name: str) -> None:
    """A command's options, and `run`."""
    file, add, _ = COMMANDS[name]
    module = import_module(f"scripts.bench.{file}")
    if add is None:
        module.add_options(sub)
    else:
        add(sub, import_module("scripts.bench.bench_common"))
    sub.set_defaults(run=module.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is asked for; its status. Bad input raises a LongrunError."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, _, text) in COMMANDS.items():
        add_command(commands.add_parser(name, help=text, description=text), name)
    args = parser.parse_args(argv)
    if getattr(args, "model", None) is not None:
        args.model = find_model(args.model, args.download)
    return args.run(args)
