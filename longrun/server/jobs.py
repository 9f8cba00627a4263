"""What a request asks of the worker, and what the worker reports back: plain values that cross threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from longrun.engine.sampling import SamplingParams, TokenScore
from longrun.errors import LongrunError

if TYPE_CHECKING:
    from longrun.engine.token_rule import TokenRule
    from longrun.server.kept import KeptSession
    from longrun.session.passages import Passage
    from longrun.specs.prefill_counts import PrefillCounts

STOP, LENGTH = "stop", "length"
"""Why an answer ended: the model's own end or a stop string; its number of tokens."""


class PassageNames(Protocol):
    """Names for passages of a prompt.

    Attributes:
        before: tokens from this position on are not shown.
    """

    before: int

    def told(self, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        """What a client is told of each passage."""
        ...


@dataclass(frozen=True)
class Ask:
    """One answer to be written.

    Attributes:
        token_ids: of the prompt, at least one.
        max_new_tokens: at most so many, also none; with the prompt they fit into the session.
        sampling, seed, stop: as in `Runtime.stream`; draws without a seed get one of their own.
        logprobs: score every token of the answer and name so many of the likeliest in its place; None does not.
        scores_prompt: score the prompt's tokens as well, all of which are read then.
        scores_end: of the tokens that are scored, the one that ends the answer is one; it has no text.
        kept: a saved session that the prompt begins with, loaded where more of it is there than in memory.
        saves: save into `kept` what is read, after every step.
        rule: which tokens the answer may have; None allows all.
        sources: name the passages that the answer looked at by these; None does not look.
        sparse: what is read of the prompt may be read sparsely, where the server does that.
        exact: nothing of the prompt may have been read sparsely before, either; of what is not in `kept`.
    """

    token_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    scores_prompt: bool = False
    scores_end: bool = False
    kept: KeptSession | None = None
    saves: bool = False
    rule: TokenRule | None = None
    sources: PassageNames | None = None
    sparse: bool = True
    exact: bool = False


@dataclass(frozen=True)
class Progress:
    """How far the prompt has been read.

    Attributes:
        total: tokens of the prompt; cached: those that the session held before; processed: those it holds now.
        seconds: since reading began.
    """

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """A saved session of so many tokens took the place of the one in memory, within so many seconds."""

    tokens: int
    seconds: float

    def report(self) -> None:
        """A line on stderr, the server's log."""
        print(f"loaded a document's session of {self.tokens:,} tokens in {self.seconds:.2f} s", file=sys.stderr)


@dataclass(frozen=True)
class ReadSparsely:
    """How a document was read, after a step.

    Attributes:
        tokens: of the session, that were read sparsely, in this step or before.
        counts: what the step read of the past.
    """

    tokens: int
    counts: PrefillCounts


@dataclass(frozen=True)
class Piece:
    """More of the answer's text, and the scores of tokens that it came from."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class PromptScores:
    """Scores of the prompt's next tokens; its first one has none."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True)
class LookedAt:
    """What the answer looked at, as `PassageNames.told` says it; comes after the answer's text."""

    passages: list[dict[str, Any]]


@dataclass(frozen=True)
class Finished:
    """The answer's end, the last event.

    Attributes:
        reason: `STOP` or `LENGTH`.
        prompt_tokens: tokens of the prompt; cached_tokens: those that were not read again.
        new_tokens: tokens that were generated, the end-of-sequence token and those of a stop string among them.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it; the last event."""

    error: Exception


Event = Progress | Loaded | ReadSparsely | PromptScores | Piece | LookedAt | Finished | Failed


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


class GaveWay(Exception):
    """Others wait: what was read of a document is saved, and its job goes on when its turn comes again."""


class StoppedError(LongrunError):
    """The server is leaving, or a request took longer than it may."""


class Job:
    """An ask in the queue or being answered.

    Args:
        ask: what is to be done.
        emit: called on the worker's thread with every event; it must return at once.
        seconds: how long it may take from now on; None is without limit.
    """

    def __init__(self, ask: Ask, emit: Callable[[Event], None], seconds: float | None = None) -> None:
        self.ask, self.emit = ask, emit
        self._left = threading.Event()
        self._stopped: str | None = None
        self._until = None if seconds is None else time.monotonic() + seconds
        self._seconds = seconds

    def cancel(self) -> None:
        """Nobody waits any more; may be called from any thread, and more than once."""
        self._left.set()

    def stop(self, why: str) -> None:
        """End it with an error that says `why`; may be called from any thread."""
        self._stopped = why

    @property
    def is_cancelled(self) -> bool:
        return self._left.is_set()

    def check(self) -> None:
        """To be called between steps.

        Raises:
            Cancelled: nobody waits.
            StoppedError: it was stopped, or took too long.
        """
        if self._left.is_set():
            raise Cancelled
        if self._stopped is not None:
            raise StoppedError(self._stopped)
        if self._until is not None and time.monotonic() > self._until:
            raise StoppedError(
                f"the request took longer than the {self._seconds:,.0f} seconds that one may: send a shorter text, or "
                f"start the server with a larger --time-limit"
            )
