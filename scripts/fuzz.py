"""Damage every file that a user hands to longrun, and check that it is refused in a sentence or read correctly.

    python scripts/fuzz.py [--count 1000] [--seed 0] [--kind NAME] [--case N]

Each case copies sound files of a tiny model, damages one (`fuzz_mutations`), uses it as a run would, and ends in one
of these ways; what is right is computed without longrun (`fuzz_kinds`):

    refused     a `LongrunError` whose message is one printable line of at most 500 characters
    unchanged   it works as before the damage, and that is right
    other       it works otherwise, and that is right, for the damaged file says so
    traceback   any other exception, or a message that is no such line
    hang        longer than --limit seconds
    wrong       it works, and the result is not what the files mean

The last line is JSON; the exit status is 1 where a case ended in traceback, hang or wrong. A case is drawn from seed,
kind and number alone: `--seed S --kind K --case N` repeats it, with its traceback.
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longrun.arguments import COUNT, SEED, real, whole
from longrun.cli import Parser, run
from longrun.errors import MESSAGE_LIMIT, InputError, LongrunError
from scripts.fuzz_kinds import Bench, Kind

ENDINGS = ("refused", "unchanged", "other", "traceback", "hang", "wrong")
FAILURES = ("traceback", "hang", "wrong")
# Turns of the kinds, so that each gets as many cases as it has ways to fail.
TURNS = (
    "config", "weights", "tokenizer", "session", "config", "adapter", "weights", "head map", "config", "session",
    "generation", "weights", "tokenizer", "adapter", "budget", "gguf", "gguf", "text",
    "html", "pdf", "questions", "archive",
)  # fmt: skip


class Hang(BaseException):
    """A case took too long. No `Exception`, so that no handler on the way catches it."""


@dataclass(frozen=True)
class Ending:
    """How a case ended, with the damage and, of a failure or a refusal, what was said."""

    kind: str
    case: int
    how: str
    damage: str
    said: str = ""


def run_case(bench: Bench, kind: Kind, seed: int, case: int, limit: float, scratch: Path) -> Ending:
    """One case in a folder of its own below `scratch`, which is gone afterwards."""
    rng = random.Random(f"{seed}/{kind.name}/{case}")
    folder = scratch / f"{kind.folder}-{case}"
    shutil.copytree(bench.base / kind.folder, folder)
    damage = bench.damage(kind, folder, rng)
    try:
        with _bounded(limit):
            how, said = _outcome(bench, kind, folder)
    except Hang:
        how, said = "hang", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Ending(kind.name, case, how, damage, said)


def _outcome(bench: Bench, kind: Kind, folder: Path) -> tuple[str, str]:
    try:
        result = kind.use(folder)
    except LongrunError as error:
        message = str(error)
        sound = 20 <= len(message) <= MESSAGE_LIMIT and message.isprintable()
        return "refused" if sound else "traceback", message
    except Exception:
        return "traceback", traceback.format_exc()
    try:
        right = kind.expected(folder)
    except Exception as error:
        if kind.equal(result, bench.sound[kind.name]):
            return "unchanged", ""
        return "wrong", f"others refuse it ({type(error).__name__}: {str(error)[:300]}), longrun gives {_text(result)}"
    if not kind.equal(result, right):
        return "wrong", f"longrun gives {_text(result)}, right is {_text(right)}"
    return "unchanged" if kind.equal(bench.sound[kind.name], right) else "other", ""


def _text(result: Any) -> str:
    return " ".join(str(result).split())[:200]


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise `Hang` after `seconds`; where native code does not let go for five times as long, end the process."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(5 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def fuzz(count: int, seed: int, limit: float, only: str | None = None, case: int | None = None) -> list[Ending]:
    """The endings of `count` cases, or of one; failures are printed on stderr as they come.

    Raises:
        InputError: no such kind.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    endings = []
    with tempfile.TemporaryDirectory(prefix="longrun-fuzz-") as scratch:
        (Path(scratch) / "sound").mkdir()
        bench = Bench(Path(scratch) / "sound")
        kinds = {kind.name: kind for kind in bench.kinds}
        if only is not None and only not in kinds:
            raise InputError(f"kind {only!r} is unknown: use one of {', '.join(kinds)}")
        turns = TURNS if only is None else (only,)
        for number in range(count) if case is None else (case,):
            kind = kinds[turns[number % len(turns)]]
            ending = run_case(bench, kind, seed, number, limit, Path(scratch))
            endings.append(ending)
            if ending.how in FAILURES or case is not None:
                print(
                    f"{ending.kind} case {number}: {ending.how} after {ending.damage}\n{ending.said}", file=sys.stderr
                )
    return endings


def table(endings: Sequence[Ending]) -> str:
    """A line for each kind, a column for each ending."""
    counts = Counter((ending.kind, ending.how) for ending in endings)
    lines = [f"{'kind':<12}" + "".join(f"{how:>11}" for how in ENDINGS)]
    for kind in dict.fromkeys(ending.kind for ending in endings):
        lines.append(f"{kind:<12}" + "".join(f"{counts[kind, how]:>11}" for how in ENDINGS))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and one line of JSON; status 1 where a case failed."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=COUNT, default=1000, help="cases (default: 1000)")
    parser.add_argument("--seed", type=SEED, default=0, help="default: 0")
    parser.add_argument("--limit", type=real(0, above=True), default=20.0, help="seconds of a case (default: 20)")
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--case", type=whole(), help="only the case of this number")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    endings = fuzz(args.count, args.seed, args.limit, args.kind, args.case)
    print(table(endings))
    counts = Counter(ending.how for ending in endings)
    failed = [vars(ending) for ending in endings if ending.how in FAILURES]
    facts = {"seed": args.seed, "cases": len(endings), **{how: counts[how] for how in ENDINGS}}
    print(json.dumps({**facts, "seconds": round(time.perf_counter() - began, 1), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
