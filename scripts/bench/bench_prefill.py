"""Prefill: really reading long texts, against what the GPU's matrix units and torch's own attention reach at best."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.needles.needles import Haystack, NeedlePrompt, build_prompt, make_needles
from longrun.patterns.head_split import HeadSplit
from longrun.runtime.runtime import Runtime
from longrun.session.session import Progress, Session
from longrun.specs.prefill_counts import PrefillCounts
from longrun.specs.prefill_spec import TILE
from longrun.units import ALL_TOKENS
from scripts.bench.bench_common import (
    MemoryWatch,
    check_device,
    describe,
    figure,
    finish_timed,
    load_runtime,
    memory_text,
    or_out_of_memory,
    parse_lengths,
    percent,
    release,
    save,
    synchronize,
    tokens_text,
)
from scripts.bench.bench_transformers import TransformersPeer
from scripts.bench.ceilings import measure_ceilings
from scripts.quality.needle_cells import ask, decoder

SPARE_TOKENS = 64  # questions and answers
WARM_CHUNKS = 2  # read once before timing: the second brings what libraries load and plan for a chunk over a past


def prefill_flops(config: ModelConfig, split: HeadSplit, num_tokens: int) -> dict[str, float]:
    """Floating-point operations of reading `num_tokens`, a multiply-add counting two.

    Linears: all weights of the layers, lm_head left out (one position a chunk). Attention: a retrieval head sees half
    of N^2 pairs, a streaming head or one of finite reach N times its window; scores and output cost 2 * head_dim each
    a pair.
    """
    qkv = (config.q_size + 2 * config.kv_size) * config.hidden_size
    mlp = 3 * config.intermediate_size * config.hidden_size
    linear = config.num_layers * (qkv + config.q_size * config.hidden_size + mlp)
    group = config.num_qo_heads // config.num_kv_heads
    reaches = [ALL_TOKENS if keep else split.recent_size for row in split.retrieval for keep in row]
    if split.reaches:
        reaches = [reach for row in split.reaches for reach in row]
    seen = sum(min(split.sink_size + reach, num_tokens) for reach in reaches if reach < ALL_TOKENS)
    return {
        "linear": 2.0 * linear * num_tokens,
        "retrieval_attention": 4.0 * config.head_dim * reaches.count(ALL_TOKENS) * group * num_tokens**2 / 2,
        "streaming_attention": 4.0 * config.head_dim * seen * group * num_tokens,
    }


def ideal_seconds(flops: dict[str, float], ceilings: dict[str, Any]) -> float:
    """What the operations of `prefill_flops` take at the speeds of `measure_ceilings`."""
    attention = flops["retrieval_attention"] + flops["streaming_attention"] + flops.get("choosing", 0.0)
    return (flops["linear"] / ceilings["matmul_tflops"] + attention / ceilings["attention_tflops"]) / 1e12


def sparse_flops(
    flops: dict[str, float], head_dim: int, page_size: int, rows: int, pages_read: int, pages: int
) -> dict[str, float]:
    """`prefill_flops` without the pages that tiles left out, and with the products by which they chose.

    Args:
        rows: means of queries that score a page for a tile; pages_read, pages: of all tiles, layers and query heads.
    """
    attention = flops["retrieval_attention"] - 4.0 * head_dim * TILE * page_size * (pages - pages_read)
    return flops | {"retrieval_attention": attention, "choosing": 2.0 * head_dim * rows * page_size * pages}


def prefill_row(runtime: Runtime, length: int, args: argparse.Namespace, ceilings: dict, memory: MemoryWatch) -> dict:
    """Read one text in a session of its own; with needles also ask for them. Where it is read sparsely the row says how
    much of it, what that read and caught, and its operations are those that were done."""
    device = torch.device(args.device)
    depth = parse_depths(args.depth, args.needles)
    prompt, token_ids = make_text(runtime, length, depth, args)
    memory.start()
    session = runtime.new_session(length + SPARE_TOKENS)
    empty, spec, warm = session.mark(), session.plan.attention.prefill, WARM_CHUNKS * session.plan.chunk_size
    if spec is not None:
        warm += spec.dense_tokens + spec.dense_end
    session.prefill(token_ids[:warm])
    session.rewind(empty)
    before = session.prefill_counts
    ends, progress = chunk_clock(device)
    start = time.perf_counter()
    answers = None
    if prompt is None:
        session.prefill(token_ids, progress=progress)
    else:
        answers = ask_needles(session, prompt, runtime, progress)
    return {
        "tokens": len(token_ids),
        "chunk_size": session.plan.chunk_size,
        **session_rates(runtime, session, len(token_ids), ends[-1] - start, ceilings, before),
        "chunk_seconds": [end - begin for begin, end in zip([start, *ends], ends, strict=False)],
        "cache_bytes": session.cache_bytes,
        "memory": memory.measure(session.plan),
        **({} if answers is None else {"needles": answers, "exact": sum(a["exact"] for a in answers), "depth": depth}),
    }


def chunk_clock(device: torch.device) -> tuple[list[float], Progress]:
    """Times at which chunks were read, and what notes them, for `Session.prefill`. Waits for earlier work first."""
    ends: list[float] = []

    def progress(done: int, total: int) -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    synchronize(device)
    return ends, progress


def reading_rates(flops: dict[str, float], num_tokens: int, seconds: float, ceilings: dict) -> dict:
    """Speed of reading `num_tokens` with these operations in `seconds`, alone and as shares of the ceilings."""
    tflops = sum(flops.values()) / seconds / 1e12
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "flops": flops,
        "tflops": tflops,
        "of_matmul": tflops / ceilings["matmul_tflops"],
        "of_matmul_and_attention": ideal_seconds(flops, ceilings) / seconds,
    }


def session_rates(
    runtime: Runtime, session: Session, num_tokens: int, seconds: float, ceilings: dict, before: PrefillCounts | None,
    past: int = 0,
) -> dict:  # fmt: skip
    """`reading_rates` of a session that read `num_tokens` after `past` others; where sparsely, by the operations
    that were done, with what it has read since the counts `before`."""
    flops, counts = prefill_flops(runtime.config, runtime.split, past + num_tokens), session.prefill_counts
    earlier = prefill_flops(runtime.config, runtime.split, past)
    flops = {name: count - earlier[name] for name, count in flops.items()}
    if counts is None or before is None:
        return reading_rates(flops, num_tokens, seconds, ceilings)
    counts = counts.since(before)
    plan, spec, read = session.plan, session.plan.attention.prefill, counts.to_dict()
    assert spec is not None
    done = sparse_flops(
        flops, plan.attention.head_dim, plan.page_size, spec.rows, read["pages_read"], read["pages"]
    )  # fmt: skip
    return {
        **reading_rates(done, num_tokens, seconds, ceilings),
        "dense_flops": flops,
        "read_sparsely": {"sparse_tokens": session.sparse_tokens, **read},
    }


def parse_depths(text: str, needles: int) -> float | list[float]:
    """Where needles go: one depth for all, `a,b,c` one a needle, or `spread`, evenly from 0 to 1.

    Raises:
        InputError: not a number within 0..1, or not as many as there are needles.
    """
    if text == "spread":
        return [round(i / (needles - 1), 6) for i in range(needles)] if needles > 1 else 0.5
    try:
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--depth {text} is not a depth: give 0 to 1, a list like 0,0.5,1, or spread") from None
    if not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"--depth {text} leaves 0..1: 0 is the text's start, 1 its end")
    if len(depths) > 1 and len(depths) != needles:
        raise InputError(
            f"--depth {text} gives {len(depths)} depths for {needles} needle(s): give one, or one a needle"
        )
    return depths[0] if len(depths) == 1 else depths


def make_text(
    runtime: Runtime, length: int, depth: float | list[float], args: argparse.Namespace
) -> tuple[NeedlePrompt | None, torch.Tensor]:
    """What is read: needle text with its questions, or random token ids of exactly `length`.

    Raises:
        InputError: needles are asked of a model without a tokenizer.
    """
    if not args.needles:
        generator = torch.Generator().manual_seed(args.seed)
        return None, torch.randint(0, runtime.config.vocab_size, (length,), generator=generator)
    if runtime.tokenizer is None:
        raise InputError(f"model folder {args.model} has no tokenizer: needles are text, so leave --needles out")
    needles = make_needles(args.needles, seed=f"{args.seed}/{length}/{depth}")
    prompt = build_prompt(runtime.tokenizer, Haystack.generated(args.seed), needles, length, depth)
    return prompt, torch.tensor(prompt.document_ids, dtype=torch.int64)


def ask_needles(session: Any, prompt: NeedlePrompt, runtime: Runtime, progress: Any) -> list[dict[str, Any]]:
    """Read the document (`progress` after every chunk of it), then put the questions as the needle sweep does."""
    heard = len(prompt.document_ids)

    def document_only(done: int, total: int) -> None:
        if total == heard:
            progress(done, total)

    return ask(session, prompt, decoder(runtime), document_only)


def run(args: argparse.Namespace) -> int:
    """The command `prefill`."""
    device = check_device(args.device)
    lengths, peer_lengths = parse_lengths(args.lengths), parse_lengths(args.peer_lengths, "--peer-lengths")
    if not lengths:
        raise InputError("prefill needs at least one length: give --lengths 128K")
    parse_depths(args.depth, args.needles)
    memory = MemoryWatch(device)
    ceilings = measure_ceilings(device, "matmul", "attention")
    console = Console(width=160)
    runtime = load_runtime(args, max(lengths) + SPARE_TOKENS)
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "prefill", "settings": describe(runtime, args), "ceilings": ceilings, "rows": rows}
    for length in lengths:
        row = {"runner": "longrun", "length": length}
        row = or_out_of_memory(row, partial(prefill_row, runtime, length, args, ceilings, memory), device)
        rows.append(row)
        save(result, args)
        found = row.get("error") or f"{row['tokens_per_s']:.0f} tokens/s"
        console.print(f"{tokens_text(length)}: {found}", highlight=False)
    result["settings"] = describe(runtime, args)  # with the notices of all sessions
    vocab_size = runtime.config.vocab_size
    del runtime
    release(device)
    peer, generator = None, torch.Generator().manual_seed(args.seed)
    for length in peer_lengths:
        peer = peer or TransformersPeer(args.model, device)
        rows.append(peer.prefill(torch.randint(0, vocab_size, (length,), generator=generator)))
        save(result, args)
    console.print(table(rows))
    return finish_timed(result, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    found = Table(
        "runner", "tokens", "seconds", "tokens/s", "TFLOP/s", "of matmul", "of both", "pages read", "needles", "memory"
    )
    for row in rows:
        start = (row["runner"], tokens_text(row["length"]))
        if "error" in row:
            found.add_row(*start, row["error"])
            continue
        more = ()
        if "tflops" in row:
            needles = f"{row['exact']} of {len(row['needles'])}" if "needles" in row else "-"
            more = (
                figure(row["tflops"], 1), percent(row["of_matmul"]), percent(row["of_matmul_and_attention"]),
                _pages_read(row), needles, memory_text(row["memory"]),
            )  # fmt: skip
        found.add_row(*start, figure(row["seconds"]), figure(row["tokens_per_s"], 0), *more)
    return found


def _pages_read(row: dict[str, Any]) -> str:
    """Of the past, and the attention that they caught."""
    found = row.get("read_sparsely", {})
    if found.get("read_share") is None:
        return "-"
    return f"{percent(found['read_share'])} ({percent(found['caught_share'])} caught)"
