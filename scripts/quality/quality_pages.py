"""Rows of a comparison against their twins with other KV pages: what a page format alone changes, question by question.

Twins differ in their name and in `kv` and in nothing else; both are measured rows, no simulated ones.
"""

from __future__ import annotations

from typing import Any

from longrun.lab.quality.statistics import paired_difference
from longrun.lab.quality.summary import identity
from longrun.lab.quality.tasks import TEXT_TASK
from longrun.lab.quality.texts import TEXT_TASKS
from longrun.units import format_tokens

_BASE = "int4"
Found = dict[str, Any]


def twins(rows: list[Found]) -> list[tuple[str, str]]:
    """(row, twin) of the rows with quantized pages that have a twin with INT4 pages, in their order."""
    known = {_apart_from_pages(row): row["name"] for row in rows if row["kv"] == _BASE}
    return [
        (row["name"], known[_apart_from_pages(row)])
        for row in rows
        if row["kv"] not in (_BASE, "bf16", "fp32")
        and not row["kv"].startswith("sim:")
        and _apart_from_pages(row) in known
    ]


def _apart_from_pages(row: Found) -> tuple[Any, ...]:
    return tuple(value for key, value in sorted(row.items()) if key not in ("name", "kv"))


def page_table(found: Found) -> list[str]:
    """A markdown table: KL less the twin's by length (paired, 95% interval; in brackets in percent of the twin's), and
    answers right that the twin has wrong, and the other way round, over all lengths."""
    records = {(record["row"], record["length"], record["group"]): record for record in found["records"]}
    lengths = found["settings"]["lengths"]
    lines = []
    for row, twin in twins(found["rows"]):
        cells, more, fewer, asked = [], 0, 0, 0
        for length in lengths:
            texts = [records.get((name, length, TEXT_TASK)) for name in (row, twin)]
            cells.append("" if None in texts else _divergence(*(record["items"] for record in texts), length))
            for group in sorted({group for _, _, group in records} - set(TEXT_TASKS)):
                both = [records.get((name, length, group)) for name in (row, twin)]
                if None in both:
                    continue
                answers = [(one["exact"], other["exact"]) for one, other in _pairs(*(r["items"] for r in both), length)]
                asked += len(answers)
                more += sum(one and not other for one, other in answers)
                fewer += sum(other and not one for one, other in answers)
        answered = f"{more} more, {fewer} fewer of {asked}" if asked else ""
        if any(cells) or answered:
            lines.append([row, twin, *cells, answered])
    heads = ["row", "instead of", *(format_tokens(length) for length in lengths), "answers right"]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)]


def _pairs(own: list[Found], other: list[Found], length: int) -> list[tuple[Found, Found]]:
    known = {identity(item, length): item for item in other}
    pairs = [(item, known[identity(item, length)]) for item in own]
    assert len(pairs) == len(known) == len(own)  # the same questions, each once
    return pairs


def _divergence(own: list[Found], other: list[Found], length: int) -> str:
    pairs = _pairs(own, other, length)
    groups = [f"{length}/{one['document']}" for one, _ in pairs]
    difference = paired_difference([one["kl"] for one, _ in pairs], [two["kl"] for _, two in pairs], groups)
    share = difference.value * len(pairs) / sum(two["kl"] for _, two in pairs)
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] ({share:+.0%})"
