"""How few pages of the past a document can be read with: mass by head, what selectors find of it, and what is lost.

    python scripts/quality/prefill_probe.py --model FOLDER_OR_FILE --lengths 8K --json out.json

1. Mass: a text is read under full attention. For tiles of 128 queries of one query head, from its second half, how many
   pages hold the attention to what lies before the tile's chunk, and how much of it selectors and rules catch
   (`longrun.lab.prefill_selectors`, `prefill_choice`, `prefill_mass`).
2. Settings: documents are read by a setting (`longrun.lab.prefill_sparse`), but for their last tokens, which are
   compared with full attention as running text behind what was read sparsely, and for the questions behind them
   (`longrun.lab.quality.answered`), which are read in full: answers kept, KL, equal likeliest tokens.

A setting is a selector, a share and what else it does: "means 8% delta tail".
relative, absolute, left, weighed: rules of `longrun.lab.prefill_choice`, at a level that reads this share of the pages
where the mass was measured; delta: correction by dense rows; ends: first and last two layers in full; first: the first
two alone; tail: a document's last 2,048 tokens in full.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from longrun.arguments import COUNT, real, whole
from longrun.attention.whole_text import WholeTextAttention
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.lab.prefill_choice import LEVELLED, RULES, Choice, Limits
from longrun.lab.prefill_mass import HELD, LEVELS, LOST, SHARES, MassMeasure, MassTable
from longrun.lab.prefill_selectors import SELECTORS, TILE
from longrun.lab.prefill_sparse import Reading, SparsePrefill
from longrun.lab.quality.answered import AnsweredText, answered_prose, answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.quality.judged import Judged, Known
from longrun.units import parse_tokens
from scripts.quality.reach_probe import Model
from scripts.quality.selection_probe import started

TAIL = 2048
CODE, PROSE = "code", "prose"
SETTINGS = (
    "means 8%", "mean 1 8% absolute", "mean 1 8%", "mean 1 8% absolute delta", "means 8% delta", "mean 1 8% left",
    "means 15%", "mean 1 15% absolute", "mean 1 15% absolute delta", "means 5%", "mean 1 5% absolute", "means 25%",
    "mean 1 25% absolute", "mean 1 8% absolute first", "mean 1 8% absolute tail", "digest 8%", "bands 8%",
    "diagonals 16 8%", "means 1 8% absolute", "mean 1 15% left", "mean 1 8% absolute ends", "sampled 8% absolute",
    "mean 1 8% relative", "perfect 8% absolute",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a setting's words say."""

    name: str
    selector: str
    share: float
    words: frozenset[str]

    @classmethod
    def of(cls, name: str) -> Setting:
        """
        Raises:
            InputError: it is not written as the module says.
        """
        words = name.split()
        at = next((i for i, word in enumerate(words) if word.endswith("%")), 0)
        selector, rest = " ".join(words[:at]), frozenset(words[at + 1 :])
        known = {"delta", "ends", "first", "tail", *RULES}
        try:
            share = float(words[at][:-1]) / 100 if at else 0.0
        except ValueError:
            share = 0.0
        if selector not in SELECTORS or not 0 < share <= 1 or rest - known or len(rest & set(RULES)) > 1:
            raise InputError(
                f"the setting {name!r} is none: write a selector ({', '.join(SELECTORS)}), a share as 8%, and any of "
                f"{', '.join(sorted(known))}, of {', '.join(RULES)} one"
            )
        return cls(name, selector, share, rest)

    def reading(
        self, text: AnsweredText, layers: int, table: MassTable | None, chunk: int, limits: Limits, text_rows: int
    ) -> Reading:
        """How a text is read.

        Raises:
            InputError: a level is needed, and no mass was measured.
        """
        rule = next(iter(self.words & set(RULES)), "share")
        level = None
        if rule in LEVELLED:
            if table is None or (self.selector, rule) not in table.levelled:
                raise InputError(
                    f"the setting {self.name!r} needs the mass of its selector: give --mass-texts and --selectors"
                )
            level = table.level(self.selector, rule, self.share)
        ends = {0, 1} if self.words & {"ends", "first"} else set()
        if "ends" in self.words:
            ends |= {layers - 2, layers - 1}
        last = max(TAIL, text_rows) if "tail" in self.words else text_rows
        return Reading(
            Choice(self.selector, self.share, rule, level), limits, chunk,
            max(text.document_length - last, 0) // TILE * TILE, "delta" in self.words, dense_layers=frozenset(ends),
        )  # fmt: skip


def measured(
    model: Model, text: AnsweredText, tiles: int, chunk: int, selectors: Sequence[str], limits: Limits, table: MassTable
) -> None:
    """Add a text's mass to the table; tiles stand evenly in the second half of the document."""
    first, last = max(chunk, text.document_length // 2) // TILE, text.document_length // TILE - 1
    count = min(tiles, last - first + 1)
    starts = [TILE * (first + i * (last - first) // max(count - 1, 1)) for i in range(count)]
    attention = MassMeasure(
        model.group, model.scale, starts, chunk, model.rotary.scaling, selectors, limits, table
    )  # fmt: skip
    model.predicted(replace(text, text_rows=text.text_rows[:1], answers=text.answers[:1]), attention)


def mass_of(table: MassTable) -> dict[str, Any]:
    """JSON-able means over tiles."""
    n = table.tiles
    past, held, lost = (x / n for x in (table.past, table.held, table.lost))
    selectors = {}
    for (selector, rule), caught in table.caught.items():
        by_head = caught / n / past[..., None].clamp_min(1e-9)
        selectors.setdefault(selector, {"cost": SELECTORS[selector].cost, "rules": {}})["rules"][rule] = {
            "caught": _rounded((caught / n).mean((0, 1)).tolist()),
            "of_past": _rounded((caught.mean((0, 1)) / n / past.mean()).tolist()),
            "worst_layer": _rounded((caught / n).mean(1).div(past.mean(1)[:, None]).amin(0).tolist()),
            "tenth_of_heads": _rounded(by_head.flatten(0, 1).quantile(0.1, 0).tolist()),
        }
    for (selector, rule), found in table.levelled.items():
        selectors[selector]["rules"][rule] = {
            "read": _rounded((found[0] / n).tolist()), "caught_by_level": _rounded((found[1] / n).tolist()),
            "caught": [table.caught_at(selector, rule, share) for share in SHARES],
        }  # fmt: skip
    return {
        "tiles": n, "past": past.mean().item(), "held": _rounded(held.mean((0, 1)).tolist()),
        "lost": _rounded(lost.mean((0, 1)).tolist()), "past_by_head": _rounded(past.tolist()),
        "held_95_by_head": _rounded(held[..., 1].tolist()), "lost_1_by_head": _rounded(lost[..., 2].tolist()),
        "by_tile": _rounded(table.by_tile), "selectors": selectors,
    }  # fmt: skip


def _rounded(x: Any) -> Any:
    return [_rounded(one) for one in x] if isinstance(x, list | tuple) else round(x, 5)


def show_mass(kind: str, found: Mapping[str, Any]) -> None:
    percent = " ".join(f"{100 * x:5.1f}" for x in (*found["held"], *found["lost"]))
    print(f"{kind}: {100 * found['past']:.1f}% of the attention goes to the past; pages that hold 90, 95, 99% of that, "
          f"and all but 5, 2, 1% of everything: {percent}%")  # fmt: skip
    print(f"{'of the past, caught by':26}" + "".join(f"{100 * share:8.0f}%" for share in SHARES))
    for selector, every in found["selectors"].items():
        for rule, row in every["rules"].items():
            each = ("-" if x is None else f"{100 * x / found['past']:.1f}" for x in row["caught"])
            values = "".join(f"{x:>9}" for x in each)
            print(f"{selector + ' ' + rule:26}{values}")
    sys.stdout.flush()


def settings_of(
    model: Model, texts: Sequence[AnsweredText], settings: Sequence[Setting], table: MassTable | None, chunk: int,
    limits: Limits, seconds: float, text_rows: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each setting, in order, until the time is over."""
    began = time.perf_counter()
    behind = [torch.arange(text.document_length - text_rows, text.document_length - 1) for text in texts]
    known = [
        Known.of(text, model.predicted(text, WholeTextAttention(model.group, model.scale, 0)))
        for text in (replace(text, text_rows=rows) for text, rows in zip(texts, behind, strict=True))
    ]
    tasks = sum((one.tasks() for one in known), Counter())
    print(f"{len(texts)} texts read in full: {time.perf_counter() - began:.1f} s", flush=True)
    layers, heads = model.shape[0], model.shape[1] * model.group
    for setting in settings:
        if time.perf_counter() - began > seconds:
            yield {"setting": setting.name, "left_out": True}
            continue
        start, judged, read, rows = time.perf_counter(), Judged(), [0, 0], 0
        caught, alike = torch.zeros(layers, heads), torch.zeros(layers, 2)
        for one in known:
            reading = setting.reading(one.text, layers, table, chunk, limits, text_rows)
            attention = SparsePrefill(model.group, model.scale, model.rotary.scaling, layers, heads, reading)
            judged.add(one, model.predicted(one.text, attention))
            read = [a + b for a, b in zip(read, attention.read, strict=True)]
            caught, rows, alike = caught + attention.caught, rows + attention.rows, alike + attention.alike
        sparse = [i for i in range(layers) if i not in reading.dense_layers]
        if not read[1]:
            raise InputError(
                f"the setting {setting.name!r} reads all of {len(one.text.ids):,} tokens in full: make --chunk smaller "
                f"or --lengths larger"
            )
        caught, alike = caught[sparse] / rows, alike[sparse]
        yield {
            "setting": setting.name, "level": reading.choice.level, "read": read[0] / read[1],
            "caught": caught.mean().item(), "caught_worst_layer": caught.mean(1).min().item(),
            "caught_tenth_of_heads": caught.quantile(0.1).item(), "caught_by_layer": _rounded(caught.mean(1).tolist()),
            "errors_alike": _rounded((alike[:, 0] / alike[:, 1].clamp_min(1e-9)).tolist()), **judged.row(tasks),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip


def options(parser: Parser) -> None:
    """What is measured."""
    parser.add_argument("--chunk", default="8K", help="tokens read together; what lies before them is the past")
    parser.add_argument("--prose", type=whole(), default=1, help="texts of prose, besides")
    parser.add_argument("--mass-texts", type=whole(), default=1, help="of each kind, whose mass is measured")
    parser.add_argument("--tiles", type=COUNT, default=24, help="of each of those")
    parser.add_argument(
        "--selectors", default=";".join(SELECTORS), help="whose caught mass is measured; semicolons between"
    )
    parser.add_argument("--floor", type=COUNT, default=16, help="pages that are read at least")
    parser.add_argument("--lam", type=real(0), default=0.25, help="weight of the digest's half-ranges")
    parser.add_argument("--text-rows", type=COUNT, default=512, help="of running text behind what is read sparsely")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="separated by semicolons, the first ones first")
    parser.add_argument("--seconds", type=real(0), default=3600.0, help="after which no setting of a length is begun")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    args, runtime, model, result = started(__doc__, argv, 2, options)
    chunk, limits = parse_tokens(args.chunk, "--chunk") // TILE * TILE, Limits(args.newest, args.floor, args.lam)
    settings = [Setting.of(name.strip()) for name in args.settings.split(";") if name.strip()]
    selectors = [name.strip() for name in args.selectors.split(";")]
    if set(selectors) - set(SELECTORS) or not chunk:
        raise InputError(
            f"--selectors {args.selectors}, --chunk {args.chunk}: take some of {', '.join(SELECTORS)}, 128 up"
        )
    result |= {
        "benchmark": "prefill probe", "text_rows": args.text_rows, "tile": TILE, "chunk": chunk, "floor": args.floor,
        "lam": args.lam, "held": HELD, "lost": LOST, "shares": SHARES, "levels": LEVELS, "lengths": [],
    }  # fmt: skip
    heads = model.shape[1] * model.group

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result))

    for length in (parse_tokens(one, "--lengths") for one in args.lengths.split(",")):
        began = time.perf_counter()
        texts = {
            CODE: list(answered_texts(runtime.tokenizer, standard_library()[1::2], length, args.texts, seed=0)),
            PROSE: list(answered_prose(runtime.tokenizer, length, args.prose, seed=0)),
        }  # fmt: skip
        part: dict[str, Any] = {"length": length, "tokens": {k: [len(t.ids) for t in v] for k, v in texts.items()}}
        result["lengths"].append(part)
        print(f"\n{length:,} tokens: texts written in {time.perf_counter() - began:.1f} s", flush=True)
        tables = {kind: MassTable.empty(model.shape[0], heads, model.decoder.device) for kind in texts}
        part["mass"] = {}
        for kind, some in texts.items():
            for text in some[: args.mass_texts]:
                measured(model, text, args.tiles, chunk, selectors, limits, tables[kind])
            if tables[kind].tiles:
                part["mass"][kind] = mass_of(tables[kind])
                show_mass(kind, part["mass"][kind])
        part["mass_seconds"] = time.perf_counter() - began
        print(f"mass: {part['mass_seconds']:.1f} s", flush=True)
        part["rows"] = []
        save()
        table = tables[CODE] if tables[CODE].tiles else None
        every = [text for some in texts.values() for text in some]
        rows = settings_of(model, every, settings, table, chunk, limits, args.seconds, args.text_rows)
        for row in rows if settings else ():
            part["rows"].append(row)
            show(row)
            save()
        part["seconds"] = time.perf_counter() - began
        save()
    return 0


def show(row: Mapping[str, Any]) -> None:
    """Print one setting's row."""
    if row.get("left_out"):
        print(f"{row['setting']:28} left out: no time")
        return
    percent = " ".join(f"{name} {100 * row[name]:6.2f}%" for name in ("read", "caught", "same_text", "same_answers"))
    kl = " ".join(f"{name} {row[name]:.4f}" for name in ("kl_text", "kl_answers"))
    print(
        f"{row['setting']:28} kept {row['kept']:3} of {row['known']:3} {percent} {kl} {row['seconds']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
