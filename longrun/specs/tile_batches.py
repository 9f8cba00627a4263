"""How many tiles of a chunk choose their pages at once, and the bytes in which they do: plain arithmetic.

Tiles need a score for every row and page of the past, and a list of the pages chosen. Batches take KV head by KV head,
because pages are read a KV head at a time at no further cost; where not even one head's tiles fit, the past is read
again for every batch of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrun.specs.prefill_spec import TILE, PrefillSpec

LARGEST_BYTES = 2**29
"""Of the workspace; more where a single tile of a KV head's query heads needs more."""
_ROW_PAGES, _LIST_PAGES = 64, 4  # rows of scores and lists begin at multiples of so many entries


@dataclass(frozen=True)
class TileBatches:
    """Tiles of some KV heads over a past of some pages.

    Attributes:
        spec: how many rows stand for a tile and how many pages it reads at most.
        num_heads, group: KV heads, and query heads of each.
        tokens: of the chunk.
        pages: of the past.
    """

    spec: PrefillSpec
    num_heads: int
    group: int
    tokens: int
    pages: int

    @property
    def tiles(self) -> int:
        """Of each query head."""
        return -(-self.tokens // TILE)

    @property
    def row_pages(self) -> int:
        """Entries from one row of float16 scores to the next."""
        return -(-self.pages // _ROW_PAGES) * _ROW_PAGES

    @property
    def list_pages(self) -> int:
        """Entries from one int32 list to the next."""
        return -(-self.spec.most_pages(self.pages) // _LIST_PAGES) * _LIST_PAGES

    @property
    def tile_bytes(self) -> int:
        """Scores and lists of one tile of each query head of one KV head."""
        return self.group * (2 * self.spec.rows * self.row_pages + 4 * self.list_pages)

    @property
    def workspace_bytes(self) -> int:
        """What is allocated where no chunk has more tiles or pages."""
        wanted = self.num_heads * self.tiles * self.tile_bytes
        return min(wanted, max(LARGEST_BYTES, self.tile_bytes)) if wanted else 0

    def sizes(self, room: int) -> tuple[int, int]:
        """KV heads and tiles of a batch in `room` bytes, at least `tile_bytes`; batches are of about equal size."""
        fitting = room // self.tile_bytes
        assert fitting, (room, self.tile_bytes)
        if fitting >= self.tiles:
            return _even(self.num_heads, fitting // self.tiles), self.tiles
        return 1, _even(self.tiles, fitting)


def _even(count: int, most: int) -> int:
    """Size of the parts, at most `most`, in which `count` things are taken in as few and as equal parts as possible."""
    return -(-count // -(-count // most))
