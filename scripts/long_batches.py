"""What the processes of a training run learn from at a step: samples side by side, made ahead in a process apart."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from long_recipe import Recipe

from longrun.long_tasks import Corpus, Sample, TaskWriter

TOGETHER = 65_536
"""As many samples run side by side as have at most so many tokens, and at least one."""
_PATIENCE = 120.0  # seconds; a step's samples take less than one


@dataclass(frozen=True)
class Batch:
    """Samples side by side, filled up at the end: int64 [batch, T] ids; bool [batch, T] answers and drawn text.

    A position is marked where its own token is learned; it is predicted from the one before it.
    """

    token_ids: np.ndarray
    answers: np.ndarray
    text: np.ndarray
    forms: tuple[str, ...]


def make_share(
    writer: TaskWriter, corpus: Corpus, recipe: Recipe, pad_id: int, rank: int, world: int, step: int
) -> list[Batch]:
    """What process `rank` of `world` learns from at a step: every `world`-th sample, in batches of `TOGETHER` tokens.

    A sample and the places drawn of its text depend on the seed and its number alone.
    """
    _, length, batch, first = recipe.at(step)
    seed, positions = recipe.numbers["seed"], recipe.numbers["text_positions"]
    share = []
    for number in range(rank, batch, world):
        sample = writer.training_sample(corpus, seed, first + number, length)
        drawn = positions // batch + (number < positions % batch)
        share.append((sample, _draw_text(sample, random.Random(f"text/{seed}/{first + number}"), drawn)))
    together = max(1, TOGETHER // length)
    return [_side_by_side(share[start : start + together], pad_id) for start in range(0, len(share), together)]


def _draw_text(sample: Sample, rng: random.Random, count: int) -> list[int]:
    """`count` places of the text, or all where it has fewer; never the first, which nothing comes before."""
    text = [place for place in range(1, len(sample.token_ids)) if not sample.answer_mask[place]]
    return rng.sample(text, min(count, len(text)))


def _side_by_side(share: list[tuple[Sample, list[int]]], pad_id: int) -> Batch:
    shape = len(share), max(len(sample.token_ids) for sample, _ in share)
    ids = np.full(shape, pad_id, dtype=np.int64)
    answers, text = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, (sample, drawn) in enumerate(share):
        count = len(sample.token_ids)
        ids[row, :count] = sample.token_ids
        answers[row, :count] = sample.answer_mask
        text[row, drawn] = True
    return Batch(ids, answers, text, tuple(form for sample, _ in share for form in sample.forms))


class BatchMaker:
    """Makes a step's batches while the step before runs.

    In a process and not in a thread: making a sample holds the interpreter, and at short lengths a GPU waits for the
    interpreter that launches its kernels. It is forked, and so shares the corpus; it never touches torch.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        """`make` is called with steps. To be created before anything is put on a GPU."""
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, make), daemon=True)
        self._process.start()
        theirs.close()
        self._ordered: int | None = None

    def take(self, step: int, order_next: bool) -> list[Batch]:
        """The batches of a step; with `order_next` those of the step after it are begun.

        Raises:
            RuntimeError: the process has ended, or made nothing for `_PATIENCE` seconds.
            Exception: what `make` raised for this step.
        """
        try:
            if self._ordered != step:
                if self._ordered is not None:
                    self._receive()
                self._connection.send(step)
            made = self._receive()
            self._ordered = step + 1 if order_next else None
            if order_next:
                self._connection.send(step + 1)
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise RuntimeError(f"the process that makes samples ended, status {self._process.exitcode}") from error
        if isinstance(made, Exception):
            raise made
        return made

    def _receive(self) -> list[Batch] | Exception:
        if not self._connection.poll(_PATIENCE):
            raise RuntimeError(f"the process that makes samples made none in {_PATIENCE:g} seconds: start again")
        return self._connection.recv()


def _serve(connection: Connection, others: Connection, make: Callable[[int], list[Batch]]) -> None:
    # A signal to the trainer's process group must not end this process, whose samples the last step may need; it ends
    # with the trainer, whose end of the pipe nobody else may hold.
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    others.close()
    try:
        while True:
            step = connection.recv()
            try:
                made: list[Batch] | Exception = make(step)
            except Exception as error:
                made = error
            connection.send(made)
    except (EOFError, OSError):
        return
