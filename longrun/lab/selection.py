"""Which pages of the past a query reads: indices to choose by, and how much attention a choice catches.

A query is q = a R_t q0, a key k_j = a R_j k0_j: R turns by RoPE, a is YaRN's factor (else 1). Pages keep keys that are
*rotated* as well, by the Hadamard matrix H of `quant.rotation` after RoPE, and meet rotated queries. An index keeps of
every group of tokens a centre c and, where lam > 0, a half-range h, channel by channel. The group's score is

    softmax_scale * (q . c + lam * |q| . h)

- c is the mean of k_j (after RoPE, token by token): q . c is the mean of the group's true scores, and (qH) . (cH) is
  the same number, so a mean may be kept rotated or not. With `middle` c is (max + min) / 2 instead.
- h is (max - min) / 2 and belongs to a basis: `plain` (k_j with q) or `rotated` (k_j H with q H, what pages carry
  today). With the middle and lam 1 the score is the upper bound of Quest (arXiv 2406.10774).
- `unturned` takes RoPE off first: c0 is the mean of R_j' k_j, met at every fourth position p of the group by the query
  turned back to it, q . R_p c0; h is a radius a rotary pair, the largest |R_j' k_j - c0| of the pair, met by the
  length of q's pair, which no turn changes.
- A `digest` is what a page can tell of itself (`quant.page_digest`): the mean is of keys as k5v3 pages store them,
  rotated, the half-range of the same with the rotation undone, each with one scale a vector and nothing known besides.
- A group of one token is the key itself, or a code of it: of each channel of a rotated page, 4 bits on int4's grid, or
  1 or 2 bits at the best levels for a normal distribution (mean and deviation kept).

Other elements of less than 16 bits have one float16 scale a vector, after each channel is divided by its spread and the
head's mean key, turned to every position, is taken off: both are numbers of the model (here: of the text), kept once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.lab.selection_rules import PAGE, Index, Rule
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import key_rotation

_PHASES = 4  # tokens from one position to the next at which an unturned centre is met
_LEVELS = {1: (0.7979,), 2: (0.4528, 1.5104)}  # Lloyd-Max of a normal distribution, positive half
_BORDERS = {1: (0.0,), 2: (-0.9816, 0.0, 0.9816)}
_TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


class LayerKeys:
    """One layer's keys and the indices made of them, each once.

    Args:
        keys: float32 [num_kv_heads, T, head_dim] after RoPE; T is a multiple of PAGE.
        cos, sin: [T, head_dim] of RoPE, without YaRN's factor.
    """

    def __init__(self, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
        assert keys.shape[1] % PAGE == 0 and cos.shape == sin.shape == keys.shape[1:]
        self.keys, self._cos, self._sin = keys, cos, sin
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def scores(self, index: Index, q: Tensor, softmax_scale: float) -> Tensor:
        """float32 [num_kv_heads, R, group, T // unit], for float32 q [num_kv_heads, R, group, head_dim]."""
        centre, half = self.vectors(index)
        of_q = q.abs()
        if index.group == 1 or index.basis in ("rotated", "digest"):
            q = q @ key_rotation(q.shape[-1])[0].to(q)
        found = q.flatten(1, 2) @ centre.mT
        if index.lam:
            if index.basis == "rotated":
                of_q = q.abs()
            if index.basis == "unturned":
                of_q = q.unflatten(-1, (2, -1)).norm(dim=-2)
            of_half = of_q.flatten(1, 2) @ half.mT
            found += index.lam * of_half.repeat_interleave(found.shape[-1] // of_half.shape[-1], -1)
        found = found.mul_(softmax_scale).unflatten(-1, (self.length // index.unit, -1))
        return (found.amax(-1) if index.best else found.logsumexp(-1)).unflatten(1, q.shape[1:3])

    def vectors(self, index: Index) -> tuple[Tensor, Tensor]:
        """Centres [num_kv_heads, n, head_dim], and half-ranges: of a channel, or of a pair."""
        name = repr((index.group, index.basis, index.middle, index.bits, index.half_bits, index.less))
        if name not in self._made:
            if index.group == 1:
                self._made[name] = self._codes(index.bits)
            else:
                self._made[name] = self._digest(index) if index.basis == "digest" else self._made_of(index)
        return self._made[name]

    def _digest(self, index: Index) -> tuple[Tensor, Tensor]:
        name = f"digest {index.group}"
        if name not in self._made:
            back, there = (one.to(self.keys) for one in key_rotation(self.keys.shape[-1]))
            fmt = PageFormat("k5v3", PAGE, self.keys.shape[-1])
            pages = (self.keys @ there).unflatten(1, (-1, PAGE))
            stored = decode_pages(*encode_pages(pages, pages, fmt), fmt)[0].flatten(1, 2)
            low, high = (stored @ back.mT).unflatten(1, (-1, index.group)).aminmax(dim=2)
            self._made[name] = stored.unflatten(1, (-1, index.group)).mean(2), (high - low) / 2
        centre, half = self._made[name]
        known, groups = torch.zeros_like(centre[:, :1]), PAGE // index.group
        if index.less == "first":
            known = centre[:, groups : 2 * groups].mean(1, keepdim=True)
        elif index.less == "page":
            known = _one_scale(centre.unflatten(1, (-1, groups)).mean(2), 8, True).repeat_interleave(groups, 1)
        return known + _one_scale(centre - known, index.bits, True), _one_scale(half, index.half_bits or 16, False)

    def _codes(self, bits: int) -> tuple[Tensor, Tensor]:
        pages = self._in_basis("rotated").unflatten(1, (-1, PAGE))
        if bits == 4:
            fmt = PageFormat("int4", PAGE, pages.shape[-1])
            found = decode_pages(*encode_pages(pages, pages, fmt), fmt)[0]
        elif bits == 16:
            found = pages
        else:
            half = pages.new_tensor(_LEVELS[bits])
            deviation, mean = torch.std_mean(pages, dim=2, keepdim=True, correction=0)
            place = torch.bucketize((pages - mean) / deviation.clamp_min(1e-9), pages.new_tensor(_BORDERS[bits]))
            found = mean + deviation * torch.cat((-half.flip(0), half))[place]
        return found.flatten(1, 2), found

    def _in_basis(self, basis: str) -> Tensor:
        if basis == "plain":
            return self.keys
        if basis not in self._made:
            if basis == "rotated":
                found = self.keys @ key_rotation(self.keys.shape[-1])[1].to(self.keys)
            else:
                found = _turned(self.keys, self._cos, -self._sin)
            self._made[basis] = found, found
        return self._made[basis][0]

    def _made_of(self, index: Index) -> tuple[Tensor, Tensor]:
        x = self._in_basis(index.basis).unflatten(1, (-1, index.group))
        low, high = x.aminmax(dim=2)
        centre, half = (low + high) / 2 if index.middle else x.mean(2), (high - low) / 2
        unturned = index.basis == "unturned"
        if unturned:
            half = (x - centre[:, :, None]).unflatten(-1, (2, -1)).norm(dim=-2).amax(2)
        if index.bits < 16:
            assert index.basis != "rotated"
            known = self._in_basis("unturned").mean(1, keepdim=True)
            if not unturned:
                known = _turned(known, self._cos, self._sin).unflatten(1, (-1, index.group)).mean(2)
            centre = known + _rounded(centre - known, index.bits, True)
            half = _rounded(half, index.bits, False)
        if unturned:
            at = torch.arange(_PHASES // 2, self.length, _PHASES, device=x.device)
            centre = _turned(centre.repeat_interleave(index.group // _PHASES, 1), self._cos[at], self._sin[at])
        return centre, half


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., n or 1, head_dim] turned by RoPE's [n, head_dim]: channel i with channel i + head_dim / 2."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rounded(x: Tensor, bits: int, signed: bool) -> Tensor:
    """[heads, n, head_dim] on a grid of `bits` bits a vector, channels divided by their spread over the text."""
    spread = x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
    even, last = x / spread, 2 ** (bits - signed) - 1
    scale = (even.abs().amax(-1, keepdim=True) / last).half().float().clamp_min(2**-24)
    return (even / scale).round_().clamp_(-last, last) * scale * spread


def _one_scale(x: Tensor, bits: int, signed: bool) -> Tensor:
    """[heads, n, head_dim] on a grid of `bits` bits with one float16 scale a vector."""
    last = 2 ** (bits - signed) - 1
    scale = (x.abs().amax(-1, keepdim=True) / last).half().float().clamp_min(2**-24)
    return (x / scale).round_().clamp_(-last, last) * scale


class LayerQueries:
    """Some of a layer's queries, and which units they would choose. The first page, the query's own and the newest full
    ones before it are always read; units of the others are *candidates*.

    Args:
        q: float32 [num_kv_heads, R, group, head_dim] after RoPE; rows: int64 [R], their positions.
        newest: full pages.

    Attributes:
        scores: float32 [num_kv_heads, R, group, T]; -inf where a key is younger than the query.
    """

    def __init__(self, q: Tensor, rows: Tensor, keys: LayerKeys, softmax_scale: float, newest: int) -> None:
        self.rows, self._q, self._keys, self._scale, self._newest = rows, q, keys, softmax_scale, newest
        self.scores = (q.flatten(1, 2) @ keys.keys.mT).mul_(softmax_scale).unflatten(1, q.shape[1:3])
        first = int(rows.min())
        future = torch.arange(first, keys.length, device=rows.device) > rows[:, None]
        self.scores[..., first:].masked_fill_(future[:, None], float("-inf"))
        self._estimates: dict[Index, tuple[Tensor, Tensor]] = {}

    @classmethod
    def pieces(
        cls, q: Tensor, rows: Tensor, keys: LayerKeys, softmax_scale: float, newest: int
    ) -> Iterator[LayerQueries]:
        """As many rows at a time as keep scores small, for [R, num_qo_heads, head_dim] of any dtype."""
        grouped = q.float().unflatten(1, (len(keys.keys), -1)).transpose(0, 1)
        size = max(1, _TILE_BYTES[q.device.type] // (4 * q.shape[1] * keys.length))
        for part, some in zip(grouped.split(size, 1), rows.split(size), strict=True):
            yield cls(part, some, keys, softmax_scale, newest)

    def candidates(self, unit: int) -> Tensor:
        """bool [R, T // unit]."""
        page = torch.arange(self._keys.length // unit, device=self.rows.device) // (PAGE // unit)
        return (page >= 1) & (page < self.rows[:, None] // PAGE - self._newest)

    def mass(self, unit: int) -> Tensor:
        """[num_kv_heads, R, T // unit], attention to each candidate (else 0), the mean over a KV head's queries."""
        found = self.scores.softmax(-1).mean(2).unflatten(-1, (-1, unit)).sum(-1)
        return found.masked_fill_(~self.candidates(unit), 0)

    def ranking(self, rule: Rule) -> Tensor:
        """[num_kv_heads, R, T // unit]: the higher, the sooner chosen; -inf where nothing may be."""
        if rule.index is None:
            return self.mass(rule.unit).log()
        found = self._ranking(rule.index)
        if rule.coarse is None:
            return found
        kept = best(found, max(1, round(rule.coarse * found.shape[-1])))
        return self._ranking(Index(1, unit=rule.index.unit)).masked_fill(~kept, float("-inf"))

    def shares(self, rule: Rule) -> Tensor:
        """[num_kv_heads, R, T // unit], logs of each candidate's share of the attention to all of them, the mean over a
        KV head's queries, as the rule's last stage estimates it; -inf of others."""
        if rule.index is None:
            hidden = ~self.candidates(rule.unit)
            return self.mass(rule.unit).log().log_softmax(-1).masked_fill(hidden, float("-inf"))
        return self._estimate(rule.index if rule.coarse is None else Index(1, unit=rule.index.unit))[1]

    def _ranking(self, index: Index) -> Tensor:
        return self._estimate(index)[0]

    def _estimate(self, index: Index) -> tuple[Tensor, Tensor]:
        """Of each query head the log-sum-exp of a unit's groups, normalised over all candidates; of a KV head's query
        heads the largest, and the log of their mean share."""
        if index not in self._estimates:
            exact = Index(1, unit=index.unit)
            if index == exact:
                found = self.scores.unflatten(-1, (-1, index.unit)).logsumexp(-1)
            else:
                found = self._keys.scores(index, self._q, self._scale)
            hidden = ~self.candidates(index.unit)
            found = found.masked_fill_(hidden[:, None], float("-inf")).log_softmax(-1)
            each = found.amax(2), found.logsumexp(2) - math.log(found.shape[2])
            self._estimates[index] = tuple(one.masked_fill_(hidden, float("-inf")) for one in each)
        return self._estimates[index]


def best(values: Tensor, count: int) -> Tensor:
    """bool as `values` [..., units], the `count` highest of the last dimension; never one of -inf."""
    top = values.topk(min(count, values.shape[-1]), -1)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, top.indices, top.values > float("-inf"))


def padded(x: Tensor) -> Tensor:
    """[..., T, head_dim] with zeros up to a multiple of PAGE tokens."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % PAGE))
