"""longrun and transformers on a CPU, taking turns in one process, so that a machine that drifts drifts for both."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import longrun
from longrun.hub.names import model_name
from longrun.model.adapter_merge import load_merged
from longrun.model.demo import demo_model
from longrun.patterns.head_map import HeadMap
from longrun.units import format_bytes, format_tokens, parse_tokens
from scripts.bench.bench_common import finish_timed, percent
from scripts.bench.bench_decode import token_bytes
from scripts.bench.bench_prefill import prefill_flops
from scripts.bench.ceilings import measure_ceilings


@dataclass
class Row:
    """One runner at one length; times are medians, ratios are longrun's speed over transformers' (above 1: faster).
    `prefill_of_product`: of the speed of a float32 product; `decode_of_memory`: of the time the fewest bytes take."""

    runner: str
    length: int
    prefill_tokens_per_s: float
    decode_ms: float
    prefill_of_product: float | None = None
    decode_of_memory: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    kv_bytes: int = 0
    bf16_kv_bytes: int = 0
    prefill_runs: tuple[float, ...] = ()
    decode_runs: tuple[float, ...] = ()


class Longrun:
    """longrun on the checkpoint; a new session a run."""

    def __init__(
        self, heads: str, model_dir: Path, head_map: HeadMap | str, length: int, new_tokens: int, chunk: int,
        weight_format: str = "fp32",
    ) -> None:  # fmt: skip
        self.new_tokens = new_tokens
        ratio = None if head_map == "full" else 0.5
        self.runtime = longrun.load(
            model_dir, head_map=head_map, retrieval_ratio=ratio, weight_format=weight_format, device="cpu",
            ctx=length + new_tokens + 2, chunk_size=chunk,
        )  # fmt: skip
        weights = "" if weight_format == "fp32" else f" {weight_format} weights,"
        self.name = f"longrun{weights} {self.runtime.plan.kv_format}, {heads}"
        self.kv_bytes = 0

    def run(self, token_ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of prefill, and of one decoded token."""
        session = self.runtime.new_session()
        start = time.perf_counter()
        session.prefill(token_ids)
        prefill = time.perf_counter() - start
        tokens = session.generate(self.new_tokens + 2, eos=False)
        next(tokens)
        next(tokens)  # the first is sampled from the prefill's logits, the second warms up
        start = time.perf_counter()
        for _ in range(self.new_tokens):
            next(tokens)
        decode = (time.perf_counter() - start) / self.new_tokens
        self.kv_bytes = session.cache_bytes - session.plan.cache.device_bytes()["page tables"]
        return prefill, decode


class Transformers:
    """The peer: transformers' own model, SDPA attention, DynamicCache, greedy; logits of the last position only."""

    name, kv_bytes = "transformers", 0

    def __init__(self, model_dir: Path, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        self.model = load_merged(model_dir, None, dtype=torch.float32, attn_implementation="sdpa")

    @torch.inference_mode()
    def run(self, token_ids: torch.Tensor) -> tuple[float, float]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        logits = self.model(token_ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        prefill = time.perf_counter() - start
        token = logits[:, -1:].argmax(-1)
        for index in range(self.new_tokens + 1):
            if index == 1:
                start = time.perf_counter()
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return prefill, (time.perf_counter() - start) / self.new_tokens


def run(args: argparse.Namespace) -> int:
    """The command `peer`."""
    model_dir = args.model or demo_model()
    lengths = [parse_tokens(text.strip(), "--lengths") for text in args.lengths.split(",")]
    console = Console(stderr=False)
    ceilings = measure_ceilings(torch.device("cpu"), "matmul", "memory")
    other = Transformers(model_dir, args.new_tokens)
    rows: list[Row] = []
    for length in lengths:
        rows += compare(model_dir, other, length, args, ceilings)
    print_rows(console, rows)
    result = {"benchmark": "peer", "model": model_name(model_dir), "ceilings": ceilings, "repeats": args.repeats}
    return finish_timed({**result, "new_tokens": args.new_tokens, "rows": [asdict(row) for row in rows]}, args)


def compare(
    model_dir: Path, other: Transformers, length: int, args: argparse.Namespace, ceilings: dict[str, float]
) -> list[Row]:
    config = longrun.load(model_dir, device="cpu", ctx=length).config
    half = HeadMap.uniform(config.num_layers, config.num_kv_heads, 0.5)
    runners = [
        other,
        Longrun("full map", model_dir, "full", length, args.new_tokens, args.chunk_size),
        Longrun("half streaming", model_dir, half, length, args.new_tokens, args.chunk_size),
    ]
    token_ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    for runner in runners:
        runner.run(token_ids[: min(length, 512)])
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    for _ in range(args.repeats):
        for runner, found in zip(runners, times, strict=True):
            found.append(runner.run(token_ids))
    capacity = length + args.new_tokens + 2
    bf16 = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * capacity
    rows = []
    for runner, found in zip(runners, times, strict=True):
        prefills, decodes = ([pair[i] for pair in found] for i in (0, 1))
        row = Row(runner.name, length, length / statistics.median(prefills), 1e3 * statistics.median(decodes))
        row.prefill_runs, row.decode_runs = tuple(prefills), tuple(decodes)
        row.bf16_kv_bytes = bf16
        if runner is not other:
            row.kv_bytes = runner.kv_bytes
            flops = prefill_flops(config, runner.runtime.split, length)
            tflops = sum(flops.values()) / statistics.median(prefills) / 1e12
            row.prefill_of_product = tflops / ceilings["matmul_tflops"]
            moved = sum(token_bytes(config, "fp32", "cpu", runner.runtime.plan.cache, length).values())
            row.decode_of_memory = moved / statistics.median(decodes) / ceilings["memory_tb_s"] / 1e12
            pairs = list(zip(times[0], found, strict=True))
            row.prefill_ratio = statistics.median(a[0] / b[0] for a, b in pairs)
            row.decode_ratio = statistics.median(a[1] / b[1] for a, b in pairs)
        rows.append(row)
    return rows


def print_rows(console: Console, rows: list[Row]) -> None:
    table = Table(
        "runner",
        "tokens",
        "prefill tokens/s",
        "x",
        "decode ms/token",
        "x",
        "of product",
        "of memory",
        "KV bytes",
        "bf16 cache /",
    )
    for row in rows:
        ratios = [f"{ratio:.2f}" if ratio else "" for ratio in (row.prefill_ratio, row.decode_ratio)]
        smaller = f"{row.bf16_kv_bytes / row.kv_bytes:.2f}" if row.kv_bytes else ""
        kv = format_bytes(row.kv_bytes) if row.kv_bytes else ""
        table.add_row(
            row.runner, format_tokens(row.length), f"{row.prefill_tokens_per_s:.0f}", ratios[0],
            f"{row.decode_ms:.1f}", ratios[1], percent(row.prefill_of_product), percent(row.decode_of_memory),
            kv, smaller,
        )  # fmt: skip
    console.print(table)
