"""What single tokens are written with: their text, and their bytes where these are no whole characters."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # as vocabularies with byte fallback spell one
_REPLACEMENT = "\ufffd"


class TokenSpelling:
    """Spells the tokens of one tokenizer; control tokens are spelled as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A neighbour before it: some decoders drop the space before a text's first token.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._skip = len(self._decode(self._before))

    def text(self, token_id: int) -> str:
        """The token's text; U+FFFD stands for bytes that are no whole character."""
        return self._decode([*self._before, token_id])[self._skip :]

    def bytes(self, token_id: int) -> list[int] | None:
        """The token's bytes; None where its vocabulary does not tell them."""
        text = self.text(token_id)
        if _REPLACEMENT not in text:
            return list(text.encode("utf-8"))
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if found := _BYTE.fullmatch(token):
            return [int(found[1], 16)]
        return [self._byte_of[c] for c in token] if all(c in self._byte_of for c in token) else None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return _byte_alphabet()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's): itself where it is printable,
    otherwise the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
