"""Many questions over the same texts, each answered as if it were the only one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from longrun.chat.answer import INTERRUPTED
from longrun.chat.questions import Question
from longrun.chat.report import TurnReport
from longrun.chat.runner import ChatRunner
from longrun.documents.document import Document
from longrun.errors import InputError, LongrunError

_REPORTED = ("text", "stop_reason", "seed", "tokens", "timings")


class Asker:
    """Reads texts once, marks that place, and answers every question from there.

    Args:
        runner: the conversation. A folder that it is kept in holds it as it is after the texts, and no answer.
        out: gets what stdout gets: with `as_json` a line for each question, otherwise the question, quoted, and its
            answer.
        stream: gets the answers' text as it comes, with `as_json`.

    Attributes:
        errors: questions that could not be answered.
        answered: the others.
    """

    def __init__(self, runner: ChatRunner, out: Callable[[str], None], stream: Callable[[str], None], as_json: bool):
        self._runner, self._out, self._stream, self._json = runner, out, stream, as_json
        self.errors = self.answered = 0
        self._texts: dict[str, Any] | None = None

    def run(self, documents: Sequence[Document], questions: Iterable[Question | InputError]) -> bool:
        """Read `documents` and answer `questions`; a question that fails is told, and the next one is answered.

        Returns:
            False where Ctrl-C stopped a question: its answer was given out as far as it came, and no other was begun.

        Raises:
            LongrunError: the texts cannot be read.
            KeyboardInterrupt: Ctrl-C while texts are read, or where the next question is waited for.
        """
        self._runner.talk.read(documents, None)
        self._tell_what_was_read(*self._runner.talk.prefilled)
        self._runner.keep_as_it_is()
        mark = self._runner.conversation.mark()
        for question in questions:
            try:
                if isinstance(question, InputError):
                    raise question
                report = self._answer(question)
            except LongrunError as error:
                self.errors += 1
                self._failed(question, error)
                continue
            except KeyboardInterrupt:
                return False
            finally:
                self._runner.conversation.rewind(mark)
            self.answered += 1
            if report.answer.stop_reason == INTERRUPTED:
                return False
        return True

    def _tell_what_was_read(self, tokens: int, seconds: float) -> None:
        """The texts' own reading, which no question's report holds."""
        if tokens:
            rate = tokens / seconds
            self._runner.tell(f"[the texts: {tokens:,} tokens read in {seconds:.1f} s, {rate:,.0f} tokens/s]")
            self._texts = {"prefilled": tokens, "prefill_s": seconds, "prefill_tokens_per_s": rate}

    def _answer(self, question: Question) -> TurnReport:
        self._runner.talk.read([], question.text)
        if not self._json:
            self._out("".join(f"> {line}\n" for line in question.text.split("\n")))
        emit = self._stream if self._json else self._out
        report = self._runner.answer(emit, keep_unfinished=False)
        emit("\n" if self._json else "\n\n")
        self._runner.tell(f"[{report.line()}; ended by {report.answer.stop_reason}]")
        if self._json:
            result = report.to_dict()
            more = {
                "texts": self._texts,
                "prefill": _without_heads(result["prefill"]),
                "looked_at": self._runner.looked_at(),
            }
            self._line(question, {name: result[name] for name in _REPORTED} | more)
        return report

    def _failed(self, question: Question | InputError, error: LongrunError) -> None:
        self._runner.tell(f"error: {error}")
        if self._json:
            self._line(Question("") if isinstance(question, InputError) else question, {"error": str(error)})

    def _line(self, question: Question, result: dict[str, Any]) -> None:
        self._out(json.dumps({"question": question.text or None, "id": question.id, **result}) + "\n")


def _without_heads(prefill: dict[str, Any] | None) -> dict[str, Any] | None:
    """How the texts were read, without a table of all heads in every line."""
    if prefill is None or prefill["read"] is None:
        return prefill
    read = {name: value for name, value in prefill["read"].items() if not name.endswith("_by_head")}
    return prefill | {"read": read}
