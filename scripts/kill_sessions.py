#!/usr/bin/env python
"""Kill a prefill that keeps its session, again and again, and check that nothing is lost; JSON is the last line.

    python scripts/kill_sessions.py [--kills 100] [--seed 0] [--tokens 3000] [--chunk-size 50] [--prefill sparse]

A child process resumes the session in a folder and reads on; after a random time it gets SIGKILL, in the middle of a
chunk or of a save. Every time the folder must load, hold every chunk that was reported as read, and nothing but the
text. A text read to its end must continue with the same tokens as a run that was never interrupted, and the next text
begins. With --prefill sparse every chunk but the first and the last ones is read sparsely, and the folder must also
know of how many of its tokens. Exit status 1 where one of this fails. It takes a POSIX system (fork); the model is a
planted one of a few MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked: no thread pool may be there
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import longrun
from longrun import cli
from longrun.arguments import COUNT, SEED
from longrun.errors import InputError, LongrunError
from longrun.lab.planted import make_planted_model
from longrun.paths import path_option
from longrun.runtime.runtime import Runtime
from longrun.session.manifest import Manifest
from longrun.session.session import Session
from longrun.session.store import is_session
from longrun.specs.prefill_spec import EXACT, PREFILL_MODES, SPARSE, PrefillSpec

CHUNKS_A_LIFE = 6
SPARSE_SPEC = PrefillSpec(dense_tokens=0, dense_end=64, floor=4, newest=2)  # leaves out pages of short texts, too
NEXT_TOKENS = 20


@dataclass
class Text:
    """One text, read through many kills.

    Attributes:
        sparse_tokens: tokens read -> those of them that an uninterrupted run has read sparsely then.
        kills: children killed over it; in_save: of those, how many left files that no manifest names.
        most_behind: the most tokens by which a folder was behind what had been reported as read; must be 0.
        faults: what was wrong, in words.
    """

    seed: int
    token_ids: list[int]
    expected: list[int]
    sparse_tokens: dict[int, int]
    kills: int = 0
    in_save: int = 0
    most_behind: int = 0
    faults: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, print a line a text and the JSON. Status 1 where something was lost; bad input raises a LongrunError."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    chance, began, texts = random.Random(args.seed), time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="kill-sessions-") as scratch:
        model_dir = args.model or make_planted_model(Path(scratch) / "model").path
        runtime = longrun.load(
            model_dir, device="cpu", ctx=args.tokens + NEXT_TOKENS + 1, chunk_size=args.chunk_size, kv_format=args.kv,
            prefill=SPARSE_SPEC if args.prefill == SPARSE else EXACT,
        )  # fmt: skip
        print(f"{'text':>6} {'kills':>6} {'in a save':>10} {'tokens behind':>14}  after its end")
        while sum(text.kills for text in texts) < args.kills:
            text = make_text(runtime, args.seed + len(texts), args.tokens)
            texts.append(text)
            left = args.kills - sum(other.kills for other in texts)
            read_through(runtime, text, Path(scratch) / f"session-{text.seed}", left, chance)
            outcome = "; ".join(text.faults) or "equal tokens"
            print(f"{text.seed:>6} {text.kills:>6} {text.in_save:>10} {text.most_behind:>14,}  {outcome}", flush=True)
    faults = [fault for text in texts for fault in text.faults]
    records = [asdict(text) for text in texts]
    for record in records:
        del record["token_ids"], record["expected"]
        record["sparse_tokens"] = record["sparse_tokens"][args.tokens]
    result = {
        "kills": sum(text.kills for text in texts),
        "kills_in_save": sum(text.in_save for text in texts),
        "texts": len(texts),
        "most_tokens_behind": max(text.most_behind for text in texts),
        "faults": faults,
        "settings": {key: value for key, value in vars(args).items() if key != "model"},
        "seconds": round(time.perf_counter() - began, 1),
        "records": records,
    }
    print(json.dumps(result))
    return 1 if faults else 0


def make_text(runtime: Runtime, seed: int, num_tokens: int) -> Text:
    """Random tokens, and what an uninterrupted run says after them."""
    chance = random.Random(f"text/{seed}")
    token_ids = [chance.randrange(runtime.config.vocab_size) for _ in range(num_tokens)]
    session, sparse = runtime.new_session(), {0: 0}
    session.prefill(token_ids, lambda done, total: sparse.update({done: session.sparse_tokens}))
    return Text(seed, token_ids, list(session.generate(NEXT_TOKENS, eos=False)), sparse)


def read_through(runtime: Runtime, text: Text, folder: Path, kills: int, chance: random.Random) -> None:
    """Read `text` to its end, with at most `kills` kills on the way."""
    life = 0.1
    while not text.faults:
        child, reports = start_child(runtime, text, folder)
        if text.kills < kills:
            time.sleep(chance.uniform(0, life))
            os.kill(child, signal.SIGKILL)
        told = [int(line) for line in reports.read().split()]  # until the child is gone
        reports.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            text.faults.append(f"a child ended with status {status}")
            return
        if status == 0:
            check_end(runtime, text, folder)
            return
        text.kills += 1
        check_after_kill(runtime, text, folder, told)
        life *= 1.2 if len(told) < CHUNKS_A_LIFE / 2 else 0.8  # whatever the machine's speed


def start_child(runtime: Runtime, text: Text, folder: Path):
    """(process id, file of the token counts it reports as read) of a child that reads the text on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading)
    status = 1
    try:
        session = resumed(runtime, folder)
        session.attach(folder)
        rest = text.token_ids[session.num_tokens :]
        if rest:  # none where the kill came after the last save
            session.prefill(rest, lambda done, total: os.write(writing, b"%d\n" % session.num_tokens) and None)
        status = 0
    except LongrunError as error:
        print(f"child: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def resumed(runtime: Runtime, folder: Path) -> Session:
    return runtime.load_session(folder) if is_session(folder) else runtime.new_session()


def check_after_kill(runtime: Runtime, text: Text, folder: Path, told: Sequence[int]) -> None:
    """The folder loads, holds what was reported, and nothing but the text's beginning."""
    try:
        session = resumed(runtime, folder)
        session.cache.check()
    except (LongrunError, AssertionError) as error:
        text.faults.append(f"after kill {text.kills}: {error}")
        return
    behind = (told[-1] if told else 0) - session.num_tokens
    text.most_behind = max(text.most_behind, behind)
    if behind > 0:
        text.faults.append(f"after kill {text.kills}: {behind:,} tokens were reported as read and lost")
    if session.token_ids != text.token_ids[: session.num_tokens]:
        text.faults.append(f"after kill {text.kills}: other tokens than the text's")
    found, expected = session.sparse_tokens, text.sparse_tokens.get(session.num_tokens)
    if found != expected:
        text.faults.append(f"after kill {text.kills}: {found} of the tokens were read sparsely instead of {expected}")
    named = Manifest.read(folder).file_names if is_session(folder) else set()
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    text.in_save += bool(there - named - {"manifest.json", "session.lock"})


def check_end(runtime: Runtime, text: Text, folder: Path) -> None:
    session = resumed(runtime, folder)
    if session.token_ids != text.token_ids:
        text.faults.append(f"{session.num_tokens:,} tokens at the end instead of {len(text.token_ids):,}")
    elif list(session.generate(NEXT_TOKENS, eos=False)) != text.expected:
        text.faults.append("other next tokens than without interruption")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description="Kill sessions at random moments and see that nothing is lost.")
    parser.add_argument("--kills", type=COUNT, default=100, metavar="N", help="default: 100")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of texts and moments (default: 0)")
    parser.add_argument("--tokens", type=COUNT, default=3000, metavar="N", help="of a text (default: 3000)")
    parser.add_argument("--chunk-size", type=COUNT, default=50, metavar="N", help="tokens a chunk (default: 50)")
    parser.add_argument("--kv", help="page format (default: the budget's)")
    parser.add_argument("--prefill", choices=PREFILL_MODES, default=EXACT, help=f"default: {EXACT}")
    parser.add_argument("--model", type=path_option, metavar="DIR", help="default: a planted model, made for this")
    args = parser.parse_args(argv)
    for name in ("kills", "tokens", "chunk_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


if __name__ == "__main__":
    cli.run(main)
