"""The code that `bench.py real` reads, and questions about it whose answers stand there."""

from __future__ import annotations

import platform
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longrun.documents.document import read_document
from longrun.errors import InputError, short_path
from longrun.text.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In this order; what the questions ask for is the same in every Python that longrun runs on.
MODULES = (
    "textwrap", "cmd", "filecmp", "reprlib", "quopri", "tempfile", "shlex", "poplib", "graphlib", "sched", "fileinput",
    "netrc", "getopt", "heapq", "copy", "glob", "fnmatch", "random", "pprint", "difflib",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question, a string that a right answer holds as a word of its own, and what says so in the text (None: it is
    asked whatever the text is)."""

    text: str
    expected: str
    evidence: str | None = None

    def is_right(self, answer: str) -> bool:
        """Whether the answer holds the expected string, not as part of a longer number or word."""
        plain = re.sub(r"(?<=\d),(?=\d{3})", "", answer)
        return re.search(rf"(?<!\w){re.escape(self.expected)}(?!\w)", plain) is not None


QUESTIONS = (
    Question("In textwrap.py, what is the default value of the parameter width of TextWrapper?", "70", "width=70,"),
    Question("In cmd.py, which string is the constant PROMPT?", "(Cmd)", "PROMPT = '(Cmd) '"),
    Question("In quopri.py, what is the value of the constant MAXLINESIZE?", "76", "MAXLINESIZE = 76"),
    Question("In tempfile.py, what is TMP_MAX where the os module does not define it?", "10000", "TMP_MAX = 10000"),
    Question("In poplib.py, what is the value of the constant _MAXLINE?", "2048", "_MAXLINE = 2048"),
)


def read_code(source: Path | None) -> tuple[str, str]:
    """A text and what to call it: a file, the .py files of a folder one after the other, or, with None, modules of the
    running Python's standard library.

    Raises:
        InputError: a file that cannot be read as text, or a folder without .py files.
    """
    if source is None:
        library = Path(sysconfig.get_path("stdlib"))
        files: Iterable[Path] = (library / f"{name}.py" for name in MODULES)
        return _joined(library, files), f"standard library of Python {platform.python_version()}"
    if not source.is_dir():
        return read_document(source).text, source.name
    found = sorted(path for path in source.rglob("*.py") if path.is_file() and path.stat().st_size)
    if not found:
        raise InputError(f"--text {short_path(source)} is a folder without .py files: name another, or a text file")
    return _joined(source, found), source.name


def _joined(root: Path, files: Iterable[Path]) -> str:
    return "\n\n".join(f"# file: {file.relative_to(root)}\n{read_document(file).text}" for file in files)


def as_questions(texts: Sequence[str] | None, expected: Sequence[str] | None) -> tuple[Question, ...]:
    """The options --question and --expect, pair by pair; without them the questions about the standard library.

    Raises:
        InputError: not as many of the one as of the other.
    """
    texts, expected = texts or (), expected or ()
    if len(texts) != len(expected):
        raise InputError(
            f"--question was given {len(texts)} time(s) and --expect {len(expected)}: give one --expect a question"
        )
    return tuple(Question(*pair) for pair in zip(texts, expected, strict=True)) or QUESTIONS


class CodeChat:
    """The code as a user's message in the model's chat template, ahead of a question.

    Raises:
        CheckpointError: a chat template that cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, code: str) -> None:
        self._tokenizer, self._format = tokenizer, ChatFormat(tokenizer)
        (ids,) = self._format.text_ids([code], first_turn=True, begins=True, ends=False)
        self._ids = self._format.opening_ids(None, False) + ids

    def document_ids(self, length: int) -> list[int]:
        """The first `length` tokens of the message.

        Raises:
            InputError: it has fewer.
        """
        if len(self._ids) < length:
            raise InputError(f"the text has {len(self._ids):,} tokens and {length:,} are to be read: name a longer one")
        return self._ids[:length]

    def question_ids(self, question: Question) -> list[int]:
        """What follows the code, up to where the answer begins."""
        text = f"{question.text} Answer with the value only."
        (ids,) = self._format.text_ids([text], first_turn=True, begins=False, ends=True)
        return ids + self._format.closing_ids(True)

    def asked(self, questions: Sequence[Question], length: int) -> list[Question]:
        """Those whose evidence stands in the first `length` tokens."""
        read = self._tokenizer.decode(self._ids[:length])
        return [question for question in questions if question.evidence is None or question.evidence in read]
