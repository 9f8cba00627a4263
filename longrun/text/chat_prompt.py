"""A list of messages as token ids, the way the model's chat template writes them in one piece.

The template gets the messages themselves, so that what it does with them (stripping, leaving out) happens; only the
spelling of a control token in a message is hidden from it, and becomes the characters it is written with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrun.arguments import check_text
from longrun.errors import InputError
from longrun.text.chat_template import Chat, TemplateError, has_template, render_chats
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatPrompts:
    """Writes chat prompts for one tokenizer.

    Raises:
        InputError: the model has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not has_template(tokenizer):
            raise InputError("this model has no chat template: send the text itself, as a completion")
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)

    def ids(self, chat: Chat, now: float | None = None) -> list[int]:
        """Token ids of a conversation, up to where its next message, the answer, begins.

        Args:
            chat: (role, content) of each message; a control token's spelling in a content is only text.
            now: the time that the template may write, in seconds since 1970; None is the clock's.

        Raises:
            InputError: the template refuses the messages, or a text is none.
            CheckpointError: the template cannot be rendered within its bounds.
        """
        for number, (_, content) in enumerate(chat):
            check_text(content, f"message {number}")
        hidden, spellings = self._hide([content for _, content in chat])
        roles = [role for role, _ in chat]
        try:
            (text,) = render_chats(self._tokenizer, [list(zip(roles, hidden, strict=True))], now=now)
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses these messages ({error}): send messages as it takes them"
            ) from error
        if not spellings:
            return self._encoder.marked_ids(text)
        stands_in = re.compile("|".join(map(re.escape, spellings)))
        return self._encoder.marked_ids(text, lambda part: stands_in.sub(lambda match: spellings[match.group()], part))

    def _hide(self, contents: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The contents with a stand-in for every control token's spelling, and what each stand-in stands for."""
        found = sorted({match.group() for text in contents for match in self._encoder.pattern.finditer(text)})
        if not found:
            return list(contents), {}
        number = 0
        while any(f"\ufdd0{number}:" in text for text in contents):
            number += 1
        names = {spelling: f"\ufdd0{number}:{index}\ufdd1" for index, spelling in enumerate(found)}
        hidden = [self._encoder.pattern.sub(lambda match: names[match.group()], text) for text in contents]
        return hidden, {name: spelling for spelling, name in names.items()}
