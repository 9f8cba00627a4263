"""What large key biases cost in quantized pages, and what survives them.

    python scripts/quality/key_bias_probe.py --json out.json
    python scripts/quality/key_bias_probe.py --own FILE --json out.json

A bias on a rotary pair of k_proj turns with the position, so it widens the grid of every page that it turns in. Here
biases are put on the keys of the demo model, which has none, in its first and last layer or in all; or they are the
model's own (`--own`). With
`balanced` queries the same pairs of q_proj shrink as the bias grows, so that its share of the scores stays that of a
bias of 10, as training would have it; with `plain` queries the scores follow the bias.

A text is read exactly in float32, then its keys and values go through a page format, and the next tokens are read over
them: KL and top-1 against the same model without any rounding. Sink page and the new tokens stay exact (bf16).
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import longrun
from longrun.arguments import COUNT
from longrun.attention.interface import Step
from longrun.cli import Parser, run
from longrun.hub.names import model_name
from longrun.lab.quality.formats import simulated_format
from longrun.lab.quality.simulation import simulate_pages
from longrun.lab.report_env import environment
from longrun.model.choice import NO_ADAPTER, choose_model
from longrun.model.rope import apply_rope_, signed_sin
from longrun.paths import path_option
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import ROTATION_SEED, hadamard_rotation, key_rotation
from longrun.runtime.runtime import Runtime
from longrun.units import parse_tokens

_PAGE = 64
_KEPT_SCORE = 10  # the bias that balanced queries keep the scores of
_ENDS, _ALL = slice(None, None, 29), slice(None)  # layers
# What is biased: rotary pairs (0 turns fastest, 31 slowest), layers, sizes with plain and with balanced queries.
_PLACES: tuple[tuple[str, tuple[int, ...], slice, tuple[int, ...], tuple[int, ...]], ...] = (
    ("fast", (1,), _ENDS, (0, 10, 30, 100, 300), (100, 300)),
    ("middle", (8,), _ENDS, (300,), (300,)),
    ("slow", (31,), _ENDS, (300,), (300,)),
    ("four fast", (1, 3, 5, 7), _ENDS, (100,), (100, 300)),
    ("fast, every layer", (1,), _ALL, (30, 100), (30, 100, 300)),
)


@dataclass
class Layer:
    """What a format may know of a layer: [num_kv_heads, tokens or 1, head_dim] each.

    Attributes:
        k, v: of the text, keys after RoPE.
        turned_bias: the keys' bias at every position, after RoPE.
        pair_scale: by which keys of a pair could be multiplied and its queries divided without changing a score.
        outliers: bool, the pairs of the largest biases.
    """

    k: Tensor
    v: Tensor
    turned_bias: Tensor
    pair_scale: Tensor
    outliers: Tensor


Format = Callable[[Layer], tuple[Tensor, Tensor]]


def real(
    name: str, *, rotate: bool = True, bias_off: bool = False, exact: bool = False, scaled: bool = False
) -> Format:
    """Pages of the format `name` as the cache stores them, keys changed before and back after.

    Args:
        rotate: keys go in rotated, as they do in a cache.
        bias_off: without their bias, which is added again to what is read.
        exact: without the pairs of the largest biases, which are kept in bf16.
        scaled: times `Layer.pair_scale`, and divided by it when they are read.
    """

    def through(layer: Layer) -> tuple[Tensor, Tensor]:
        k, v, dim = layer.k, layer.v, layer.k.shape[-1]
        for_queries, for_keys = key_rotation(dim)
        kept = torch.zeros_like(k)
        if bias_off:
            kept, k = layer.turned_bias, k - layer.turned_bias
        if exact:
            kept = torch.where(layer.outliers, k, 0.0).bfloat16().float()
            k = torch.where(layer.outliers, 0.0, k)
        if scaled:
            k = k * layer.pair_scale
        k = k @ for_keys if rotate else k
        k, v = pages(k, v @ for_keys if name == "k5v3" else v, name)
        k = k @ for_queries.T if rotate else k
        k = k / layer.pair_scale if scaled else k
        return k + kept, v @ for_queries.T if name == "k5v3" else v

    return through


def pages(k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, tokens, head_dim] as sink page, pages and tail give them back."""
    fmt = PageFormat(name, _PAGE, k.shape[-1])
    k, v = k.bfloat16().float(), v.bfloat16().float()
    if fmt.quantized:
        inner = slice(_PAGE, k.shape[1] // _PAGE * _PAGE)
        found = decode_pages(*encode_pages(*(x[:, inner].unflatten(1, (-1, _PAGE)) for x in (k, v)), fmt), fmt)
        k[:, inner], v[:, inner] = (x.flatten(1, 2) for x in found)
    return k, v


def per_token(layer: Layer, bias_off: bool = False) -> tuple[Tensor, Tensor]:
    """Rotated keys with a grid a token, as many published caches have it; the bias taken off as in `real`."""
    fmt = simulated_format("sim:k4-token-rot/v4")
    kept = layer.turned_bias if bias_off else torch.zeros_like(layer.k)
    k, v = layer.k - kept, layer.v.clone()
    inner = slice(_PAGE, k.shape[1] // _PAGE * _PAGE)
    parts = (x[:, inner].unflatten(1, (-1, _PAGE)) for x in (k, v))
    found = simulate_pages(*parts, fmt, hadamard_rotation(k.shape[-1], ROTATION_SEED))
    k[:, inner], v[:, inner] = (x.flatten(1, 2) for x in found)
    return k + kept, v


FORMATS: dict[str, Format] = {
    "bf16": real("bf16", rotate=False),
    "k5v3": real("k5v3"),
    "int4": real("int4"),
    "4 bits a token": per_token,
    "4 bits a token, bias off": partial(per_token, bias_off=True),
    **{
        f"{name}, {what}": real(name, **how)
        for what, how in (
            ("bias off", {"bias_off": True}),
            ("pairs exact", {"exact": True}),
            ("plain keys", {"rotate": False}),
            ("pairs scaled", {"scaled": True}),
        )
        for name in ("k5v3", "int4")
    },
}


class Attention:
    """Full attention: over a text that it keeps, then over what a format leaves of it.

    Args:
        bias, query_scale: float32 [num_layers, num_kv_heads, head_dim]; added to keys before RoPE, times queries.
    """

    def __init__(self, bias: Tensor, query_scale: Tensor) -> None:
        self.bias, self.query_scale = bias, query_scale
        self.read: list[tuple[Tensor, Tensor]] = []
        self.past: list[tuple[Tensor, Tensor]] | None = None

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        heads = k.shape[1]
        q = (q.unflatten(1, (heads, -1)) * self.query_scale[layer_idx, :, None]).flatten(1, 2).transpose(0, 1)
        k = k.transpose(0, 1) + turned(self.bias[layer_idx], step)
        v = v.transpose(0, 1).clone()
        mask = None
        if self.past is None:
            self.read.append((k, v))
        else:
            past_k, past_v = self.past[layer_idx]
            mask = torch.ones(len(step.cos), past_k.shape[1] + len(step.cos), dtype=torch.bool)
            mask = mask.tril(past_k.shape[1])
            k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def turned(bias: Tensor, step: Step) -> Tensor:
    """A bias [num_kv_heads, head_dim] after RoPE at every position of the step: [num_kv_heads, tokens, head_dim]."""
    at_all = bias.expand(len(step.cos), -1, -1).clone()
    return apply_rope_(at_all, step.cos[:, None], signed_sin(step.sin)[:, None]).transpose(0, 1)


class Model:
    """A loaded model with biases on its keys."""

    def __init__(self, runtime: Runtime, length: int, tested: int) -> None:
        self.decoder, self.rotary, self.config = runtime.parts.decoder, runtime.parts.rotary, runtime.config
        text = "\n".join(pydoc_data.topics.topics.values())
        ids = torch.tensor(runtime.encode(text[: 8 * (length + tested)])[: length + tested])
        assert len(ids) == length + tested
        self.text, self.next = ids[:length], ids[length:]
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        self.shape = (self.config.num_layers, heads, dim)
        rows = [self._rows(layer_idx) for layer_idx in range(self.config.num_layers)]
        self.query_sizes, self.key_sizes = (torch.stack(found) for found in zip(*rows, strict=True))

    def _rows(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """RMS of queries and of keys without bias by KV head and rotary pair [num_kv_heads, head_dim / 2], for inputs
        that are as large in every direction."""
        layer = self.decoder.layers[layer_idx]
        squares = (layer.qkv.data.float() * layer.input_norm).square().sum(-1).unflatten(0, (-1, self.config.head_dim))
        both = squares.unflatten(-1, (2, -1)).sum(-2)
        q, k, _ = both.split((self.config.num_qo_heads, *[self.config.num_kv_heads] * 2))
        if layer.qkv.bias is not None:
            bias = layer.qkv.bias[: self.config.q_size].float().view(self.config.num_qo_heads, 2, -1)
            q = q + bias.square().sum(1)
        return q.unflatten(0, (self.config.num_kv_heads, -1)).mean(1).sqrt(), k.sqrt()

    def own_bias(self) -> Tensor:
        """The biases of the model's k_proj, [num_layers, num_kv_heads, head_dim]."""
        first, size = self.config.q_size, self.config.kv_size
        return torch.stack([layer.qkv.bias[first : first + size].float() for layer in self.decoder.layers]).view(
            self.shape
        )

    def spreads(self, bias: Tensor) -> Tensor:
        """How far the bias of each pair moves within a page, RMS: [num_layers, num_kv_heads, head_dim / 2]."""
        cos, sin = (x[:, : self.shape[2] // 2] for x in self.rotary.cos_sin(0, _PAGE, _PAGE))
        still = cos.mean(0).square() + sin.mean(0).square()
        return pair_norms(bias) * (1 - still).clamp_min(0).sqrt()

    def described(self, bias: Tensor) -> list[dict[str, Any]]:
        """By layer, for every KV head: length of the bias, its motion within a page (RMS a channel), largest pairs."""
        norms, spreads = pair_norms(bias), self.spreads(bias)
        sizes, pairs = norms.topk(3, dim=-1)
        return [
            {"norm": bias[i].norm().item(), "head_norms": bias[i].norm(dim=-1).tolist(),
             "head_motions": (spreads[i].norm(dim=-1) / self.shape[2] ** 0.5).tolist(),
             "largest_pairs": pairs[i].tolist(), "their_sizes": sizes[i].tolist()}
            for i in range(self.shape[0])
        ]  # fmt: skip

    @torch.inference_mode()
    def measure(self, added: Tensor, own: Tensor, query_scale: Tensor, formats: dict[str, Format]) -> dict[str, Any]:
        """KL and top-1 of every format, with `added` on the keys beside the model's `own` bias."""
        attention = Attention(added, query_scale)
        length = len(self.text)
        before, after = self._step(0, length), self._step(length, len(self.next))
        self.decoder.forward(self.text, before, attention)
        bias = added + own
        sizes = (self.key_sizes.square() + self.spreads(bias).square()).sqrt()
        scale = (self.query_sizes * pair_norms(query_scale) / 2**0.5 / sizes).sqrt()
        scale = 2.0 ** (scale / scale.amax(-1, keepdim=True)).log2().round()
        norms = pair_norms(bias)
        outliers = (norms >= norms.topk(4, dim=-1).values[..., -1:]) & (norms > 0)
        layers = [
            Layer(k, v, turned(bias[i], before), doubled(scale[i])[:, None], doubled(outliers[i])[:, None])
            for i, (k, v) in enumerate(attention.read)
        ]
        attention.past = attention.read
        reference = self._log_probs(after, attention)
        found: dict[str, Any] = {}
        for name, through in formats.items():
            attention.past = [through(layer) for layer in layers]
            log_probs = self._log_probs(after, attention)
            found[name] = {
                "kl": (reference.exp() * (reference - log_probs)).sum(-1).mean().item(),
                "top1": (reference.argmax(-1) == log_probs.argmax(-1)).float().mean().item(),
            }
        targets = self.next[1:, None]
        loss = -reference[:-1].gather(1, targets).mean().item()
        return {"loss": loss, "formats": found}

    def _step(self, start: int, tokens: int) -> Step:
        return Step(start, tokens, *self.rotary.cos_sin(start, tokens, start + tokens))

    def _log_probs(self, step: Step, attention: Attention) -> Tensor:
        hidden = self.decoder.forward(self.next, step, attention, all_positions=True)
        return torch.log_softmax(self.decoder.logits(hidden).double(), dim=-1)


def pair_norms(channels: Tensor) -> Tensor:
    """[..., head_dim] to [..., head_dim / 2]: RoPE turns channel i with channel i + head_dim / 2."""
    return channels.unflatten(-1, (2, -1)).square().sum(-2).sqrt()


def doubled(pairs: Tensor) -> Tensor:
    return torch.cat((pairs, pairs), dim=-1)


def main() -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--own", type=path_option, metavar="MODEL", help="a model with biases of its own, none added")
    parser.add_argument("--length", default="1K", help="tokens of the text")
    parser.add_argument("--tested", type=COUNT, default=128, metavar="N", help="tokens read over its pages")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args()
    length = parse_tokens(args.length, "--length")
    model_dir = choose_model(args.own, NO_ADAPTER).model_dir
    runtime = longrun.load(model_dir, weight_format="fp32", device="cpu", ctx=512, chunk_size=64)
    model = Model(runtime, length, args.tested)
    none = torch.zeros(model.shape)
    rows: list[dict[str, Any]] = []

    def row(what: dict[str, Any], added: Tensor, own: Tensor, query_scale: Tensor) -> None:
        spread = model.spreads(added + own).square().sum(-1)
        keys = model.key_sizes.square().sum(-1)
        sizes = {
            "motion": (spread.mean() / model.shape[2]).sqrt().item(),
            "mean_square_spread": spread.mean().item(),
            "largest_spread": spread.max().sqrt().item(),
            "mean_square_key": keys.mean().item(),
        }
        rows.append({**what, **sizes, **model.measure(added, own, query_scale, FORMATS)})
        each = ", ".join(f"{name} {found['kl']:.4f}" for name, found in rows[-1]["formats"].items())
        print({key: value for key, value in rows[-1].items() if key not in ("formats", "layers")}, each, flush=True)

    if args.own is not None:
        own = model.own_bias()
        row({"bias": "own", "layers": model.described(own)}, none, own, torch.ones(model.shape))
    else:
        for place, pairs, layers, plain, balanced in _PLACES:
            for queries, sizes in (("plain", plain), ("balanced", balanced)):
                for size in sizes:
                    added, scale = none.clone(), torch.ones(model.shape)
                    for pair in pairs:
                        added[layers, :, pair] = size
                        if queries == "balanced":
                            scale[layers, :, pair :: model.shape[2] // 2] = _KEPT_SCORE / size
                    row({"place": place, "bias": size, "queries": queries}, added, none, scale)
    if args.json is not None:
        result = {
            "model": model_name(model_dir), "length": length, "tested": args.tested, "rows": rows,
            "environment": environment(),
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
