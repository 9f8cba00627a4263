"""What the processes of a training run learn from at a step: samples side by side, made ahead in a process apart."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from longrun.lab.long_tasks import Corpus
from scripts.training.long_positions import stretched
from scripts.training.long_recipe import Recipe
from scripts.training.long_samples import Sample, SampleWriter

TOGETHER = 65_536
"""As many samples run side by side as have at most so many tokens, and at least one."""
_PATIENCE = 120.0  # seconds; a step's samples take less than one


@dataclass(frozen=True)
class Batch:
    """Samples side by side, filled up at the end to the length of their stage.

    A position is marked where its own token is learned; it is predicted from the one before it.

    Attributes:
        token_ids: int64 [batch, T].
        weights: float32 [batch, T], what a token of an answer weighs in the loss, 0 elsewhere.
        text: bool [batch, T], the drawn places of the text.
        values: int64 [values, 3], (start, first, stop) of every value asked (`Sample.values`) in the flattened batch.
        groups: bool [values, 2], whether a value is its sample's first answer, and whether its sample is stretched.
        positions: int64 [batch, T], of RoPE; None where every sample is numbered from 0.
        forms: names of the forms asked, sample after sample.
    """

    token_ids: np.ndarray
    weights: np.ndarray
    text: np.ndarray
    values: np.ndarray
    groups: np.ndarray
    positions: np.ndarray | None
    forms: tuple[str, ...]


@dataclass(frozen=True)
class _Drawn:
    sample: Sample
    text: list[int]
    positions: np.ndarray | None


def make_share(
    writer: SampleWriter, corpus: Corpus, recipe: Recipe, pad_id: int, rank: int, world: int, step: int
) -> list[Batch]:
    """What process `rank` of `world` learns from at a step: every `world`-th sample, in batches of `TOGETHER` tokens.

    A sample, the places drawn of its text and its positions depend on the seed and its number alone.
    """
    stage, _, first = recipe.at(step)
    seed, places = recipe.numbers["seed"], recipe.numbers["text_positions"]
    share = []
    for number in range(rank, stage.batch, world):
        sample = writer.training_sample(corpus, seed, first + number, stage.length)
        rng = random.Random(f"text/{seed}/{first + number}")
        text = _draw_text(sample, rng, places // stage.batch + (number < places % stage.batch))
        jumps = rng.random() < stage.stretched
        positions = stretched(rng, len(sample.token_ids), sample.joints, recipe.window) if jumps else None
        share.append(_Drawn(sample, text, positions))
    together = max(1, TOGETHER // stage.length)
    parts = [share[start : start + together] for start in range(0, len(share), together)]
    return [_side_by_side(part, stage.length, pad_id) for part in parts]


def _draw_text(sample: Sample, rng: random.Random, count: int) -> list[int]:
    """`count` places of the text, or all where it has fewer; never the first, which nothing comes before."""
    text = [place for place in range(1, len(sample.token_ids)) if not sample.weights[place]]
    return rng.sample(text, min(count, len(text)))


def _side_by_side(share: list[_Drawn], length: int, pad_id: int) -> Batch:
    shape = len(share), length
    ids = np.full(shape, pad_id, dtype=np.int64)
    weights, text = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    positions = np.tile(np.arange(length, dtype=np.int64), (len(share), 1))
    values, groups = [], []
    for row, one in enumerate(share):
        count = len(one.sample.token_ids)
        ids[row, :count] = one.sample.token_ids
        weights[row, :count] = one.sample.weights
        text[row, one.text] = True
        values += [[row * length + place for place in value] for value in one.sample.values]
        learned = weights[row].nonzero()[0]
        first_end = learned[0] + np.append(np.diff(learned) > 1, True).argmax() + 1
        groups += [(bool(stop <= first_end), one.positions is not None) for _, _, stop in one.sample.values]
        if one.positions is not None:
            positions[row, :count] = one.positions
    return Batch(
        ids, weights, text, np.asarray(values, dtype=np.int64).reshape(-1, 3),
        np.asarray(groups, dtype=bool).reshape(-1, 2),
        positions if any(one.positions is not None for one in share) else None,
        tuple(form for one in share for form in one.sample.forms),
    )  # fmt: skip


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
        self._end = weakref.finalize(self, _end, self._connection, self._process, os.getpid())

    def close(self) -> None:
        """End the process. Left to the garbage collector, it holds until then whatever was open when it was forked."""
        self._end()

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


def _end(connection: Connection, process: multiprocessing.process.BaseProcess, owner: int) -> None:
    if os.getpid() == owner:  # and not in a process forked later, which holds a copy
        connection.close()
        process.terminate()
        process.join()


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
