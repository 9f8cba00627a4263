"""Which tokens end an assistant's turn, besides those that the model's settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrun.text.chat_template import has_template, render_chats
from longrun.text.encoder import TextEncoder, control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = "LongrunUserMarker", "LongrunAnswerMarker"


def tokenizer_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's own end-of-sequence token, if it has one."""
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def template_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The control token that the chat template puts after an answer: the first one behind it.

    Empty where there is no template, or where it ends answers with plain text or not at all.

    Raises:
        TemplateError, CheckpointError: see `render_chats`.
    """
    if not has_template(tokenizer):
        return frozenset()
    (text,) = render_chats(tokenizer, [[("user", _USER), ("assistant", _ANSWER)]], add_generation_prompt=False)
    _, shown, after = text.rpartition(_ANSWER)
    found = TextEncoder(tokenizer).pattern.search(after) if shown else None
    return frozenset([control_tokens(tokenizer)[found.group()]]) if found else frozenset()
