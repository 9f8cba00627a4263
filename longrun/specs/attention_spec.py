"""What attention needs besides the cache: scratch for dequantized pages, decode buffers and the live tensors of one
chunk.

Plain arithmetic without torch, so that the planner can add it.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrun.specs.prefill_spec import TILE, PrefillSpec
from longrun.specs.selection_spec import Selection
from longrun.specs.tile_batches import TileBatches

DEFAULT_SCRATCH_TOKENS = {"cpu": 4096, "cuda": 65536}

# Partial results of split-KV decode: no GPU runs more programs at once, and one needs a row a query head of its group.
MAX_DECODE_PROGRAMS = 1024
CHOICE_PARTS, CHOICE_PART_PAGES, CHOICE_BINS = 128, 256, 2048  # blocks of a head that choose; pages of one; bins
RING_TILE = 64  # slots of a ring that one program reads
TILE_ELEMENTS = 2**24  # that plain torch scores or compares at once, see `longrun.kernels.tile_attention`
BAND_TILE = 256  # queries that plain torch masks at once, see `longrun.kernels.banded_attention`


@dataclass(frozen=True)
class AttentionSpec:
    """Buffers of the attention backend.

    Attributes:
        scratch_tokens: past tokens dequantized at a time in prefill (design: blockwise, merged by log-sum-exp).
        max_retrieval_heads: the most retrieval heads that any layer has.
        num_qo_heads, num_kv_heads, head_dim: shape of one layer's attention.
        compute_itemsize: bytes of an activation element (4 for float32, 2 for bf16).
        chunk_size: the most tokens of one forward pass.
        recent_size, sink_size: the streaming heads' window.
        fused: the GPU kernels' backend; it has decode buffers, and other temporaries than plain torch.
        fetch_table_pages: page-table entries by which fetched host pages are read (fused backend).
        head_counts: how many different numbers of retrieval heads the layers have (fused backend).
        num_layers: with head_counts it says how many layers' attention has one shape.
        reaches: the different finite reaches of retrieval heads, in tokens. The scratch holds a head's sinks and
            longest reach.
        streams: there are streaming heads.
        selection: what a decode step reads of the pages; None is all.
        listed_pages: the most pages that a head's list may name.
        prefill: which pages of the past a document's chunks read; None is all.
    """

    scratch_tokens: int
    max_retrieval_heads: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    compute_itemsize: int
    chunk_size: int
    sink_size: int
    recent_size: int
    fused: bool = False
    fetch_table_pages: int = 0
    head_counts: int = 1
    num_layers: int = 1
    reaches: tuple[int, ...] = ()
    streams: bool = False
    selection: Selection | None = None
    listed_pages: int = 0
    prefill: PrefillSpec | None = None

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def layers_alike(self) -> int:
        """Layers of one chunk whose attention has the same shape, if all head counts are as frequent."""
        return self.num_layers // max(1, self.head_counts)

    def scratch_bytes(self) -> int:
        """Keys and values of `scratch_tokens` tokens of the retrieval heads, allocated once."""
        return 2 * self.max_retrieval_heads * self.scratch_tokens * self.head_dim * self.compute_itemsize

    @property
    def selects(self) -> bool:
        """Whether a decode step may ever read fewer pages than a head has."""
        return self.leaves_out(self.listed_pages)

    def leaves_out(self, num_pages: int) -> bool:
        """Whether a decode step reads fewer than `num_pages` pages of a head that holds so many."""
        selection = self.selection
        return selection is not None and selection.selects_at(num_pages) and selection.pages_of(num_pages) < num_pages

    def selects_with(self, num_pages: int) -> bool:
        """Whether the step of a cache with a selector selects, where a head that keeps every token has `num_pages`."""
        return self.selects and self.selection is not None and self.selection.selects_at(num_pages)

    @property
    def most_read_pages(self) -> int:
        """Pages of a head that a decode step reads at most."""
        return self.listed_pages if self.selection is None else self.selection.pages_of(self.listed_pages)

    def selection_bytes(self) -> int:
        """One layer's scores, the lists of the pages chosen, where these begin and end; and the scratch in which the
        GPU's kernels choose: values, candidates, a bit a page, bins of values, and results of each part."""
        if self.selection is None or not self.selects:
            return 0
        listed = self.listed_pages
        words = self.group * listed + self.most_read_pages + 2
        if self.fused:
            parts = min(CHOICE_PARTS, -(-listed // CHOICE_PART_PAGES))
            words += 2 * listed + -(-listed // 32) + CHOICE_BINS + 2 * self.group * parts + 2
        return 4 * self.max_retrieval_heads * words

    def sparse_bytes(self) -> int:
        """The workspace in which a chunk's tiles choose their pages, and by layer and query head what steers them
        (float32) and what is counted (two numbers of 8 bytes)."""
        if self.prefill is None or not self.max_retrieval_heads:
            return 0
        tiles = TileBatches(self.prefill, self.max_retrieval_heads, self.group, self.chunk_size, self.listed_pages)
        return tiles.workspace_bytes + self.num_layers * self.num_qo_heads * (4 + 2 * 8)

    def decode_bytes(self) -> int:
        """Upper bound of what decoding holds: with the fused backend queries, outputs, split results, fetch tables; and
        what selecting pages needs."""
        if not self.fused:
            return self.selection_bytes()
        split_results = MAX_DECODE_PROGRAMS * self.group * (self.head_dim + 2) * 4
        rows = 4 * self.num_qo_heads * (self.head_dim + 1) * 4
        ring_splits = -(-(self.sink_size + self.recent_size) // RING_TILE)
        rings = self.num_qo_heads * (ring_splits * (self.head_dim + 2) + 1) * 4
        tables = 4 * self.fetch_table_pages
        return self.head_counts * split_results + rows + rings + tables + self.selection_bytes()

    def allocated_bytes(self) -> int:
        """Everything that a session's attention holds as long as it lives."""
        return self.scratch_bytes() + self.sparse_bytes() + self.decode_bytes()

    def activation_bytes(self) -> int:
        """Upper estimate of the live tensors of one chunk.

        Torch: contiguous q, k, v, two partial outputs with their log-sum-exp, keys and values repeated over the query
        group, the bands of streaming heads and finite reaches with their masks, and what tiles choose and read in
        one piece. Fused: of the retrieval heads, q, one partial output and the float32 sum with their log-sum-exp, and
        keys and values on their way into pages; tiles and what corrects them need less than the partial output, which
        is gone by then.
        """
        if self.fused:
            heads = self.max_retrieval_heads
            row = heads * self.group * self.head_dim
            partial = row * self.compute_itemsize
            lse = 3 * heads * self.group * 4
            passing = 2 * heads * self.head_dim * (self.compute_itemsize + 2)
            return self.chunk_size * (max(2 * partial + 4 * row + lse, passing) + passing)
        row = self.num_qo_heads * self.head_dim * self.compute_itemsize
        lse = self.num_qo_heads * 8
        band = 2 * self.num_kv_heads * (self.sink_size + self.recent_size) * self.head_dim * self.compute_itemsize
        return (
            self.chunk_size * (5 * row + 2 * lse) + band + self._mask_bytes() + self._reach_bytes() + self._tile_bytes()
        )

    def _mask_bytes(self) -> int:
        """Masks of a chunk, one set for each window."""
        windows = (*self.reaches, *((self.recent_size,) if self.streams else ()))
        tile_keys = [self.sink_size + window + BAND_TILE for window in windows]
        masks = self.chunk_size * sum(tile_keys) + self.group * BAND_TILE * max(tile_keys, default=0)
        return masks * self.compute_itemsize

    def _tile_bytes(self) -> int:
        """Of `longrun.kernels.tile_attention`, whose operations come one after the other: products of rows and keys;
        shares of pages, a few times over; keys and values that one tile reads of a piece, and its products. And a row
        for every tile that corrects it, a few times."""
        if self.prefill is None or not self.max_retrieval_heads:
            return 0
        tiles = self.group * -(-self.chunk_size // TILE)  # of a KV head
        rows = tiles * self.prefill.rows
        scoring = 9 * min(TILE_ELEMENTS, rows * self.scratch_tokens)
        compared = min(TILE_ELEMENTS, self.max_retrieval_heads * rows * self.listed_pages)
        choosing = (8 * self.prefill.rows + 36) * compared // self.prefill.rows
        reading = self.scratch_tokens * (2 * self.head_dim * (4 + self.compute_itemsize) + 4 * TILE * 4)
        correcting = 6 * 4 * self.max_retrieval_heads * tiles * self.head_dim if self.prefill.correct else 0
        return max(scoring, choosing, reading) + correcting

    def _reach_bytes(self) -> int:
        """Keys and values of the longest reach in a row, and those of a tile."""
        if not self.reaches:
            return 0
        longest = max(self.reaches)
        keys = longest + self.chunk_size + self.sink_size + longest + BAND_TILE
        return 2 * self.num_kv_heads * keys * self.head_dim * self.compute_itemsize
