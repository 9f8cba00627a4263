"""Which pages a decode step reads of every retrieval head, as a setting: plain values, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrun.arguments import choice, integer, number
from longrun.errors import ConfigError, InputError, quoted
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.units import share_of

SELECTORS = ("top",)
DEFAULT_SELECTOR, DEFAULT_LAM, DEFAULT_NEWEST = "top", 0.25, 4
SHARE_STEPS = 10_000  # of a head's pages: a share is a whole number of them
SHARE_LEAST_PAGES = 64  # that a head reads where a share of its pages is fewer
NEVER = 2**31 - 1  # as `select_from`: selecting saves no time at any length


@dataclass(frozen=True)
class Selection:
    """A decoded token reads at most `pages_per_head` pages of every retrieval head, or with `share` that part of the
    pages which the head holds then, where it is more; chosen by their digests.

    A head that holds no more pages than that reads all of them, which is the same answer as without selection; so do
    all heads where those that keep every token hold fewer than `select_from`. Where nothing selects, there is None in
    place of a `Selection`.

    Attributes:
        pages_per_head: pages that a head reads at most, `newest` included; more than `newest`.
        selector: the rule, of `SELECTORS`.
        lam: how much of a group's range counts beside its mean (`quant.digest_format`); 0 counts only the mean.
        newest: how many of the newest pages are always read.
        share: 0 to 1, in hundredths of a percent; the number of pages is rounded up.
        select_from: pages from which on steps select; 0: always.

    Raises:
        InputError: a value out of its range, or an unknown selector.
    """

    pages_per_head: int
    selector: str = DEFAULT_SELECTOR
    lam: float = DEFAULT_LAM
    newest: int = DEFAULT_NEWEST
    share: float = 0.0
    select_from: int = 0

    def __post_init__(self) -> None:
        integer(self.newest, "newest")
        integer(self.pages_per_head, "pages_per_head", self.newest + 1)
        choice(self.selector, "selector", SELECTORS)
        number(self.lam, "lam", 0)
        number(self.share, "share", 0, 1)
        integer(self.select_from, "select_from")

    @classmethod
    def of_share(cls, share: float, selector: str = DEFAULT_SELECTOR) -> Selection:
        """`share` of a head's pages, and no fewer than `SHARE_LEAST_PAGES`."""
        return cls(SHARE_LEAST_PAGES, selector, share=share)

    @property
    def share_steps(self) -> int:
        """The share, of `SHARE_STEPS`."""
        return round(self.share * SHARE_STEPS)

    @property
    def asked(self) -> str:
        """As `--select` says it."""
        return f"{100 * self.share:g}%" if self.share else f"{self.pages_per_head:,}"

    def selects_at(self, num_pages: int) -> bool:
        """Whether a step selects, by the pages of a head that keeps every token."""
        return num_pages >= self.select_from

    def pages_of(self, held: int) -> int:
        """Pages that a head reads of `held` where a step selects."""
        return min(held, max(self.pages_per_head, -(-held * self.share_steps // SHARE_STEPS)))

    def digest_format(self, page_format: PageFormat) -> DigestFormat:
        """The digests that selecting among such pages needs.

        Raises:
            ConfigError: exact pages, or a head_dim that has no digests.
        """
        if not page_format.quantized:
            raise ConfigError(
                f"pages of KV format {page_format.name} cannot be selected: use {' or '.join(QUANTIZED_KV_FORMATS)}, "
                f"or turn selection off"
            )
        return DigestFormat(page_format.page_size, page_format.head_dim)


def pages_text(selection: Mapping[str, Any] | None) -> str:
    """The pages that a head reads, of the fields of a `Selection` as results record them; None is all. Older results
    have no share."""
    if selection is None:
        return "all pages a head"
    share = selection.get("share")
    return f"{100 * share:g}% of the pages a head" if share else f"{selection['pages_per_head']:,} pages a head"


def select_from_text(selection: Selection) -> str:
    """From which length on steps select, in words."""
    if selection.select_from == NEVER:
        return "selecting saves no time at any length"
    return f"steps select from {selection.select_from:,} pages a head on"


def share_of_pages(text: object, what: str) -> float | None:
    """As `share_of`, in hundredths of a percent, as selection counts.

    Raises:
        InputError: also a finer share.
    """
    share = share_of(text, what)
    if share is not None and abs(share * SHARE_STEPS - round(share * SHARE_STEPS)) > 1e-6:
        raise InputError(f"{what} {quoted(text)} is finer than hundredths of a percent: write it like 25% or 6.25%")
    return share
