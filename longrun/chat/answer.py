"""One answer: tokens from the session, text as it comes, and why and when it ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longrun.engine.sampling import SamplingParams
from longrun.errors import ContextFullError
from longrun.text.stream import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.session.session import Session

EOS, STOP_STRING, MAX_NEW_TOKENS, CONTEXT_FULL, INTERRUPTED = (
    "eos", "stop string", "max_new_tokens", "context full", "interrupted",
)  # fmt: skip


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer.

    Attributes:
        max_new_tokens: at most so many tokens.
        sampling: see `SamplingParams`.
        stop: the answer ends before the first of these strings; the spelling of a control token is one as well.
        seed: of the random draws of every answer; None draws a new seed for each.
    """

    max_new_tokens: int = 512
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass
class Answer:
    """What was answered.

    Attributes:
        text: as it was given out: without special tokens, a stop string or what follows it.
        num_tokens: generated tokens, the end-of-sequence token and those of a stop string among them.
        stop_reason: "eos", "stop string", "max_new_tokens", "context full" or "interrupted".
        decode_seconds: from the first token to the last: `num_tokens - 1` steps of the model.
        seed: with which its random draws began; None where nothing was drawn.
    """

    text: str = ""
    num_tokens: int = 0
    stop_reason: str = MAX_NEW_TOKENS
    decode_seconds: float = 0.0
    seed: int | None = None

    @property
    def is_cut(self) -> bool:
        """It ended before the model's own end, or a stop string: it can be continued."""
        return self.stop_reason in (MAX_NEW_TOKENS, CONTEXT_FULL, INTERRUPTED)

    @property
    def decode_ms_per_token(self) -> float | None:
        """Milliseconds per step of the model; None for fewer than two tokens."""
        return 1000 * self.decode_seconds / (self.num_tokens - 1) if self.num_tokens > 1 else None


def stream_answer(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: frozenset[int],
    options: AnswerOptions,
    emit: Callable[[str], None],
    begun: Sequence[int] | None = None,
    begun_seed: int | None = None,
) -> Answer:
    """Generate after the session's last token.

    `emit` gets the text piece by piece, whole characters only. Ctrl-C and a full context end the answer, not the
    session, which keeps every token.

    Args:
        begun: the last tokens of the session that belong to an answer which was cut and is continued; random draws go
            on from where they stood, whatever `options.seed` says.
        begun_seed: with which they began.

    Raises:
        InputError: options that cannot be used; the session is as it was.
    """
    sampling, seed = options.sampling, options.seed
    if begun is not None:
        seed = None
    elif seed is None and sampling.temperature > 0:
        seed = secrets.randbits(32)
    answer, text = Answer(), AnswerText(tokenizer, options.stop, begun or ())
    if sampling.temperature > 0:
        answer.seed = seed if begun is None else begun_seed
    first_at = time.perf_counter()

    def give(piece: str) -> None:
        if piece:
            answer.text += piece
            emit(piece)

    tokens = session.generate(
        options.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty,
        seed, min_p=sampling.min_p,
    )  # fmt: skip
    try:
        for token_id in tokens:
            now = time.perf_counter()
            if answer.num_tokens == 0:
                first_at = now
            answer.num_tokens += 1
            answer.decode_seconds = now - first_at
            if token_id in eos_token_ids:
                answer.stop_reason = EOS
                break
            give(text.step(token_id))
            if text.found is not None:
                answer.stop_reason = STOP_STRING
                break
    except ContextFullError:
        answer.stop_reason = CONTEXT_FULL
    except KeyboardInterrupt:
        answer.stop_reason = INTERRUPTED
    give(text.flush())
    return answer
