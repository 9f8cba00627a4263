"""From the items of a comparison to estimates with intervals, each row against the reference on the same items."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from longrun.lab.quality.asked import ASKED_TASKS
from longrun.lab.quality.results import QualityResults
from longrun.lab.quality.row import REFERENCE
from longrun.lab.quality.statistics import Estimate, bootstrap, paired_difference, wilson
from longrun.lab.quality.tasks import RETRIEVAL_TASKS, TEXT_TASK
from longrun.lab.quality.texts import TEXT_TASKS
from longrun.units import format_tokens

ALL_TASKS = "all"  # the retrieval tasks together
_SHARE = (0.0, 1.0)
_APART = ("eviction", "sink_size", "recent_size", "kv_share", "kv_bytes", "keep")
_RANDOM_SEED = re.compile(r"(?<=^random)-\d+(?=:)")  # of an eviction


@dataclass(frozen=True)
class TaskSummary:
    """Answers to one task: exact match (Wilson), tokens right (bootstrap), and both less the reference's (paired).

    `kept` is exact match (Wilson) of what the reference answers right, and not by heart where that was asked; `loss`
    the expected answers' mean nats a token, less the reference's (paired), where those were measured.
    """

    exact: Estimate
    tokens: Estimate
    exact_minus_reference: Estimate | None
    tokens_minus_reference: Estimate | None
    by_depth: dict[float, Estimate] = field(default_factory=dict)
    kept: Estimate | None = None
    loss: Estimate | None = None


@dataclass(frozen=True)
class TextSummary:
    """Prediction of text: perplexity, its ratio to the reference's, KL(reference || row) in nats, top-1 agreement."""

    perplexity: Estimate
    perplexity_ratio: Estimate | None
    kl: Estimate
    top1: Estimate


@dataclass(frozen=True)
class RowSummary:
    """One row (or several of one method and size, as seeds are) at one length, or at all lengths (None).

    `kv_used` and `kv_peak` are measured bytes; `kv_computed`, of a simulated format alone, is what that would have in
    use by its spec; `kv_planned` what the plan counts for keys and values. `held` is the share of full attention's
    tokens that the heads hold. Older results have neither of the last two. `text` is prose, `texts` every kind.
    """

    name: str
    method: str
    retrieval_ratio: float | None
    length: int | None
    kv_used: float | None
    kv_peak: float | None
    tasks: dict[str, TaskSummary]
    text: TextSummary | None
    prefill_tokens_per_s: float | None
    kv_computed: float | None = None
    kv_planned: float | None = None
    held: float | None = None
    texts: dict[str, TextSummary] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; depths as strings."""
        found = asdict(self)
        for task in found["tasks"].values():
            task["by_depth"] = {f"{depth:g}": one for depth, one in task["by_depth"].items()}
        return found


def summarize(results: QualityResults, names: Iterable[str], label: str, length: int | None) -> RowSummary | None:
    """The rows `names` as one, at `length` or over all lengths; None where nothing was measured.

    All tasks together are left out at a length where some of those asked were not measured; over all lengths they are
    over what was (`not_measured`).
    """
    names = list(names)
    records = [r for r in results.records if r["row"] in names and length in (None, r["length"])]
    if not records:
        return None
    described = results.head["described"][names[0]]
    items = [
        item | {"group": f"{r['length']}/{item['document']}", "length": r["length"]}
        for r in records
        for item in r["items"]
    ]
    if len(names) > 1:
        items = _averaged(items)
    reference = {
        identity(item, r["length"]): item for r in results.records if r["row"] == REFERENCE for item in r["items"]
    }
    compared = REFERENCE not in names
    tasks = {}
    partial = length is not None and any(_lacks_answers(results, name, length) for name in names)
    for task in (*RETRIEVAL_TASKS, *ASKED_TASKS, *(() if partial else (ALL_TASKS,))):
        own = [item for item in items if "task" in item and task in (ALL_TASKS, item["task"])]
        if own:
            tasks[task] = _task(own, reference if compared else None, repeated=len(names) > 1)
    texts = {}
    for kind in TEXT_TASKS:
        own = [item for item in items if "task" not in item and item["document"].partition("/")[0] == kind]
        if own:
            texts[kind] = _text(own, reference if compared else None)
    bytes_used = [r["kv"]["used"] for r in records]
    computed = [r["kv"]["computed"] for r in records if "computed" in r["kv"]]
    return RowSummary(
        label, described["method"], described["retrieval_ratio"], length,
        None if length is None else sum(bytes_used) / len(bytes_used),
        None if length is None else max(r["kv"]["peak"] for r in records),
        tasks, texts.get(TEXT_TASK),
        _mean(records, "prefill_tokens_per_s"),
        sum(computed) / len(computed) if computed and length is not None else None,
        None if length is None else _mean([r["kv"] for r in records], "planned"),
        None if length is None else _held([r["kv"] for r in records]),
        texts,
    )  # fmt: skip


def identity(item: dict[str, Any], length: int) -> tuple[Any, ...]:
    """What makes items of two rows the same question, or the same stretch of a text."""
    if "task" in item:
        return (length, item["task"], item["document"], item["depth"], item["expected"], item.get("question"))
    return (length, TEXT_TASK, item["document"], item["block"])


def _averaged(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several rows answered the same questions, which are not that many independent ones: one item a question."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in items:
        found.setdefault(identity(item, item["length"]), []).append(item)
    measured = ("exact", "token_accuracy", "answer_nll", "nll", "kl", "top1")
    return [
        same[0] | {key: sum(one[key] for one in same) / len(same) for key in measured if key in same[0]}
        for same in found.values()
    ]


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    found = [record[key] for record in records if key in record]
    return sum(found) / len(found) if found else None


def _held(kv: list[dict[str, Any]]) -> float | None:
    found = [one["tokens"] / one["full_tokens"] for one in kv if "tokens" in one]
    return sum(found) / len(found) if found else None


def _task(
    own: list[dict[str, Any]], reference: dict[tuple[Any, ...], dict[str, Any]] | None, repeated: bool
) -> TaskSummary:
    """`repeated`: items are means over several rows, so that an answer is no longer right or wrong."""
    groups = [item["group"] for item in own]
    depths = sorted({item["depth"] for item in own})
    by_depth = {}
    for depth in depths:
        there = [item["exact"] for item in own if item["depth"] == depth]
        if not repeated:
            by_depth[depth] = wilson(sum(there), len(there))
    exact, tokens = [float(item["exact"]) for item in own], [item["token_accuracy"] for item in own]
    differences: dict[str, Estimate | None] = {"exact": None, "token_accuracy": None}
    others = [reference.get(identity(item, item["length"])) for item in own] if reference is not None else []
    both = [(item, other) for item, other in zip(own, others, strict=False) if other is not None]
    if both:
        for key in differences:
            differences[key] = paired_difference(
                [float(one[key]) for one, _ in both], [float(other[key]) for _, other in both],
                [one["group"] for one, _ in both], (-1.0, 1.0),
            )  # fmt: skip
    known = [(item, other) for item, other in both if other["exact"] and not other.get("known")]
    kept, loss = None, None
    if known:
        answers = [float(item["exact"]) for item, _ in known]
        groups_known = [item["group"] for item, _ in known]
        kept = bootstrap(answers, groups_known, _SHARE) if repeated else wilson(int(sum(answers)), len(answers))
    if told := [(item, other) for item, other in both if "answer_nll" in item and "answer_nll" in other]:
        loss = paired_difference(
            [item["answer_nll"] for item, _ in told], [other["answer_nll"] for _, other in told],
            [item["group"] for item, _ in told],
        )  # fmt: skip
    return TaskSummary(
        bootstrap(exact, groups, _SHARE) if repeated else wilson(int(sum(exact)), len(exact)),
        bootstrap(tokens, groups, _SHARE),
        differences["exact"],
        differences["token_accuracy"],
        by_depth,
        kept,
        loss,
    )


def _text(own: list[dict[str, Any]], reference: dict[tuple[Any, ...], dict[str, Any]] | None) -> TextSummary:
    groups = [item["group"] for item in own]
    nll = bootstrap([item["nll"] for item in own], groups)
    ratio = None
    others = [reference.get(identity(item, item["length"])) for item in own] if reference is not None else []
    both = [(item, other) for item, other in zip(own, others, strict=False) if other is not None]
    if both:
        ratio = _exp(
            paired_difference(
                [one["nll"] for one, _ in both], [other["nll"] for _, other in both], [one["group"] for one, _ in both]
            )
        )
    return TextSummary(
        _exp(nll),
        ratio,
        bootstrap([item["kl"] for item in own], groups),
        bootstrap([i["top1"] for i in own], groups, _SHARE),
    )


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(math.exp(estimate.value), math.exp(estimate.low), math.exp(estimate.high), estimate.count)


def families(results: QualityResults) -> dict[str, list[str]]:
    """Rows of one method that differ by name and head map, or random tokens' seed: label -> names, two or more."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in results.head["rows"]:
        described = results.head["described"].get(row["name"])
        if described is not None and row["name"] != REFERENCE:
            apart = (_RANDOM_SEED.sub("", str(row.get(name))) for name in _APART)
            key = (described["method"], described["retrieval_ratio"], *apart)
            found.setdefault(key, []).append(row["name"])
    labels = {}
    for (method, ratio, eviction, *_), names in found.items():
        if len(names) > 1:
            size = "" if ratio is None else f", {ratio:.0%} of heads"
            size += "" if eviction == "none" else f", {eviction.partition(':')[2].removesuffix('@document')}"
            labels[f"{method}{size} ({len(names)} rows)"] = names
    return labels


def beside(results: QualityResults, base: str) -> list[dict[str, Any]]:
    """Each row's exact match less that of the row `base` on the same questions, over all retrieval tasks.

    What a head split costs apart from its page format, say, is its difference to full attention in that format.

    Returns:
        JSON-able: row, length, and `exact`, an `Estimate`'s fields; for each row and length where
        both answered everything that was asked.
    """
    answers = {
        (record["row"], *identity(item, record["length"])): (item, f"{record['length']}/{item['document']}")
        for record in results.records
        for item in record["items"]
        if "task" in item
    }
    found = []
    for row in (row["name"] for row in results.head["rows"] if row["name"] != base):
        for length in results.head["settings"]["lengths"]:
            pairs = [
                (float(item["exact"]), float(answers[base, *key[1:]][0]["exact"]), group)
                for key, (item, group) in answers.items()
                if key[:2] == (row, length) and (base, *key[1:]) in answers
            ]
            if pairs and not any(_lacks_answers(results, name, length) for name in (row, base)):
                exact = paired_difference(*map(list, zip(*pairs, strict=True)), bounds=(-1.0, 1.0))
                found.append({"row": row, "length": length, "exact": exact.to_dict()})
    return found


def not_measured(results: QualityResults, row: str) -> list[str]:
    """What a row lacks of what was asked, as `16K (keyvalue)`."""
    return [
        f"{format_tokens(length)} ({group})"
        for length in results.head["settings"]["lengths"]
        for group in _lacks(results, row, length)
    ]


def _lacks(results: QualityResults, row: str, length: int) -> list[str]:
    """Of the groups of tasks asked at a length, those without a record of the row."""
    return [group for group in results.settings_at(length)["tasks"] if results.get(row, length, group) is None]


def _lacks_answers(results: QualityResults, row: str, length: int) -> bool:
    return any(group not in TEXT_TASKS for group in _lacks(results, row, length))


def verdict(difference: Estimate) -> str:
    """What the interval of a difference to the reference says."""
    if difference.high < 0:
        return "worse than the reference"
    if difference.low > 0:
        return "better than the reference"
    return "no difference to the reference seen"


def sentences(results: QualityResults) -> list[str]:
    """One line a row, over all lengths and retrieval tasks, and one for rows that differ by their seed alone."""
    lines = []
    names = {row["name"]: [row["name"]] for row in results.head["rows"]}
    for label, members in {**names, **families(results)}.items():
        row = summarize(results, members, label, None)
        if row is None:
            continue
        parts = []
        if ALL_TASKS in row.tasks:
            task = row.tasks[ALL_TASKS]
            parts.append(f"exact {percent(task.exact)}, tokens {percent(task.tokens)}")
            if task.exact_minus_reference is not None:
                difference = task.exact_minus_reference
                parts.append(f"exact minus reference {points(difference)}: {verdict(difference)}")
        if row.text is not None and row.text.perplexity_ratio is not None:
            ratio = row.text.perplexity_ratio
            parts.append(f"perplexity x {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
        if gaps := dict.fromkeys(gap for name in members for gap in not_measured(results, name)):
            parts.append(f"not measured: {', '.join(gaps)}")
        lines.append(f"{label}: {'; '.join(parts)}")
    return lines


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
