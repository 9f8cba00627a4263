"""What a document read sparsely keeps of its answers and its text, with the product's own steps.

    python scripts/quality/prefill_answers.py --model FOLDER_OR_FILE --lengths 120K --yarn 4 --json out.json

Documents of real code and prose are read once by every setting (`Session.prefill`), but for their last tokens, which
are predicted behind what was read, and for the questions behind them (`longrun/lab/quality/answered.py`); these read
all pages. `exact` reads everything: the others are compared with it, over the same quantized pages and in the same
chunks. *Kept* are the answers whose tokens all are still the likeliest, of those that it has right.

A setting is what a tile reads of the past, and what else it does:

* `8%`: every tile that share; `5-25% mass 0.9`: between these shares, as few as catch that much of its attention;
* `rows 4`: means by which a tile chooses; `correct`: tiles are corrected by a dense row (`PrefillSpec`);
* `exact`, and `exact bf16`: everything, over pages of another format;
* `15% + select 26%`: text and answers are predicted by decode steps that read so many pages, or that share of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from longrun.arguments import COUNT, real, whole
from longrun.cli import Parser, run
from longrun.engine.chunks import chunk_lengths, sparse_positions
from longrun.errors import InputError, quoted
from longrun.lab.quality.answered import AnsweredText, answered_prose, answered_texts
from longrun.lab.quality.code_source import standard_library
from longrun.lab.quality.judged import Judged, Known
from longrun.paths import path_option
from longrun.plan.pages_read import selection_facts
from longrun.quant.kv_format import KV_FORMATS
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.specs.prefill_spec import EXACT, TILE, PrefillSpec
from longrun.units import parse_tokens
from scripts.quality.memory import release_memory
from scripts.quality.selection_runs import add_model_options, decoded_rows, load_unselected, run_facts, with_last_rows

SETTINGS = (
    EXACT, "8%", "8% correct", "15%", "25%", "5-25% mass 0.95", "15% correct", "8% rows 4", "15% + select 26%", "40%",
    "5-25% mass 0.9 correct", "exact + select 26%", "exact bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a setting's words say.

    Attributes:
        prefill: None reads everything.
        kv_format: of the pages; None as the runtime has them.
        select: pages of a head that a decode step reads, as `longrun.load` takes it; None predicts by chunks.
    """

    name: str
    prefill: PrefillSpec | None
    kv_format: str | None = None
    select: str | None = None

    @classmethod
    def of(cls, name: str, base: PrefillSpec) -> Setting:
        """
        Args:
            base: what the setting does not say.

        Raises:
            InputError: it is not written as the module says, or asks for what `PrefillSpec` refuses.
        """
        reading, _, decoding = (part.strip() for part in name.partition("+"))
        words, select = reading.split(), decoding.split()
        try:
            if decoding and (len(select) != 2 or select[0] != "select"):
                raise ValueError(decoding)
            pages = select[1] if select else None
            if words[0] == EXACT:
                (kv_format,) = words[1:] or [None]
                if kv_format is not None and kv_format not in KV_FORMATS:
                    raise ValueError(kv_format)
                return cls(name, None, kv_format, pages)
            return cls(name, _spec(words, base), None, pages)
        except (ValueError, IndexError) as error:
            raise InputError(
                f"the setting {quoted(name)} is none: write {EXACT} or {EXACT} with one of {', '.join(KV_FORMATS)}; or "
                f"8% or 5-25% mass 0.95, and any of rows 4 and correct; and behind either + select 26%, if wanted"
            ) from error


def _spec(words: Sequence[str], base: PrefillSpec) -> PrefillSpec:
    """Raises ValueError or IndexError where the words are no setting, InputError for values out of their range."""
    least, _, cap = words[0].removesuffix("%").partition("-")
    if not words[0].endswith("%"):
        raise ValueError(words[0])
    values: dict[str, Any] = {"cap": float(cap or least) / 100}
    if cap:
        values["least"] = float(least) / 100
    rest = iter(words[1:])
    for word in rest:
        if word == "correct":
            values[word] = True
        elif word in ("mass", "rows"):
            values[word] = {"mass": float, "rows": int}[word](next(rest, ""))
        else:
            raise ValueError(word)
    if bool(cap) != ("mass" in values) or (cap and values["least"] > values["cap"]):
        raise ValueError(words[0])
    return replace(base, **values)


def predicted(session: Session, text: AnsweredText) -> Tensor:
    """float32 [rows, vocab_size], log-probabilities of the text's rows, read in one chunk or a few that see all pages.

    Args:
        session: stands at the first of the text's rows, that token included.
    """
    first = int(text.text_rows[0])
    logits = session.score(text.ids[first + 1 :])
    return logits[(text.rows - first).to(logits.device)].log_softmax(-1)


def read(session: Session, document: Tensor, setting: Setting, chunk: int, cut: PrefillSpec) -> float:
    """Seconds of reading the document, int64 [n]; in full it is cut as for reading by `cut`."""
    began, done = time.perf_counter(), 0
    if setting.prefill is not None:
        session.prefill(document).cpu()
    else:
        for size, _ in chunk_lengths(0, len(document), chunk, sparse_positions(cut, len(document))):
            session.prefill(document[done : done + size], sparse=False).cpu()
            done += size
    return time.perf_counter() - began


def measure(
    base: Runtime, texts: Sequence[AnsweredText], setting: Setting, chunk: int, cut: PrefillSpec
) -> Iterator[dict[str, Any]]:
    """Read every text by a setting.

    Args:
        cut: what any setting that reads sparsely has in common.

    Yields:
        For each text `log_probs`, float32 [rows, vocab_size], and `seconds` of reading; the last one `facts` as well.

    Raises:
        InputError: no chunk of these texts is read sparsely.
    """
    capacity = max(len(text.ids) for text in texts) + 1
    runtime = base.derive(
        ctx=capacity, chunk_size=chunk, kv_format=setting.kv_format, prefill=setting.prefill or EXACT,
        select=setting.select or "off",
    )  # fmt: skip
    session = runtime.new_session()
    empty, facts = session.mark(), {}
    for number, text in enumerate(texts):
        document = text.ids[: int(text.text_rows[0]) + 1]
        session.rewind(empty)
        seconds = read(session, document, setting, chunk, cut)
        if setting.prefill is not None and not session.sparse_tokens:
            raise InputError(
                f"the setting {quoted(setting.name)} reads all of {len(document):,} tokens in full: make --chunk or "
                f"--dense-end smaller, or --lengths larger"
            )
        sparse_tokens = session.sparse_tokens
        log_probs = predicted(session, text) if setting.select is None else decoded_rows(session, text)[0]
        if number == len(texts) - 1:
            facts = {"kv_format": session.plan.kv_format, "selection": selection_facts(session.plan)}
            if setting.prefill is not None:
                counts = session.prefill_counts
                assert counts is not None
                facts |= {"prefill": asdict(setting.prefill), **counts.to_dict()}
        yield {"log_probs": log_probs, "seconds": seconds, "sparse_tokens": sparse_tokens, "facts": facts}


def rows_of(
    base: Runtime, texts: Sequence[AnsweredText], settings: Sequence[Setting], chunk: int, cut: PrefillSpec,
    seconds: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for reading everything, and one for each setting, in order, until the time is over."""
    began = time.perf_counter()
    known, exact = [], []
    for text, found in zip(texts, measure(base, texts, Setting(EXACT, None), chunk, cut), strict=True):
        known.append(Known.of(text, found["log_probs"]))
        exact.append(found["seconds"])
    tasks = sum((one.tasks() for one in known), Counter())
    release_memory()
    yield {"setting": EXACT, "known": tasks.total(), "tasks": tasks, "read_seconds": exact, **found["facts"]}
    for setting in settings:
        if time.perf_counter() - began > seconds:
            yield {"setting": setting.name, "left_out": True}
            continue
        judged, read, sparse_tokens = Judged(), [], 0
        try:
            for one, found in zip(known, measure(base, texts, setting, chunk, cut), strict=True):
                judged.add(one, found["log_probs"].to(one.log_probs.device))
                read.append(found["seconds"])
                sparse_tokens += found["sparse_tokens"]
        finally:
            release_memory()
        yield {
            "setting": setting.name, **judged.row(tasks), "read_seconds": read, "of_exact": sum(read) / sum(exact),
            "sparse_tokens": sparse_tokens, **found["facts"],
        }  # fmt: skip


def show(row: Mapping[str, Any]) -> None:
    """Print one setting's row."""
    if row.get("left_out"):
        print(f"{row['setting']:24} left out: no time", flush=True)
        return
    line = f"{row['setting']:24} {sum(row['read_seconds']):7.2f} s of reading"
    if "kept" not in row:
        print(f"{line}, {row['known']} answers right", flush=True)
        return
    line += f" ({row['of_exact']:.2f} of exact's), kept {row['kept']} of {row['known']}"
    for name in ("read_share", "caught_share", "same_text", "same_answers"):
        if row.get(name) is not None:
            line += f", {name} {row[name]:.1%}"
    print(f"{line}, kl_text {row['kl_text']:.4f}, kl_answers {row['kl_answers']:.4f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Status 0."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_model_options(parser)
    parser.add_argument("--prose", type=whole(), default=1, help="texts of prose, besides")
    parser.add_argument("--tokens", type=COUNT, default=512, help="of the document's end, predicted")
    parser.add_argument(
        "--chunk", default="8K", help="tokens read together, in whole tiles of 128; what lies before them is the past"
    )
    parser.add_argument("--dense", default="0", metavar="TOKENS", help="chunks that begin before this token read all")
    parser.add_argument("--dense-end", type=COUNT, default=PrefillSpec.dense_end, help="newest tokens that read all")
    parser.add_argument("--floor", type=COUNT, default=PrefillSpec.floor, help="pages that a tile reads at least")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="separated by semicolons, the first ones first")
    parser.add_argument("--seconds", type=real(0), default=3600.0, help="after which no setting of a length is begun")
    parser.add_argument("--json", type=path_option, help="write the result here")
    args = parser.parse_args(argv)
    dense = parse_tokens(args.dense, "--dense", 0)
    spec = PrefillSpec(dense_tokens=dense, dense_end=args.dense_end, floor=args.floor)
    names = [name.strip() for name in args.settings.split(";") if name.strip()]
    settings = [Setting.of(name, spec) for name in names if name != EXACT]
    chunk = parse_tokens(args.chunk, "--chunk") // TILE * TILE
    if not chunk:
        raise InputError(f"--chunk {args.chunk} is less than a tile: give at least {TILE}")
    lengths, base = load_unselected(args)
    result: dict[str, Any] = {
        "benchmark": "prefill answers", **run_facts(args, base), "prose": args.prose, "chunk": chunk, "lengths": [],
    }  # fmt: skip
    for length in lengths:
        began = time.perf_counter()
        texts = list(answered_texts(base.tokenizer, standard_library()[1::2], length, args.texts, seed=0))
        texts += answered_prose(base.tokenizer, length, args.prose, seed=0)
        texts = [with_last_rows(text, args.tokens) for text in texts]
        part: dict[str, Any] = {"length": length, "text_tokens": [len(text.ids) for text in texts], "rows": []}
        result["lengths"].append(part)
        print(f"\n{length:,} tokens: texts written in {time.perf_counter() - began:.1f} s", flush=True)
        for row in rows_of(base, texts, settings, chunk, spec, args.seconds):
            part["rows"].append(row)
            part["seconds"] = time.perf_counter() - began
            show(row)
            if args.json:
                args.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run(main)
