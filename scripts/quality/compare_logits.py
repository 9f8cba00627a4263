"""Logits of longrun against those of the transformers library, at every position of one text, on one checkpoint.

Example: python scripts/compare_logits.py --model DIR --tokens 8192 --device cuda --dtype bf16 --kv bf16,int4
The last line is one JSON object. transformers runs first (SDPA) and is freed before longrun loads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import longrun
from longrun.arguments import SEED, SHARE
from longrun.cli import Parser
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, InputError
from longrun.hub.find import add_model_option, find_model
from longrun.hub.names import model_name
from longrun.lab.planted import NOTE, is_planted
from longrun.model.adapter_merge import load_merged
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import Haystack, build_prompt, make_needles
from longrun.paths import path_option
from longrun.quant.kv_format import KV_FORMATS
from longrun.session.session import Session
from longrun.units import TOKENS
from scripts.bench.bench_common import DEFAULT_BUDGETS, check_device, finish, release, save

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SLICE = 1024  # positions whose logits stand in memory at once
LISTED = 200  # differing positions written out; all are counted

Rows = Callable[[int, torch.Tensor], None]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser, default=None)
    parser.add_argument("--tokens", type=TOKENS, default=8192, metavar="N", help="length of the text")
    parser.add_argument("--text", choices=["needles", "random"], default="needles", help="random: token ids")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="weights and arithmetic of both")
    parser.add_argument("--kv", default="bf16", metavar="F,...", help="page formats, each in a run of its own")
    parser.add_argument("--head-map", default="full", metavar="DIR|full")
    parser.add_argument("--retrieval-ratio", type=SHARE, metavar="R")
    parser.add_argument("--chunk-size", type=TOKENS, metavar="N", help="tokens of a step")
    parser.add_argument("--budget", metavar="NAME_OR_FILE")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the JSON object here as well")
    return parser.parse_args(argv)


def make_ids(args: argparse.Namespace) -> torch.Tensor:
    """int64 [n] on the CPU, n at most `--tokens` for needle text (document and question), else exactly.

    Raises:
        InputError: needle text is asked of a model without a tokenizer.
    """
    if args.text == "random":
        vocab_size = ModelConfig.from_dir(args.model).vocab_size
        return torch.randint(0, vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(args.seed))
    try:
        tokenizer = load_tokenizer(args.model)
    except CheckpointError as error:
        raise InputError(f"model folder {args.model} has no tokenizer to make text with: use --text random") from error
    prompt = build_prompt(tokenizer, Haystack.generated(args.seed), make_needles(3, args.seed), args.tokens, 0.5)
    question = prompt.questions[0]
    return torch.tensor([*prompt.document_ids, *question.token_ids, *question.expected_ids][: args.tokens])


@torch.inference_mode()
def reference_logits(
    model_dir: Path, token_ids: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[n, vocab_size] in `dtype` on the CPU, from transformers in one pass over the text, lm_head in slices."""
    model = load_merged(model_dir, None, dtype=dtype, attn_implementation="sdpa")
    model.to(device)
    hidden = model.get_decoder()(token_ids[None].to(device), use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    found = torch.empty(len(token_ids), head.weight.shape[0], dtype=dtype)
    for start in range(0, len(token_ids), SLICE):
        found[start : start + SLICE] = head(hidden[start : start + SLICE]).to("cpu", dtype)
    return found


def own_logits(session: Session, token_ids: torch.Tensor, take: Rows) -> None:
    """Hand `take` (first position, float32 [m, vocab_size]) the logits after every token, about 1,024 at a time."""
    session.prefill(token_ids[:1])
    for start in range(1, len(token_ids), SLICE):
        # row i of score are the logits that predict token i, which are those after token i - 1
        take(start - 1, session.score(token_ids[start : start + SLICE]))
    logits = session.logits
    assert logits is not None
    take(len(token_ids) - 1, logits[None])


class Comparison:
    """Sums of the difference to the reference, piece by piece.

    Args:
        reference: [n, vocab_size] on the CPU.
    """

    def __init__(self, reference: torch.Tensor) -> None:
        self._reference = reference
        self._squares = self._difference = self._largest = 0.0
        self._differing: list[dict[str, Any]] = []
        self._seen = 0

    def __call__(self, start: int, rows: torch.Tensor) -> None:
        """Rows float32 [m, vocab_size] of positions [start, start + m), in order."""
        assert start == self._seen, (start, self._seen)
        expected = self._reference[start : start + len(rows)].to(rows.device).float()
        assert rows.shape == expected.shape and bool(torch.isfinite(rows).all())
        difference = rows - expected
        self._difference += float(difference.pow(2).sum(dtype=torch.float64))
        self._squares += float(expected.pow(2).sum(dtype=torch.float64))
        self._largest = max(self._largest, float(difference.abs().max()))
        own, best = rows.argmax(-1), expected.topk(2)
        for row in (own != best.indices[:, 0]).nonzero()[:, 0].tolist():
            top, second = best.values[row].tolist()
            step = bf16_step(top)
            self._differing.append(
                {
                    "position": start + row,
                    "reference_token": int(best.indices[row, 0]),
                    "own_token": int(own[row]),
                    "gap_bf16_steps": (top - second) / step,
                    "own_choice_below_top_bf16_steps": (top - float(expected[row, own[row]])) / step,
                }
            )
        self._seen += len(rows)

    def result(self) -> dict[str, Any]:
        """What was found over all positions."""
        assert self._seen == len(self._reference)
        gaps = [one["gap_bf16_steps"] for one in self._differing]
        return {
            "positions": self._seen,
            "rms_ratio": (self._difference / self._squares) ** 0.5,
            "largest_difference": self._largest,
            "top1_equal": self._seen - len(self._differing),
            "top1_different": len(self._differing),
            "top1_agreement": 1 - len(self._differing) / self._seen,
            "largest_gap_bf16_steps": max(gaps, default=None),
            "differing": self._differing[:LISTED],
        }


def bf16_step(value: float) -> float:
    """The distance of neighbouring bfloat16 numbers at `value` (8 bits of significand)."""
    exponent = torch.frexp(torch.tensor(abs(value))).exponent
    return 2.0 ** (int(exponent) - 8)


def compare(args: argparse.Namespace, kv: str, token_ids: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """One run of longrun against the reference: a row of the result."""
    runtime = longrun.load(
        args.model, args.budget or DEFAULT_BUDGETS[args.device], args.head_map, kv, args.dtype, args.device,
        ctx=len(token_ids) + 1, retrieval_ratio=args.retrieval_ratio, chunk_size=args.chunk_size,
    )  # fmt: skip
    session, comparison = runtime.new_session(), Comparison(reference)
    start = time.perf_counter()
    own_logits(session, token_ids, comparison)
    return {
        "kv_format": runtime.plan.kv_format,
        "weight_format": runtime.plan.weight_format,
        "fused_attention": runtime.plan.attention.fused,
        "split_hash": runtime.split.hash,
        "retrieval_heads": runtime.split.total_retrieval,
        "chunk_size": session.plan.chunk_size,
        "step_tokens": min(SLICE, session.plan.chunk_size),
        "seconds": round(time.perf_counter() - start, 3),
        **comparison.result(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and report. Status 0 whatever is found; bad input raises a LongrunError."""
    args = parse_arguments(argv)
    args.model = find_model(args.model, args.download)
    formats = list(dict.fromkeys(part.strip() for part in args.kv.split(",")))
    for kv in formats:
        if kv not in KV_FORMATS:
            raise InputError(f"--kv {kv} is unknown: choose among {', '.join(KV_FORMATS)}")
    if args.tokens < 2:
        raise InputError(f"--tokens {args.tokens} is too short: give at least 2")
    device = check_device(args.device)
    token_ids = make_ids(args)
    console = Console(highlight=False, width=160)
    start = time.perf_counter()
    reference = reference_logits(args.model, token_ids, DTYPES[args.dtype], device)
    seconds = time.perf_counter() - start
    release(device)
    console.print(f"transformers {args.dtype}: {len(token_ids):,} tokens in {seconds:.1f} s, loading included")
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "compare_logits",
        "settings": {
            "model": model_name(args.model),
            "note": NOTE if is_planted(args.model) else None,
            "tokens": len(token_ids),
            "text": args.text,
            "device": args.device,
            "dtype": args.dtype,
            "head_map": Path(args.head_map).name,
            "retrieval_ratio": args.retrieval_ratio,
            "seed": args.seed,
            "reference": f"transformers {args.dtype}, SDPA, one pass; logits kept in {args.dtype}",
        },
        "rows": rows,
    }
    for kv in formats:
        rows.append(compare(args, kv, token_ids, reference))
        release(device)
        save(result, args)
        row = rows[-1]
        gap = row["largest_gap_bf16_steps"]
        console.print(
            f"kv {kv}: RMS of the difference / RMS of the reference {row['rms_ratio']:.3e}; top-1 equal at "
            f"{row['top1_equal']:,} of {row['positions']:,} positions"
            + ("" if gap is None else f"; gap of the reference's best two where not, at most {gap:.1f} bf16 steps")
        )
    return finish(result, args)
