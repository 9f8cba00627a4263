"""How far a paged head looks back, and which of its pages that needs: plain arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from longrun.quant.kv_format import PageFormat
from longrun.units import ALL_TOKENS


@dataclass(frozen=True)
class Reach:
    """A head that sees the sinks and its newest `tokens` tokens, the query's own included.

    Page numbers are those of pooled pages: page p holds the tokens from position (p + fmt.sink_pages) * page_size on.

    Attributes:
        tokens: at least 1; `ALL_TOKENS` keeps everything.
        sink_size: tokens from position 0 on that are never dropped.
        fmt: format of the pages.
    """

    tokens: int
    sink_size: int
    fmt: PageFormat

    @property
    def is_all(self) -> bool:
        return self.tokens >= ALL_TOKENS

    def first_token(self, seq_len: int) -> int:
        """Position of the oldest token beside the sinks that the last of `seq_len` tokens sees."""
        return 0 if self.is_all else max(0, seq_len - self.tokens)

    def oldest_page(self, seq_len: int) -> int:
        """The oldest page beside the sinks' that the next token, at position `seq_len`, sees."""
        return max(0, self.first_token(seq_len + 1) // self.fmt.page_size - self.fmt.sink_pages)

    @property
    def num_sink_pages(self) -> int:
        """Leading pooled pages that hold sinks: none where the exact sink page has room for them."""
        return max(0, -(-self.sink_size // self.fmt.page_size) - self.fmt.sink_pages)

    def kept(self, first: int, stop: int, seq_len: int) -> list[tuple[int, int]]:
        """Of pages [first, stop) those that hold sinks or are in reach at `seq_len` tokens: ranges, in order."""
        sinks = max(first, min(stop, self.num_sink_pages))
        oldest = max(sinks, min(stop, self.oldest_page(seq_len)))
        ranges = [(first, stop)] if oldest == sinks else [(first, sinks), (oldest, stop)]
        return [(begin, end) for begin, end in ranges if begin < end]

    def held_pages(self, seq_len: int) -> int:
        """Pages of one head in use at `seq_len` tokens."""
        return sum(end - begin for begin, end in self.kept(0, self.fmt.pooled_pages(seq_len), seq_len))

    def most_pages(self, capacity: int, marks: int) -> int:
        """The most pages of one head up to `capacity` tokens, with those that `marks` live marks hold back."""
        pooled = self.fmt.pooled_pages(capacity)
        if self.is_all:
            return pooled
        window = -(-(self.tokens - 1) // self.fmt.page_size) + 1
        return min(pooled, self.num_sink_pages + (1 + marks) * window)
