"""Selected decode as it is asked for, and the models and page formats that it serves."""

from __future__ import annotations

from longrun.arguments import integer
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError, quoted
from longrun.patterns.head_split import HeadSplit
from longrun.plan.budget import LEAST_PAGES, OFF, Budget
from longrun.quant.digest_format import DIGEST_HEAD_DIMS
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS
from longrun.specs.attention_spec import AttentionSpec
from longrun.specs.selection_spec import Selection, select_from_text, share_of_pages

SELECT_HELP = (
    "for each token of an answer a retrieval head reads at most N pages, or P%% of those that it holds then (no fewer "
    "than 64), those that fit the query; off: all"
)
SELECT_FROM_HELP = (
    "with --select: pages that a head must hold; below so many all are read (default: from where selecting saves time; "
    "0: always select)"
)
SELECT_QUESTION_HELP = "with --select: questions, too, read the selected pages alone, a token at a time (default: all)"


def parse_select(select: int | str, what: str = "select") -> int | str:
    """Pages of a head to read, at least `LEAST_PAGES`; a share of them as a text; or "off".

    Raises:
        InputError: none of these.
    """
    if select == OFF:
        return OFF
    if isinstance(select, str):
        if share_of_pages(select, what) is not None:
            return select.strip()
        if not (select.isascii() and select.isdecimal() and len(select) <= 15):
            raise InputError(
                f"{what} {quoted(select)} is neither a number of pages, nor a share of them, nor off: write it like "
                f"128 or 25%"
            )
        select = int(select)
    return integer(select, what, LEAST_PAGES)


def parse_select_from(pages: int | str, what: str = "select_from") -> int:
    """Pages of a head from which on steps select; 0 is always.

    Raises:
        InputError: no whole number, or a negative one.
    """
    if isinstance(pages, str):
        if not (pages.isascii() and pages.isdecimal() and len(pages) <= 15):
            raise InputError(f"{what} {quoted(pages)} is no number of pages: write it like 2000, or 0 for always")
        pages = int(pages)
    return integer(pages, what)


def select_from_of(budget: Budget) -> int | None:
    """From how many pages on the budget's steps select; None: from where that saves time.

    Raises:
        InputError: given for steps that read all pages.
    """
    if budget.select_from is not None and budget.pages_per_head is None:
        raise InputError(
            f"select_from {budget.select_from:,} is for decode steps that select pages, and these read all: give "
            f"select N as well"
        )
    return budget.select_from


def selection_notes(attention: AttentionSpec) -> tuple[str, ...]:
    """Why no step selects although that was asked for, where heads have enough pages: texts are too short for it."""
    selection, listed = attention.selection, attention.listed_pages
    if selection is None or attention.selects or selection.pages_of(listed) == listed:
        return ()
    return (
        f"select {selection.asked} has no effect: a decoded token reads all pages, as no head has more than "
        f"{listed:,}, and {select_from_text(selection)} (select_from 0: always)",
    )


def selection_of(budget: Budget, config: ModelConfig, split: HeadSplit) -> Selection | None:
    """What the budget selects, for this model and its heads; None where it selects nothing.

    Raises:
        InputError: pages of exact numbers, a head_dim without a page digest, or no retrieval head.
    """
    if budget.pages_per_head in (None, OFF):
        return None
    share = share_of_pages(budget.pages_per_head, "pages_per_head")
    if share is None:
        assert isinstance(budget.pages_per_head, int)
        selection = Selection(budget.pages_per_head, budget.selector)
    else:
        selection = Selection.of_share(share, budget.selector)
    asked = f"select {selection.asked}"
    if budget.kv_format not in QUANTIZED_KV_FORMATS:
        raise InputError(
            f"{asked} needs quantized pages, and those of {budget.kv_format} are exact: use kv_format "
            f"{' or '.join(QUANTIZED_KV_FORMATS)}, or select off"
        )
    if config.head_dim not in DIGEST_HEAD_DIMS:
        served = " or ".join(map(str, DIGEST_HEAD_DIMS))
        raise InputError(f"{asked} serves a head_dim of {served}, and the model's is {config.head_dim}: use select off")
    if not split.total_retrieval:
        raise InputError(
            f"{asked} chooses among the pages of retrieval heads, and no head is one here: use select off, or another "
            f"head map or ratio"
        )
    return selection
