"""Attention that evicts tokens: SnapKV (arXiv 2404.14469) and TOVA (arXiv 2401.06104), as baselines to compare with.

Both keep keys as they were rotated, at their own positions, and both are full attention as long as nothing had to go.

**SnapKV** reads the whole prompt under full attention, and at its end keeps, per KV head, the `keep` tokens that the
last `window` queries attend to most (their softmax weights summed, smoothed by an average over `kernel` neighbours),
and the window itself. The paper selects per query head after repeating keys over the group, which would multiply the
cache by the group; here the weights of a group's query heads are averaged, so that one KV head keeps one set.

**TOVA** holds at most `keep` tokens a layer, from the first one on: whenever a step left more, those with the least
softmax weight from the newest query, averaged over the layer's query heads, are dropped. The paper drops one token a
step; a chunk of prefill is worked on whole and then cut to the budget by its last query, so that small chunks come
close to the paper and one chunk of the whole text is full attention with one cut at the end.

Nothing here waits for a GPU: what is kept is chosen and moved by index tensors that stay on the device, and heads are
worked on together (in SnapKV's one compression a KV head at a time, whose scores are the largest tensor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from longrun.attention.interface import Step
from longrun.kernels.dense_attention import attention_with_lse, merge_partial
from longrun.lab.evicting_cache import EvictingCache

Method = Literal["snapkv", "tova"]


@dataclass(frozen=True)
class EvictionSettings:
    """What is kept.

    Attributes:
        keep: tokens; of every KV head besides the window (SnapKV), of every layer in all (TOVA).
        window: newest queries that vote, and tokens that always stay (SnapKV; the paper uses 16 to 64).
        kernel: odd number of neighbouring tokens whose votes are averaged (SnapKV; the paper uses 5 and 7).
    """

    method: Method
    keep: int
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        assert self.method in ("snapkv", "tova") and self.keep >= 1
        assert self.window >= 1 and self.kernel % 2 == 1


class EvictionAttention:
    """`Attention` over an `EvictingCache`; see the module's docstring.

    Keys and values are rounded to the cache's dtype before anything sees them, as in `TorchAttention`.
    """

    def __init__(self, cache: EvictingCache, settings: EvictionSettings) -> None:
        self.cache, self.settings = cache, settings
        self.softmax_scale = cache.spec.head_dim**-0.5

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`."""
        exact = self.cache.spec.dtype
        k, v = k.transpose(0, 1).to(exact), v.transpose(0, 1).to(exact)
        out = self._attend(layer_idx, q, k.to(q.dtype), v.to(q.dtype))
        self.cache.append(layer_idx, k, v, step.start)
        settings, layer = self.settings, self.cache.layers[layer_idx]
        if settings.method == "tova":
            if layer.length > settings.keep:
                self.cache.keep(layer_idx, tova_kept(q[-1], layer.held[0], settings.keep, self.softmax_scale))
        elif not self.cache.compressed:
            newest = q[-settings.window :].clone()
            earlier = self.cache.queries[layer_idx]
            if earlier is not None and len(newest) < settings.window:
                newest = torch.cat((earlier, newest))[-settings.window :]
            self.cache.queries[layer_idx] = newest
        return out

    @torch.inference_mode()
    def compress(self) -> None:
        """The prompt ends here: SnapKV drops what its window does not look at, and gives the memory back. Later tokens
        are only added. TOVA has nothing to do; a second call changes nothing."""
        cache, settings = self.cache, self.settings
        if settings.method != "snapkv" or cache.compressed:
            return
        for layer_idx, layer in enumerate(cache.layers):
            queries = cache.queries[layer_idx]
            assert queries is not None, "no prompt was read"
            if layer.length > settings.keep + len(queries):
                kept = snapkv_kept(queries, layer.held[0], settings.keep, settings.kernel, self.softmax_scale)
                cache.keep(layer_idx, kept)
        cache.forget_queries()
        cache.compressed = True

    def _attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, num_qo_heads, head_dim] over the kept tokens and, causally, over the step's own."""
        tokens, num_qo_heads, dim = q.shape
        heads, group = k.shape[0], num_qo_heads // k.shape[0]
        grouped = q.transpose(0, 1).contiguous()  # [num_qo_heads, T, dim]
        out, lse = attention_with_lse(grouped, k, v, True, self.softmax_scale)
        layer = self.cache.layers[layer_idx]
        if layer.length:
            past = (x.to(q.dtype) for x in layer.held)
            packed = (heads, group * tokens, dim)
            found, found_lse = attention_with_lse(grouped.view(packed), *past, False, self.softmax_scale)
            out, lse = out.reshape(packed).float(), lse.reshape(packed[:2])
            out, _ = merge_partial(out, lse, found.float(), found_lse)
        return out.reshape(num_qo_heads, tokens, dim).transpose(0, 1).to(q.dtype)


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
    return _largest(weights, keep).expand(heads, -1)


def snapkv_kept(queries: Tensor, keys: Tensor, keep: int, kernel: int, softmax_scale: float) -> Tensor:
    """Which tokens SnapKV keeps.

    Args:
        queries: [w, num_qo_heads, head_dim] of the newest w tokens; keys: [num_kv_heads, n, head_dim], theirs last.
        keep: tokens of the n - w before the window, less than those.

    Returns:
        int64 [num_kv_heads, keep + w], ascending; of equals the older one stays.
    """
    window, num_qo_heads, dim = queries.shape
    heads, count = keys.shape[:2]
    future = torch.ones(window, count, dtype=torch.bool, device=keys.device).triu(count - window + 1)
    grouped = queries.view(window, heads, num_qo_heads // heads, dim)
    own = torch.arange(count - window, count, device=keys.device)
    rows = []
    for head in range(heads):  # the scores of one KV head stand in memory at a time
        scores = (grouped[:, head].float() * softmax_scale).transpose(0, 1) @ keys[head].float().T
        weights = scores.masked_fill_(future, float("-inf")).softmax(dim=-1)
        votes = weights.sum(dim=1).mean(dim=0)[: count - window]
        pooled = avg_pool1d(votes[None, None], kernel, stride=1, padding=kernel // 2)[0, 0]
        rows.append(torch.cat((_largest(pooled, keep), own)))
    return torch.stack(rows)


def _largest(weights: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of float [n], ascending; of equals the first."""
    return weights.sort(descending=True, stable=True).indices[:count].sort().values
