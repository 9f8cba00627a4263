"""How many of the pages that decode steps select stand in a pool of those selected lately, by the pool's size.

    python scripts/quality/selection_hits.py --model FOLDER_OR_FILE --lengths 64K --budgets 512,6% --json out.json

The product's own decode steps select pages, token by token: along the last tokens of a document of real code (`text`),
and along what the model writes after a question about it, which is read in a chunk (`answers`). Pools keep the pages
of each head that were selected last, as the hot pool does (`kernels/hot_pages.py`), in sizes of a multiple of the pages
that a step reads; one recording gives all of them. The newest pages, which always are read and stand on the device, do
not count, and neither does what the first steps find while the pools fill.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from torch import Tensor

from longrun.arguments import COUNT
from longrun.attention.selected_pages import PageSelector
from longrun.cli import Parser, run
from longrun.kernels.page_view import PageView
from longrun.kernels.prepared_call import PreparedCall
from longrun.lab.quality.answered import AnsweredText, answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.selection_rules import PAGE, pages_of
from longrun.paths import path_option
from longrun.plan.pages_read import selection_facts
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.selection_spec import DEFAULT_NEWEST
from scripts.quality.memory import release_memory
from scripts.quality.selection_runs import add_model_options, load_unselected, run_facts

SIZES = (1, 2, 4, 8, 16)  # pages of a pool, in pages that a step reads
WARM_STEPS = 16


class Choices:
    """Keeps a copy of what every layer's last step chose, which a captured graph writes as well."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def noted(self) -> ExitStack:
        """Within it, selectors are followed by the copy: those of a step, and those of calls prepared for all steps."""
        choose, prepare = PageSelector.choose, PageSelector.prepare

        def choosing(selector: PageSelector, q: Tensor, view: PageView, pages: Any) -> None:
            choose(selector, q, view, pages)
            self._note(selector, view, pages)

        def preparing(selector: PageSelector, select: Any, q: Tensor, view: PageView, pages: Any) -> list[PreparedCall]:
            calls = prepare(selector, select, q, view, pages)
            return [*calls, PreparedCall(self._note, selector, view, pages)]

        patched = ExitStack()
        patched.enter_context(patch.object(PageSelector, "choose", choosing))
        patched.enter_context(patch.object(PageSelector, "prepare", preparing))
        return patched

    def _note(self, selector: PageSelector, view: PageView, pages: Any) -> None:
        chosen = selector.chosen(view)
        if id(pages) not in self._held:  # in a trial run, before anything is captured
            self._held[id(pages)] = chosen.pages.clone(), chosen.counts.clone()
        held_pages, held_counts = self._held[id(pages)]
        held_pages.copy_(chosen.pages)
        held_counts.copy_(chosen.counts)

    def lists(self, newest: int) -> list[np.ndarray]:
        """Page numbers of every layer's heads in turn, without the newest."""
        found = []
        for pages, counts in self._held.values():
            rows = pages.cpu().numpy()
            found += [row[: count - newest] for row, count in zip(rows, counts.tolist(), strict=True)]
        return found


@dataclass
class Pools:
    """What pools of all sizes would hold: a page stands in one of n slots if fewer than n were used after it.

    Attributes:
        slots: slots of a head in each pool.
        asked: pages chosen after `WARM_STEPS`; hits: of them those that a pool of each size had.
    """

    slots: Sequence[int]
    asked: int = 0
    hits: list[int] = field(default_factory=list)
    _used: dict[int, np.ndarray] = field(default_factory=dict)
    _steps: int = 0

    def step(self, lists: Sequence[np.ndarray], num_pages: int) -> None:
        """One step's choices by head, in the order of their lists, below `num_pages`."""
        self.hits = self.hits or [0] * len(self.slots)
        for head, pages in enumerate(lists):
            used = self._used.setdefault(head, np.full(num_pages, -1, dtype=np.int64))
            later = len(used) - np.searchsorted(np.sort(used), used[pages], side="right")
            known = used[pages] >= 0
            if self._steps >= WARM_STEPS:
                self.asked += len(pages)
                for i, count in enumerate(self.slots):
                    self.hits[i] += int((known & (later < count)).sum())
            used[pages] = self._steps * num_pages + np.arange(len(pages))
        self._steps += 1

    def rates(self) -> list[float]:
        return [found / max(1, self.asked) for found in self.hits]


def measure(base: Runtime, texts: Sequence[AnsweredText], select: int, tokens: int) -> dict[str, Any]:
    """Hit rates of both kinds of tokens for steps that read `select` pages, over all texts."""
    found: dict[str, list[Pools]] = {"text": [], "answers": []}
    capacity = max(len(text.ids) for text in texts) + tokens + 1
    for text in texts:
        choices = Choices()
        with choices.noted():
            runtime = base.derive(ctx=capacity, select=select, select_from=0)
            session = runtime.new_session()
            for kind, pools in record(session, text, choices, [n * select for n in SIZES], tokens).items():
                found[kind].append(pools)
        facts, num_pages = selection_facts(session.plan), session.cache.spec.pages_per_head
        del session, runtime
        release_memory()
    return {
        "pages": select, "of": num_pages, "selection": facts,
        **{kind: {"asked": sum(p.asked for p in pools), "hit_rates": joined(pools)} for kind, pools in found.items()},
    }  # fmt: skip


def record(
    session: Session, text: AnsweredText, choices: Choices, slots: Sequence[int], tokens: int
) -> dict[str, Pools]:
    """Read a text and write an answer to its first question; pools by kind of tokens."""
    assert session.plan.attention.selects, "no head has more pages than a step reads"
    num_pages, end, answer = session.cache.spec.pages_per_head, text.document_length, int(text.answers[0][1][0])
    pools = {"text": Pools(slots), "answers": Pools(slots)}

    def take(token_id: int, kind: str) -> Tensor:
        logits = session.prefill([token_id], one_by_one=True)
        pools[kind].step(choices.lists(DEFAULT_NEWEST), num_pages)
        return logits

    session.prefill(text.ids[: end - tokens])
    for token_id in text.ids[end - tokens : end].tolist():
        take(token_id, "text")
    logits = session.prefill(text.ids[end : answer + 1])
    for _ in range(tokens):
        logits = take(int(logits.argmax()), "answers")
    return pools


def joined(pools: Sequence[Pools]) -> dict[int, float]:
    """Hit rates of several texts together, by `SIZES`."""
    asked = max(1, sum(pool.asked for pool in pools))
    return {size: sum(pool.hits[i] for pool in pools) / asked for i, size in enumerate(SIZES)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_model_options(parser)
    parser.add_argument("--tokens", type=COUNT, default=256, help="of the document's end, and written")
    parser.add_argument("--budgets", default="26%,13%,6%", help="pages of a head, or shares of all")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args(argv)
    lengths, base = load_unselected(args)
    result: dict[str, Any] = {
        "benchmark": "selection hits", **run_facts(args, base), "warm_steps": WARM_STEPS,
        "lengths": [],
    }  # fmt: skip
    for length in lengths:
        began, rows = time.perf_counter(), []
        texts = list(answered_texts(base.tokenizer, standard_library()[1::2], length, args.texts, seed=0))
        result["lengths"].append({"length": length, "rows": rows})
        for budget in args.budgets.split(","):
            select = max(DEFAULT_NEWEST + 1, pages_of(budget, len(texts[0].ids) // PAGE))
            rows.append({"budget": budget, **measure(base, texts, select, args.tokens)})
            print(f"{length:,} tokens, {select:,} of {rows[-1]['of']:,} pages ({budget}):", flush=True)
            for kind in ("text", "answers"):
                rates = ", ".join(f"{size}x {rate:.1%}" for size, rate in rows[-1][kind]["hit_rates"].items())
                print(f"  {kind}: {rates}", flush=True)
            result["lengths"][-1]["seconds"] = time.perf_counter() - began
            if args.json:
                args.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
