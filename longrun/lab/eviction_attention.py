"""Attention that evicts tokens: retention rules and TOVA (arXiv 2401.06104), as baselines to compare with.

All keep keys as they were rotated, at their own positions, and all are full attention as long as nothing had to go.

**Retention rules** (`retention_rules`: SnapKV, H2O, StreamingLLM, PyramidKV, Ada-KV, random) read the whole prompt
under full attention. At its end they keep the tokens that score best, on the mean `keep` of every KV head, and the
last `window` tokens. Later tokens are only added.

**TOVA** holds at most `keep` tokens a layer, from the first one on: whenever a step left more, those with the least
softmax weight from the newest query, averaged over the layer's query heads, are dropped. The paper drops one token a
step; a chunk of prefill is worked on whole and then cut to the budget by its last query, so that small chunks come
close to the paper and one chunk of the whole text is full attention with one cut at the end.

Nothing here waits for a GPU but the one compression, which counts what heads keep, once a layer. What heads keep is
chosen for all of a layer's heads together. Where they keep different numbers (Ada-KV), later steps attend to the kept
tokens head after head: nothing is padded, and a step starts more kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.lab.evicting_cache import EvictingCache, EvictingLayer
from longrun.lab.retention_rules import RetentionRule, retention_rule
from longrun.lab.retention_scores import LayerPrompt, received_attention

TOVA = "tova"


@dataclass(frozen=True)
class EvictionSettings:
    """What is kept.

    Attributes:
        method: "tova" or a retention rule's name.
        keep: tokens; of every KV head besides the window, on the mean (rules), of every layer in all (TOVA).
        window: newest queries that vote in SnapKV's score, and tokens that always stay (rules; SnapKV's paper uses 16
            to 64).
        kernel: odd number of neighbouring tokens whose votes are averaged (SnapKV's score).
    """

    method: str
    keep: int
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        assert self.keep >= 1 and self.window >= 1 and self.kernel % 2 == 1

    @property
    def rule(self) -> RetentionRule | None:
        """None for TOVA, which is none; InputError for an unknown method."""
        return None if self.method == TOVA else retention_rule(self.method, self.kernel)


class EvictionAttention:
    """`Attention` over an `EvictingCache`; see the module's docstring.

    Keys and values are rounded to the cache's dtype before anything sees them, as in `TorchAttention`.
    """

    def __init__(self, cache: EvictingCache, settings: EvictionSettings) -> None:
        self.cache, self.settings, self.rule = cache, settings, settings.rule
        self.softmax_scale = cache.spec.head_dim**-0.5

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        exact = self.cache.spec.dtype
        k, v = k.transpose(0, 1).to(exact), v.transpose(0, 1).to(exact)
        out, lse = self._attend(layer_idx, q, k.to(q.dtype), v.to(q.dtype))
        self.cache.append(layer_idx, k, v, step.start)
        settings, layer = self.settings, self.cache.layers[layer_idx]
        if self.rule is None:
            if layer.length > settings.keep:
                self.cache.keep(layer_idx, tova_kept(q[-1], layer.held[0], settings.keep, self.softmax_scale))
        elif not self.cache.compressed:
            self._watch_prompt(layer_idx, self.rule, q, lse, step.start)
        return out

    def _watch_prompt(self, layer_idx: int, rule: RetentionRule, q: Tensor, lse: Tensor, start: int) -> None:
        """Note what the rule will need to know of these queries, [T, num_qo_heads, head_dim], with their lse."""
        cache, window = self.cache, self.settings.window
        newest, earlier = q[-window:].clone(), cache.queries[layer_idx]
        if earlier is not None and len(newest) < window:
            newest = torch.cat((earlier, newest))[-window:]
        cache.queries[layer_idx] = newest
        if rule.score.reads_received:
            received = received_attention(q, cache.layers[layer_idx].held[0], lse, start, self.softmax_scale)
            before = cache.received[layer_idx]
            if before is not None:
                received[:, : before.shape[1]] += before
            cache.receive(layer_idx, received)

    @torch.inference_mode()
    def compress(self) -> None:
        """The prompt ends here: a rule drops what it does not keep, and gives the memory back. Later tokens are only
        added. TOVA has nothing to do; a second call changes nothing."""
        cache, keep = self.cache, self.settings.keep
        if self.rule is None or cache.compressed:
            return
        for layer_idx, layer in enumerate(cache.layers):
            queries, received = cache.queries[layer_idx], cache.received[layer_idx]
            assert queries is not None, "no prompt was read"
            prompt = LayerPrompt(
                layer_idx, len(cache.layers), queries, layer.held[0], received, self.softmax_scale
            )  # fmt: skip
            if prompt.num_candidates > keep:
                cache.keep_chosen(layer_idx, self.rule.kept(prompt, keep))
        cache.end_prompt()

    def _attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, num_qo_heads, head_dim] over the kept tokens and, causally, over the step's own.

        Returns:
            [T, num_qo_heads, head_dim], dtype of q; float32 [num_qo_heads, T], log-sum-exp.
        """
        tokens, num_qo_heads, dim = q.shape
        heads, group = k.shape[0], num_qo_heads // k.shape[0]
        grouped = q.transpose(0, 1).contiguous()  # [num_qo_heads, T, dim]
        out, lse = attention_with_lse(grouped, k, v, True, self.softmax_scale)
        packed = (heads, group * tokens, dim)
        for found, found_lse in self._past(self.cache.layers[layer_idx], grouped.view(packed)):
            out, lse = out.reshape(packed).float(), lse.reshape(packed[:2])
            out, lse = merge_partial(out, lse, found.float(), found_lse)
        out = out.reshape(num_qo_heads, tokens, dim).transpose(0, 1).to(q.dtype)
        return out, lse.reshape(num_qo_heads, tokens)

    def _past(self, layer: EvictingLayer, q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What q [num_kv_heads, n, head_dim] find in the kept tokens, with lse [num_kv_heads, n]: in those of which
        every head has as many, and in the others."""
        if layer.length:
            yield attention_with_lse(q, *(x.to(q.dtype) for x in layer.held), False, self.softmax_scale)
        if layer.ragged is not None:
            counts = layer.ragged.counts
            keys, values = (x.to(q.dtype).split(counts) for x in (layer.ragged.k, layer.ragged.v))
            found = [
                attention_with_lse(q[h : h + 1], keys[h][None], values[h][None], False, self.softmax_scale)
                for h in range(len(counts))
            ]
            outs, lses = zip(*found, strict=True)
            yield torch.cat(outs), torch.cat(lses)


def tova_kept(query: Tensor, keys: Tensor, keep: int, softmax_scale: float) -> Tensor:
    """Which tokens TOVA keeps.

    Args:
        query: [num_qo_heads, head_dim], the newest one; keys: [num_kv_heads, n, head_dim], its own token's included.

    Returns:
        int64 [num_kv_heads, keep], ascending, the same in every row; of equals the older one stays.
    """
    heads = keys.shape[0]
    scores = (query.float() * softmax_scale).view(heads, -1, query.shape[1]) @ keys.float().transpose(1, 2)
    weights = scores.softmax(dim=-1).mean(dim=(0, 1))
    best = weights.sort(descending=True, stable=True).indices[:keep]  # of equals the first
    return best.sort().values.expand(heads, -1)
