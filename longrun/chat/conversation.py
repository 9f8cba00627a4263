"""Turns of a chat over one session: which documents and messages it holds, and which tokens come next.

Everything is appended: the history is never tokenized or read again. What the chat knows is kept in
`session.extra["chat"]`, so that a saved session, also one that was killed in the middle of a document, can be resumed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longrun.chat.read_documents import ReadDocuments, ToRead
from longrun.chat.turns import AnswerCut, ConversationMark, Reading, is_conversation
from longrun.documents.document import Document
from longrun.errors import InputError, SessionError, quoted, short_path
from longrun.interrupts import deferred_signals
from longrun.text.chat_format import ChatFormat, TurnText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrun.session.session import Session

_KEY = "chat"


class Conversation:
    """A session seen as a chat.

    Args:
        session: a new one, or one that a `Conversation` filled before.
        tokenizer: of the same model.
        eos_token_ids: tokens that end an answer.
        system: system prompt of a new conversation; None leaves it to the chat template.
        options: of the chat template, see `ChatFormat`; None or none: its defaults, or those of a saved conversation.

    Raises:
        InputError: a system prompt or an option that the template does not take, or another one than the saved
            conversation's.
        SessionError: the session holds tokens, but no conversation.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self._tokenizer, self._eos = session, tokenizer, eos_token_ids
        saved = session.extra.get(_KEY)
        if saved is None:
            if session.num_tokens:
                raise SessionError("the session was not saved by the chat: it can be continued from Python only")
            self._format = ChatFormat(tokenizer, system, options=options)
            first = self._format.first
            saved = {
                "system": system,
                "first": [first.opening, first.closing],
                "documents": [],
                "turn": None,
                "options": dict(options or {}),
            }
            session.extra[_KEY] = saved
        elif not is_conversation(saved):
            raise SessionError(
                "the session's conversation is not one that the chat wrote: restore the session from a copy, or "
                "continue it from Python"
            )
        elif system is not None and system != saved["system"]:
            raise InputError(
                f"the saved conversation began with the system prompt {quoted(saved['system'])}: give the same "
                f"--system or none"
            )
        elif options and dict(options) != saved.get("options", {}):
            raise InputError(
                f"the saved conversation began with the template options {quoted(saved.get('options', {}))}: give the "
                f"same --template-option or none"
            )
        else:
            self._format = ChatFormat(tokenizer, saved["system"], TurnText(*saved["first"]), saved.get("options", {}))
        self._state: dict[str, Any] = saved
        self._rest: list[int] = []  # what an interrupted message still wants to be read

    @property
    def documents(self) -> list[str]:
        """Names of the documents that were read to their end."""
        return [entry["name"] for entry in self._read_documents()]

    @property
    def document_places(self) -> list[tuple[str, str, int, int]]:
        """Name, SHA-256, first and stop of each document read to its end: tokens [first, stop) end with it, and other
        parts of the conversation may stand before it."""
        read = sorted(self._read_documents(), key=lambda entry: entry["stop"])
        starts = [0, *(entry["stop"] for entry in read)]
        return [(e["name"], e["sha256"], first, e["stop"]) for e, first in zip(read, starts, strict=False)]

    @property
    def question_start(self) -> int:
        """Position at which the question that awaits its answer begins, behind the documents of its message; the
        session's end where there is none."""
        turn = self._state["turn"]
        stops = [entry["stop"] for entry in self._read_documents()]
        return self.session.num_tokens if turn is None else max(turn["start"], *stops, 0)

    def question_at(self, reading: Reading) -> int:
        """How many of the tokens of `reading` come before its question: documents and what else is read with them. All
        of them, where it asks nothing."""
        turn, count = self._state["turn"], len(reading.token_ids)
        if turn is None or not reading.asks:
            return count
        start = max(turn["start"], *(entry["stop"] for entry in self._state["documents"]), 0)
        return min(count, max(0, start - (turn["stop"] - count)))

    @property
    def latest(self) -> dict[str, str]:
        """Name of each document that was read to its end, and the SHA-256 of its file's latest version."""
        return {entry["name"]: entry["sha256"] for entry in self._read_documents()}

    @property
    def unread(self) -> int:
        """Tokens of a message whose reading was interrupted."""
        turn = self._state["turn"]
        return max(0, turn["stop"] - self.session.num_tokens) if turn else 0

    @property
    def awaits_answer(self) -> bool:
        """A question was read to its end and has no answer yet."""
        turn = self._state["turn"]
        return turn is not None and turn["asks"] and not self.unread

    def prepare(self, documents: Sequence[Document], question: str | None, strict: bool = True) -> Reading:
        """Decide what to read, and note it in the session; the caller then prefills `Reading.token_ids`.

        Documents come first. A message without question stays open: more documents or the question follow later. An
        interrupted message is resumed where its tokens agree with what is given now.

        Args:
            documents: texts to read; those that the session holds already are left out.
            question: ends the message; an answer is due then.
            strict: with an interrupted message that does not agree, raise; otherwise let the message end where its
                reading stopped and go on.

        Raises:
            InputError: more tokens than the session's capacity has room for; nothing was changed.
            SessionError: the interrupted message is another one (with `strict`).
        """
        turn, num_tokens = self._state["turn"], self.session.num_tokens
        if not documents and question is None:
            return Reading([], False)
        if turn is not None and (self.unread or turn["asks"]):
            reading = self._take_up(turn, documents, question)
            if reading is not None:
                return reading
            if self.unread and strict:
                raise SessionError(
                    f"the session stopped at token {num_tokens:,} of {turn['stop']:,} inside a message that differs "
                    f"from the one given now{self._cut_and_changed(documents)}: give the same --file, --prompt and "
                    f"--system again, or another --session"
                )
        to_read = self._to_read(documents)
        already, changed = tuple(to_read.already), tuple(to_read.changed)
        if not to_read.new and question is None:
            return Reading([], False, already)
        carried, complete = self._carried()
        opens = turn is None or complete
        start = num_tokens + len(carried) if opens else turn["start"]
        ids, places = self._message(start, opens, to_read.new, question, carried)
        self._check_room(num_tokens + len(ids))
        self._note(start, num_tokens, ids, places, to_read, question)
        return Reading(ids, question is not None, already, changed=changed)

    def rest(self) -> Reading | None:
        """What an interrupted reading of this process left over, or an answer that is still due or was cut; None if
        there is neither."""
        turn = self._state["turn"]
        if self.cut_answer is not None:
            return Reading([], True)
        if turn is None or (self.unread and not self._rest) or not (self.unread or turn["asks"]):
            return None
        done = self.session.num_tokens - turn["start"]
        return Reading(
            self._rest[len(self._rest) - self.unread :], turn["asks"], (), done, turn["stop"] - turn["start"]
        )

    def answered(self, cut: AnswerCut | None = None) -> None:
        """The answer stands in the session: the next message begins a new turn.

        Args:
            cut: where it was stopped before its end, how it began: it may be continued as long as nothing follows it.
        """
        self._state["turn"] = None
        self._state["cut"] = None if cut is None else [cut.start, cut.seed]

    def mark(self) -> ConversationMark:
        """Remember this point, as `Session.mark` does."""
        return ConversationMark(self.session.mark(), copy.deepcopy(self._state))

    def rewind(self, mark: ConversationMark) -> None:
        """Back to `mark`, as if nothing had been read or said since."""
        with deferred_signals():
            self.session.rewind(mark.session)
            self._state.clear()
            self._state.update(copy.deepcopy(mark.state))
            self._rest = []

    @property
    def cut_answer(self) -> AnswerCut | None:
        """The answer at the end of the session that was stopped before its end; None where there is none."""
        cut = self._state.get("cut")
        return None if cut is None or self._state["turn"] is not None else AnswerCut(*cut)

    def _take_up(self, turn: dict[str, Any], documents: Sequence[Document], question: str | None) -> Reading | None:
        """The rest of the interrupted message, if what is given now begins with the tokens that were read of it.

        Compared from the last document of the message that was read to its end.
        """
        start, num_tokens = turn["start"], self.session.num_tokens
        to_read = self._to_read(documents)
        new = to_read.new
        if not new and question is None:
            return None
        base = max([start, *(entry["stop"] for entry in self._read_documents())])
        have = self.session.token_ids[base:]
        for texts in (new, [replace(document, headed=False) for document in new]):  # once no text had a header
            ids, places = self._message(start, base == start, texts, question, [])
            if ids[: len(have)] == have:
                break
        else:
            return None
        self._check_room(base + len(ids))
        self._note(start, base, ids, places, to_read, question)
        return Reading(
            ids[len(have) :], question is not None, tuple(to_read.already), num_tokens - start,
            base + len(ids) - start, tuple(to_read.changed),
        )  # fmt: skip

    def _message(
        self, start: int, opens: bool, new: Sequence[Document], question: str | None, carried: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids that open or continue the message of `start`, and for each text its first index and the one after it."""
        ids, places = list(carried), []
        if opens:
            ids += self._opening(start, carried)
        texts = [*(document.shown for document in new), *([] if question is None else [question])]
        for piece in self._format.text_ids(texts, start == 0, opens, question is not None):
            places.append((len(ids), len(ids) + len(piece)))
            ids += piece
        if question is not None:
            ids += self._format.closing_ids(start == 0)
        return ids, places

    def _opening(self, start: int, carried: Sequence[int] = ()) -> list[int]:
        if start == 0:
            return self._format.opening_ids(None, False)
        previous = carried[-1] if carried else self.session.token_ids[start - 1]
        return self._format.opening_ids(previous, previous in self._eos)

    def _note(
        self, start: int, at: int, ids: list[int], places: list[tuple[int, int]], to_read: ToRead, question: str | None
    ) -> None:
        """Write down that `ids`, which begin at token `at`, are about to be read."""
        documents = self._read_documents()  # one that was cut is forgotten
        for document, line, (first, stop) in zip(to_read.new, to_read.kept_lines, places, strict=False):
            entry = {"name": document.name, "sha256": document.sha256, "stop": at + stop}
            documents.append({**entry, "start": at + first, "line": line})
        with deferred_signals():
            self._state["documents"], self._state["cut"] = documents, None
            self._state["turn"] = {"start": start, "stop": at + len(ids), "asks": question is not None}
            self._rest = ids

    def _read_documents(self) -> list[dict[str, Any]]:
        return [entry for entry in self._state["documents"] if entry["stop"] <= self.session.num_tokens]

    def _to_read(self, documents: Sequence[Document]) -> ToRead:
        return ReadDocuments(self._read_documents(), self._text_of, self._format.leads).sort(documents)

    def _text_of(self, start: int, stop: int) -> str:
        text = self._tokenizer.decode(self.session.token_ids[start:stop], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _cut_and_changed(self, documents: Sequence[Document]) -> str:
        """A clause that names a file which changed while its reading was interrupted; empty where none did."""
        given = {document.name: document.sha256 for document in documents}
        names = [e["name"] for e in self._state["documents"] if given.get(e["name"], e["sha256"]) != e["sha256"]]
        return f" ({short_path(names[0])} has changed since)" if names else ""

    def _carried(self) -> tuple[list[int], bool]:
        """What must be read before anything else may follow, and whether the message before is complete then.

        A message that was interrupted in its opening or its closing needs the rest of that; one that was interrupted
        in its text is resumed there, and the unread rest of the text is left out.
        """
        turn = self._state["turn"]
        if turn is None or not self.unread:
            return [], turn is not None and turn["asks"]
        first = turn["start"] == 0
        if turn["asks"]:
            closing = self._format.closing_ids(first)
            if self.unread < len(closing):
                return closing[-self.unread :], True
        opening = self._opening(turn["start"]) + self._format.tail_ids(first)
        return opening[self.session.num_tokens - turn["start"] :], False

    def _check_room(self, total: int) -> None:
        if total > self.session.capacity:
            raise InputError(
                f"the conversation would hold {total:,} tokens, more than the capacity of {self.session.capacity:,}: "
                f"give --ctx {total + 512} or more, or a shorter text"
            )
