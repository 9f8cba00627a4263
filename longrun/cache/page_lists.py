"""Which pages each head of a layer reads: lists of page numbers on the device, and the spans that say how far."""

from __future__ import annotations

import numpy as np
import torch

from longrun.cache.spans import Spans


class PageLists:
    """The lists of one layer's heads. A head's row names its pages on the host, then those on the device, each run in
    ascending order, so that either run and both together are spans of the row.

    A row holds its own place numbers (0, 1, 2, ..) as long as the head's pages are one range with those on the host
    before the others: only spans change then.

    Attributes:
        rows: int32 [num_heads, max_pages] on the device.
    """

    def __init__(self, num_heads: int, max_pages: int, spans: Spans, layer_idx: int, device: torch.device) -> None:
        self._numbers = torch.arange(max_pages, dtype=torch.int32)
        self.rows = self._numbers.to(device).repeat(num_heads, 1)
        self._spans, self._layer_idx = spans, layer_idx
        self._plain = [True] * num_heads

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def set_range(self, heads: slice, first: int, first_on_device: int, stop: int) -> None:
        """These heads read pages [first, stop), those before `first_on_device` on the host."""
        if not all(self._plain[heads]):
            self.rows[heads] = self._numbers.to(self.rows.device)
            self._plain[heads] = [True] * (heads.stop - heads.start)
        on_host = first_on_device - first
        spans = (first, on_host, first_on_device, stop - first_on_device, stop - first)
        self._spans.set(self._layer_idx, heads, np.array(spans, dtype=np.int32)[:, None])

    def set_pages(self, heads: slice, on_host: list[np.ndarray], on_device: list[np.ndarray]) -> None:
        """Each of these heads reads pages of its own: numbers in ascending order, as many in all for every head."""
        rows = np.stack([np.concatenate(pair) for pair in zip(on_host, on_device, strict=True)]).astype(np.int32)
        self.rows[heads, : rows.shape[1]] = torch.from_numpy(rows).to(self.rows.device)
        self._plain[heads] = [False] * len(rows)
        host = np.array([len(pages) for pages in on_host])
        zero = np.zeros_like(host)
        device = np.array([len(pages) for pages in on_device])
        self._spans.set(self._layer_idx, heads, np.stack((zero, host, host, device, host + device)))
