"""What the last answer looked at, as places in the documents of the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun.chat.conversation import Conversation
from longrun.documents.document import Document
from longrun.errors import InputError, short_path
from longrun.text.places import Place, TextSource, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.session.marks import SessionMark
    from longrun.session.passages import Passage


@dataclass(frozen=True)
class LookedAt:
    """A passage and where it stands; `place.name` is None for the conversation itself."""

    passage: Passage
    place: Place

    def line(self) -> str:
        """For a person."""
        place = self.place
        where = "the conversation" if place.name is None else short_path(place.name)
        if place.lines is not None:
            first, last = place.lines
            where += f", line {first:,}" if first == last else f", lines {first:,} to {last:,}"
        return f"{self.passage.share:4.0%}  {where}: {place.shown}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types: lines from 1, bytes of the text in UTF-8 and tokens of the session as [first, stop)."""
        place = self.place
        return {
            "file": place.name,
            "lines": None if place.lines is None else list(place.lines),
            "bytes": None if place.bytes is None else list(place.bytes),
            "tokens": [self.passage.first, self.passage.stop],
            "share": round(self.passage.share, 4),
            "text": place.shown,
        }


class AnswerSources:
    """Keeps the mark at which the last answer began, and the texts that were read, for as long as nothing follows."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._texts: dict[str, str] = {}
        self._mark: SessionMark | None = None
        self._before = 0

    def know(self, documents: Sequence[Document]) -> None:
        """These texts are read, or were."""
        self._texts |= {document.sha256: document.text for document in documents}

    def drop(self) -> None:
        """Something follows the last answer: it cannot be looked back from any more, and its mark is given back."""
        if self._mark is not None:
            self._conversation.session.release(self._mark)
            self._mark = None

    def begin(self, continues: int | None = None) -> SessionMark:
        """An answer begins at the session's end: a mark there. One that goes on with the answer that began at token
        `continues` keeps that one's mark, where it stands."""
        if self._mark is None or continues != self._mark.num_tokens:
            self.drop()
            self._before = self._conversation.question_start
            self._mark = self._conversation.session.mark()
        return self._mark

    def looked_at(self) -> list[LookedAt]:
        """The passages before the question that the last answer looked at most.

        Raises:
            InputError: no answer was written since the conversation began or was loaded, or since more was read.
            PlanError: see `Session.looked_at`.
        """
        session, mark = self._conversation.session, self._mark
        if mark is None or mark.num_tokens == session.num_tokens:
            raise InputError("there is no answer here to look back from: ask a question first")
        ids = session.token_ids
        sources = [
            TextSource(name, self._texts.get(sha256), first, stop)
            for name, sha256, first, stop in self._conversation.document_places
        ]
        return [
            LookedAt(passage, place_of(self._tokenizer, ids, sources, passage.first, passage.stop))
            for passage in session.looked_at(mark, before=self._before)
        ]
