"""Which pages a decode step reads of every retrieval head, as a setting: plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from longrun.arguments import choice, integer, number
from longrun.errors import ConfigError
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat

SELECTORS = ("top",)
DEFAULT_SELECTOR, DEFAULT_LAM, DEFAULT_NEWEST = "top", 0.25, 4


@dataclass(frozen=True)
class Selection:
    """A decoded token reads at most `pages_per_head` pages of every retrieval head, chosen by their digests.

    A head that holds no more pages than that reads all of them, which is the same answer as without selection. Where
    nothing selects, there is None in place of a `Selection`.

    Attributes:
        pages_per_head: pages that a head reads at most, `newest` included; more than `newest`.
        selector: the rule, of `SELECTORS`.
        lam: how much of a group's range counts beside its mean (`quant.digest_format`); 0 counts only the mean.
        newest: how many of the newest pages are always read.

    Raises:
        InputError: a value out of its range, or an unknown selector.
    """

    pages_per_head: int
    selector: str = DEFAULT_SELECTOR
    lam: float = DEFAULT_LAM
    newest: int = DEFAULT_NEWEST

    def __post_init__(self) -> None:
        integer(self.newest, "newest")
        integer(self.pages_per_head, "pages_per_head", self.newest + 1)
        choice(self.selector, "selector", SELECTORS)
        number(self.lam, "lam", 0)

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
