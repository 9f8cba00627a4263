"""Where every head's page lists begin and end, and how far it looks back: small tensors that kernels read."""

from __future__ import annotations

import numpy as np
import torch

from longrun.specs.cache_spec import SPANS, CacheSpec
from longrun.specs.reach import ALL_TOKENS

HOST, DEVICE, BOTH = (0, 1), (2, 3), (0, 4)  # begins and counts of a head's pages by place


class Spans:
    """Spans of all layers' heads, kept on the host and published to the device, where a captured graph reads them.

    Attributes:
        device: int32 [num_layers, SPANS, heads] on the compute device, as last published.
        first: int32 [num_layers, heads], the oldest token that each head sees beside the sinks, see `describe`.
        numbers: int32 [1, pages_per_head], 0, 1, 2, ..: the list of all pages, for readers that name a range; zeros,
            all_pages: int32 [heads], its begin and its length.
    """

    def __init__(self, spec: CacheSpec, device: torch.device) -> None:
        heads = max(spec.retrieval_heads)
        self._host = torch.zeros(spec.num_layers, SPANS, heads, dtype=torch.int32)
        self._numbers = self._host.numpy()
        on_cpu = device.type == "cpu"
        self.device = self._host if on_cpu else self._host.to(device)
        self._dirty = False
        reaches = torch.full((spec.num_layers, heads), ALL_TOKENS, dtype=torch.int32)
        for layer_idx, count in enumerate(spec.retrieval_heads):
            reaches[layer_idx, :count] = torch.tensor([r.tokens for r in spec.layer_reaches(layer_idx)])
        self._finite = bool((reaches < ALL_TOKENS).any())
        self._reaches = reaches.to(device)
        self.first = torch.zeros_like(self._reaches)
        self.numbers = torch.arange(spec.pages_per_head, dtype=torch.int32, device=device)[None]
        constants = torch.tensor([[0], [spec.pages_per_head]], dtype=torch.int32, device=device)
        self.zeros, self.all_pages = constants.repeat(1, heads)

    @property
    def nbytes(self) -> int:
        return self.device.nbytes + sum(
            x.nbytes for x in (self._reaches, self.first, self.numbers, self.zeros, self.all_pages)
        )

    def set(self, layer_idx: int, heads: slice, spans: np.ndarray) -> None:
        """Spans of these heads: [SPANS, heads]."""
        self._numbers[layer_idx, :, heads] = spans
        self._dirty = True

    def count(self, layer_idx: int, place: tuple[int, int]) -> int:
        """Pages of a layer's heads at a place."""
        return int(self._numbers[layer_idx, place[1]].sum())

    def describe(self, seq_len: int) -> None:
        """Bring the device up to date for the last of `seq_len` tokens as the query, on the current stream."""
        if self._dirty and self.device is not self._host:
            self.device.copy_(self._host, non_blocking=True)
        self._dirty = False
        if self._finite:
            torch.clamp_min(seq_len - self._reaches, 0, out=self.first)
