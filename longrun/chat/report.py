"""What a turn cost: one line for a person, one object for a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun.chat.answer import Answer
from longrun.plan.pages_read import pages_read, selection_facts
from longrun.plan.prefill import prefill_facts
from longrun.units import format_bytes

if TYPE_CHECKING:
    from longrun.session.session import Session
    from longrun.specs.hot_counts import HotCounts


def sparse_line(session: Session) -> str | None:
    """How much of the session was read sparsely, and what of the past that read in this process; None for nothing."""
    if not session.sparse_tokens:
        return None
    counts = session.prefill_counts
    more = "" if counts is None or counts.read_share is None else f" ({counts.line()})"
    return f"{session.sparse_tokens:,} of them read sparsely{more}"


@dataclass(frozen=True)
class TurnReport:
    """Counts and times of one turn.

    Attributes:
        answer: what was generated.
        prompt_tokens: tokens that stood in the session when the answer began.
        prefilled_tokens: those of them that were read in this turn; resumed_at: those of an interrupted message that
            had been read before.
        saved_tokens: tokens that the session held when it was loaded; already_read: documents given now that it held.
        hot: what the answer chose of host pages; None without a hot pool.
        prefill_seconds: wall time of reading, checkpoints included; load_seconds: of loading model and session.
    """

    answer: Answer
    session: Session
    prompt_tokens: int
    prefilled_tokens: int
    prefill_seconds: float
    load_seconds: float
    resumed_at: int = 0
    saved_tokens: int = 0
    already_read: tuple[str, ...] = ()
    hot: HotCounts | None = None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.prefilled_tokens / self.prefill_seconds if self.prefilled_tokens and self.prefill_seconds else None

    def line(self) -> str:
        """Prompt tokens, prefill tokens/s, ms/token, how much of cache and context is used."""
        parts = [f"{self.prompt_tokens:,} prompt tokens"]
        rate = self.prefill_tokens_per_s
        if rate is not None:
            parts.append(f"{self.prefilled_tokens:,} read in {self.prefill_seconds:.1f} s, {rate:,.0f} tokens/s")
        generated = f"{self.answer.num_tokens:,} generated"
        pace = self.answer.decode_ms_per_token
        parts.append(generated if pace is None else f"{generated}, {pace:.1f} ms/token")
        filled = self.session.plan.cache.filled_bytes(self.session.seq_len)
        parts.append(f"{format_bytes(filled)} of the cache's {format_bytes(self.session.cache_bytes)} filled")
        read = pages_read(self.session.plan, self.session.seq_len)
        if read is not None:
            parts.append(read.line())
        if self.hot is not None:
            parts.append(self.hot.line())
        sparsely = sparse_line(self.session)
        how = "" if sparsely is None else f", {sparsely}"
        parts.append(f"context {self.session.num_tokens:,} of {self.session.capacity:,}{how}")
        if self.answer.seed is not None:
            parts.append(f"seed {self.answer.seed}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; what `--json` prints. Times that were not measured are null."""
        return {
            "text": self.answer.text,
            "stop_reason": self.answer.stop_reason,
            "seed": self.answer.seed,
            "tokens": {
                "prompt": self.prompt_tokens,
                "prefilled": self.prefilled_tokens,
                "resumed_at": self.resumed_at,
                "generated": self.answer.num_tokens,
                "total": self.session.num_tokens,
                "capacity": self.session.capacity,
            },
            "resumed": {
                "session_tokens": self.saved_tokens,
                "message_tokens": self.resumed_at,
                "documents_already_read": list(self.already_read),
            },
            "timings": {
                "load_s": self.load_seconds,
                "prefill_s": self.prefill_seconds,
                "prefill_tokens_per_s": self.prefill_tokens_per_s,
                "decode_ms_per_token": self.answer.decode_ms_per_token,
            },
            "cache_bytes": self.session.cache_bytes,
            "selection": self._selection(),
            "prefill": self._prefill(),
            "hot_pool": None if self.hot is None else self.hot.to_dict(),
            "split_hash": self.session.plan.split_hash,
            "plan": self.session.plan.to_dict(),
        }

    def _prefill(self) -> dict[str, Any] | None:
        """How much of the session was read sparsely, how, and what that read of the past; None where nothing was and
        nothing would be."""
        facts, counts = prefill_facts(self.session.plan.attention), self.session.prefill_counts
        if facts is None and not self.session.sparse_tokens:
            return None
        read = None if counts is None else counts.to_dict()
        return {"sparse_tokens": self.session.sparse_tokens, "settings": facts, "read": read}

    def _selection(self) -> dict[str, Any] | None:
        """What decode steps select, how much the last one read, and what the next one's pages are estimated to hold;
        None where they read everything."""
        plan = self.session.plan
        facts, read = selection_facts(plan), pages_read(plan, self.session.seq_len)
        if facts is None or read is None:
            return None
        caught = self.session.caught_mass()
        return facts | {
            "pages_held": read.held, "pages_read": read.read, "share_of_tokens": read.share,
            "caught_mass": None if caught is None else caught.to_dict(),
        }  # fmt: skip
