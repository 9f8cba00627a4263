"""Questions out of a file or stdin: one a line, as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrun.arguments import check_text
from longrun.documents.decoding import decoded
from longrun.documents.document import read_file
from longrun.errors import InputError, quoted, short_path
from longrun.files.user_files import parse_object

STDIN = "-"
_ADVICE = 'give a string, or an object with "question" and, if wanted, "id"'


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: not empty.
        id: what the asker calls it; None where it has no name.
    """

    text: str
    id: str | int | None = None


def read_questions(path: str | Path) -> list[Question]:
    """The questions in a file of UTF-8 or UTF-16 text: see `questions_in`.

    Raises:
        InputError: a file that cannot be read or holds no question, or a line that is none.
    """
    source = short_path(path)
    found = []
    for question in questions_in(decoded(read_file(path), str(path)).split("\n"), source):
        if isinstance(question, InputError):
            raise question
        found.append(question)
    return found


def stdin_questions() -> Iterator[Question | InputError]:
    """The questions of stdin, each as soon as its line is there: see `questions_in`."""
    return questions_in(iter(sys.stdin.readline, ""), "stdin")


def questions_in(lines: Iterable[str], source: str) -> Iterator[Question | InputError]:
    """One question a line; blank lines are passed over. If the first one is a JSON string or object, all are JSON: a
    string is a question, an object holds it as "question" and may hold an "id", a string or a whole number.

    Returns:
        each question, or for a line that is none the error that says why.
    """
    is_json: bool | None = None
    for number, line in enumerate(lines, start=1):
        line = line.strip().removeprefix("\ufeff")
        if not line:
            continue
        if is_json is None:
            is_json = _is_json(line)
        try:
            check_text(line, f"line {number} of {source}")
            yield _from_json(line, f"line {number} of {source}") if is_json else Question(line)
        except InputError as error:
            yield error


def _is_json(line: str) -> bool:
    if line.startswith("{"):
        return True
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


def _from_json(line: str, source: str) -> Question:
    if line.startswith('"'):
        try:
            return _checked({"question": json.loads(line)}, source)
        except json.JSONDecodeError as error:
            raise InputError(f"{source} is no valid JSON ({error.msg}), as the first one is: {_ADVICE}") from None
    return _checked(parse_object(line, source, InputError, _ADVICE, unique_keys=True), source)


def _checked(item: dict[str, Any], source: str) -> Question:
    if unknown := item.keys() - {"question", "id"}:
        raise InputError(f"{source} has an unknown key {quoted(min(unknown))}: {_ADVICE}")
    text, name = item.get("question"), item.get("id")
    if not isinstance(text, str) or not check_text(text, source).strip():
        raise InputError(f"{source} holds {quoted(text)} as its question, which is no text: {_ADVICE}")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise InputError(f"{source} has the id {quoted(name)}: give a string or a whole number")
    return Question(text.strip(), check_text(name, source) if isinstance(name, str) else name)
