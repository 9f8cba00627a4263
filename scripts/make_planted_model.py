"""Write a planted checkpoint: a model that retrieves by construction (see longrun/lab/planted.py).

Example: python scripts/make_planted_model.py --shape tiny --out models/planted-tiny
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.arguments import COUNT, SEED, SHARE
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.planted import NOTE, SHAPES, make_planted_model
from longrun.paths import path_option
from longrun.units import format_bytes, format_tokens


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Write a checkpoint that retrieves by construction.")
    parser.add_argument("--shape", required=True, choices=list(SHAPES))
    parser.add_argument("--out", required=True, type=path_option, metavar="DIR")
    parser.add_argument("--layers", type=COUNT, metavar="N", help="number of layers, at least 2 (default: the shape's)")
    parser.add_argument(
        "--retrieval-ratio", type=SHARE, metavar="R", help="share of KV heads that the head map scores above 0.5"
    )
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="where weights are made: cpu or cuda (much faster at 8B)")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model and say what it is. Status 0; bad input raises a LongrunError."""
    import torch

    arguments = parse_arguments(argv)
    try:
        torch.empty(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {arguments.device!r} cannot be used here: choose cpu, or cuda with a GPU") from error
    start = time.perf_counter()
    model = make_planted_model(
        arguments.out,
        arguments.shape,
        layers=arguments.layers,
        retrieval_ratio=arguments.retrieval_ratio,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        force=arguments.force,
    )
    seconds = time.perf_counter() - start
    shape = model.shape
    total = shape.num_layers * shape.num_kv_heads
    layer, head = model.retrieval_head
    offsets = ", ".join(str(kv_head) for _, kv_head in model.offset_heads)
    print(f"{NOTE}")
    print(f"wrote     {model.path} ({format_bytes(model.weight_bytes)} of {shape.dtype} weights) in {seconds:.1f} s")
    print(
        f"shape     {arguments.shape}: {shape.num_layers} layers, {shape.num_qo_heads} query / {shape.num_kv_heads} KV "
        f"heads, head_dim {shape.head_dim}, context {format_tokens(shape.max_position_embeddings)}"
    )
    print(f"planted   layer {layer}, KV head {head} retrieves; layer 0, KV heads {offsets} look back 0..4 tokens")
    print(f"head map  {model.head_map}: {model.num_retrieval} of {total} KV heads score above 0.5")
    return 0


if __name__ == "__main__":
    run(main)
