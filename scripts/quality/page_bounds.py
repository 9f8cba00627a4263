#!/usr/bin/env python
"""How well a page's index ranks pages for a query, with plain and with rotated keys; JSON is the last line.

    python scripts/quality/page_bounds.py [--model DIR] [--tokens 4096] [--top 8] [--json FILE]

The model reads a text (Python's own documentation). For every query head and each of the last queries, pages are ranked
by the bound sum over channels of max(q * min, q * max), min and max from the index of INT4 pages, and by their true
highest score: the share of the truly highest pages that are among the same number with the highest bounds (Quest, arXiv
2406.10774). The first page and the newest ones are left out, which are always read. Rotated: as INT4 pages hold keys.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import longrun
from longrun import cli
from longrun.arguments import COUNT
from longrun.attention.interface import Step
from longrun.errors import InputError
from longrun.model.demo import demo_model_dir
from longrun.paths import path_option
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import encode_pages
from longrun.quant.rotation import key_rotation
from scripts.bench.bench_common import finish

PAGE = 64
QUERIES = 128


class Recorder:
    """Causal attention that keeps the last queries and all keys of every layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        self.seen.append((q[-QUERIES:].transpose(0, 1).clone(), k.transpose(0, 1).clone()))
        group = q.shape[1] // k.shape[1]
        keys, values = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True)
        return out[0].transpose(0, 1)


def found_share(q: Tensor, k: Tensor, top: int, rotate: bool) -> Tensor:
    """Share of the `top` pages with the highest scores among the `top` with the highest bounds, a query head.

    Args:
        q: float32 [num_qo_heads, n, head_dim], of the last n tokens; k: float32 [num_kv_heads, T, head_dim].

    Returns:
        float32 [num_qo_heads], mean over the queries.
    """
    heads, tokens, dim = k.shape
    group, (for_queries, for_keys) = q.shape[0] // heads, key_rotation(dim)
    pages = k[:, PAGE : (tokens - q.shape[1]) // PAGE * PAGE].unflatten(1, (-1, PAGE))
    best = torch.einsum("hgqd,hptd->hgqpt", q.unflatten(0, (heads, group)), pages).amax(-1)
    held = pages @ for_keys if rotate else pages
    asked = (q @ for_queries if rotate else q).unflatten(0, (heads, group))
    _, index = encode_pages(held, held, PageFormat("int4", PAGE, dim))
    assert index is not None
    scale, low = index.float().unbind(2)
    high = low + 15 * scale
    bound = asked.clamp_min(0) @ high.mT[:, None] + asked.clamp_max(0) @ low.mT[:, None]
    true, ranked = (x.topk(top).indices for x in (best, bound))
    return (true[..., None] == ranked[..., None, :]).any(-1).float().mean((-2, -1)).flatten()


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path_option, metavar="DIR", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--tokens", type=COUNT, default=4096, help="tokens of text that are read")
    parser.add_argument("--top", type=COUNT, default=8, help="pages that are looked for")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    args = parser.parse_args()
    if not (args.top + 1) * PAGE + QUERIES < args.tokens:
        raise InputError(f"--tokens {args.tokens} are too few for {args.top} of many pages: give more")
    model = args.model or demo_model_dir()
    runtime = longrun.load(model, "cpu", "full", device="cpu", weight_format="fp32", ctx=args.tokens)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(runtime.encode(text[: 8 * args.tokens])[: args.tokens])
    cos, sin = runtime._parts.rotary.cos_sin(0, len(ids), len(ids))
    recorder = Recorder()
    runtime._parts.decoder.forward(ids, Step(0, len(ids), cos, sin), recorder)
    found = {}
    for name, rotate in (("plain", False), ("rotated", True)):
        layers = [found_share(q.float(), k.float(), args.top, rotate) for q, k in recorder.seen]
        found[name] = {
            "mean": torch.cat(layers).mean().item(),
            "layers": [layer.mean().item() for layer in layers],
            "heads_below_half": int((torch.cat(layers) < 0.5).sum()),
        }
    result = {
        "benchmark": "page bounds", "model": model.name, "tokens": len(ids), "text": "pydoc_data.topics",
        "page_size": PAGE, "pages_ranked": (len(ids) - QUERIES) // PAGE - 1, "queries": QUERIES, "top": args.top,
        "query_heads": sum(len(q) for q, _ in recorder.seen), "share_found": found,
    }  # fmt: skip
    print({name: round(share["mean"], 4) for name, share in found.items()})
    return finish(result, args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
