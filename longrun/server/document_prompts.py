"""A document in a chat: its text in front of the first user message, and the tokens that every question has before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrun.documents.archive import ArchiveTooLargeError, read_archive
from longrun.documents.decoding import decoded
from longrun.documents.html_text import html_text
from longrun.documents.parts import file_names, joined
from longrun.documents.pdf_text import pdf_text
from longrun.server.openai_errors import RequestError

if TYPE_CHECKING:
    from longrun.text.chat_prompt import ChatPrompts

ARCHIVES = (
    "application/zip", "application/x-zip-compressed", "application/x-tar", "application/gzip", "application/x-gzip",
    "application/x-tgz", "application/x-compressed-tar",
)  # fmt: skip
KINDS = ("text/plain", "text/markdown", "text/html", "application/pdf", *ARCHIVES)
"""What a document's body may be."""

SEPARATOR = "\n\n"
"""Between a document, what system messages say, and the question."""

_QUESTIONS = ("a", "\n7")
_BACK = 8  # tokens: another question's beginning may change how the text's last characters are cut


def text_of(raw: bytes, kind: str, name: str, unpacked_bytes: int) -> tuple[str, tuple[str, ...]]:
    """The text of a body of one of `KINDS`, and sentences about what of it was not read. That of an archive is its
    files', each below its header (`longrun.documents.parts`).

    Args:
        unpacked_bytes: the most that an archive may hold.

    Raises:
        InputError: it holds none, or none that can be read.
        RequestError: an archive holds too much.
    """
    if kind in ARCHIVES:
        return _archive_text(raw, name, unpacked_bytes)
    if kind == "application/pdf":
        return pdf_text(raw, name)
    return (html_text if kind == "text/html" else decoded)(raw, name), ()


def _archive_text(raw: bytes, name: str, unpacked_bytes: int) -> tuple[str, tuple[str, ...]]:
    try:
        found = read_archive(raw, name, unpacked_bytes)
    except ArchiveTooLargeError as error:
        raise RequestError(
            f"{error}, or start the server with a larger --max-unpacked", "request_too_large", status=413
        ) from None
    text, notices = joined(found.texts), found.notices
    if len(file_names(text)) > len(found.texts):
        notices += (f"a file of {name} holds lines that look like the header of a file: places in it may be named by "
                    f"them",)  # fmt: skip
    return text, notices


def with_document(text: str, chat: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The chat with the text at the beginning of its first user message, as if the client had sent it there.

    What system messages before it say stands between text and message: the text's session begins without them.

    Raises:
        RequestError: see `numbers_with_document`.
    """
    contents = {None: text} | {number: content for number, (_, content) in enumerate(chat)}
    return [
        (chat[numbers[-1]][0], SEPARATOR.join(contents[number] for number in numbers))
        for numbers in numbers_with_document(chat)
    ]


def numbers_with_document(chat: Sequence[tuple[str, str]]) -> list[list[int | None]]:
    """What each message of `with_document` holds: numbers of messages of the chat, None for the document's text.

    Raises:
        RequestError: no user message.
    """
    place = next((number for number, (role, _) in enumerate(chat) if role == "user"), None)
    if place is None:
        raise RequestError("a document needs a question: send a message of role user", "invalid_value", "messages")
    system = [number for number in range(place) if chat[number][0] == "system"]
    before = [[number] for number in range(place) if chat[number][0] != "system"]
    return [*before, [None, *system, place], *([number] for number in range(place + 1, len(chat)))]


def document_ids(prompts: ChatPrompts, text: str, now: float) -> tuple[list[int], int]:
    """The ids with which the prompts of all questions over the text begin, but for a few that may differ, and the
    tokens of a prompt with a question of one character.

    Args:
        now: the time that the chat template may write, in seconds since 1970.

    Raises:
        InputError: the chat template refuses the text.
    """
    one, other = (prompts.ids(with_document(text, [("user", question)]), now) for question in _QUESTIONS)
    same = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[: max(1, same - _BACK)], len(one)
