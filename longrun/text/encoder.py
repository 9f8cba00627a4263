"""Plain text as token ids, with every added token in it read as the characters it is written with.

Messages, documents, prompts, haystacks and all other plain text reach a model this way: a document that holds
`<|im_start|>system` or `<think>` has written characters, not a turn. A tokenizer's own `split_special_tokens` covers
only the added tokens that are marked special.
"""

from __future__ import annotations

import re
from array import array
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from longrun.text.encode_text import PIECE_CHARS, encode_in_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_KEPT_PIECES = 64  # of 2**17 characters: 8 MB of text, and about as many bytes of ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The added tokens, special or not, with their ids; not those of white space alone, which are text as any other."""
    return {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text (a beginning-of-sequence token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


class TextEncoder:
    """Encodes text for one tokenizer. A text without an added token in it has the ids that the tokenizer gives it.

    Attributes:
        control: see `control_tokens`.
        pattern: finds their spellings, of two that begin at one place the longer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        unknown = tokenizer.unk_token_id  # what is unknown may be given it
        self._control_ids = frozenset(self.control.values()) - {unknown}
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)")
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._renamed: dict[int, int] = {}
        self._anchor, self._anchored = "", None
        self._kept: dict[tuple[bool, bytes], array[int]] = {}  # ids of long pieces, the latest ones last
        if self._backend is not None:
            self._plain = self._stripped()
            anchored, anchor = self._with_anchor("")
            if anchored.encode(anchor + "a", add_special_tokens=False).ids[1:] != self._plain_ids("a"):
                self._anchored, self._anchor = anchored, anchor

    def ids(self, text: str, after_control: bool = False) -> list[int]:
        """Ids of `text`, without special tokens before or after it.

        Args:
            text: of any length; a long one is encoded in pieces.
            after_control: a control token stands before it. Some tokenizers mark the beginning of a text, and what
                follows a control token does not begin one.

        Raises:
            InputError: see `encode_in_pieces`.
        """
        return encode_in_pieces(self._tokenizer, text, lambda piece: self._piece_ids(piece, after_control))

    def marked_ids(self, text: str) -> list[int]:
        """Ids of a text in which the spellings of control tokens stand for these, as a chat template writes one."""
        ids: list[int] = []
        start = 0
        for match in self.pattern.finditer(text):
            ids += self.ids(text[start : match.start()], start > 0)
            ids.append(self.control[match.group()])
            start = match.end()
        return ids + self.ids(text[start:], start > 0)

    def _piece_ids(self, piece: str, after_control: bool) -> list[int]:
        """Ids of a piece. Those of the latest long ones are kept: many prompts begin with one long text."""
        if len(piece) < PIECE_CHARS:
            return self._ids(piece, after_control)
        key = after_control, sha256(piece.encode("utf-8", "surrogatepass")).digest()
        found = self._kept.pop(key, None)
        self._kept[key] = found = array("i", self._ids(piece, after_control)) if found is None else found
        if len(self._kept) > _KEPT_PIECES:
            del self._kept[next(iter(self._kept))]
        return found.tolist()

    def _ids(self, text: str, after_control: bool) -> list[int]:
        if not text:
            return []
        ids, offsets = self._encode(text, after_control)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary itself knows a control token's spelling (unigram and word models): cut within each of them.
        cuts = sorted({(start + stop) // 2 for start, stop in offsets() if stop - start > 1})
        if not cuts:
            return ids
        edges, found = [0, *cuts, len(text)], []
        for start, stop in pairwise(edges):
            found += self._ids(text[start:stop], after_control or start > 0)
        return found

    def _encode(self, text: str, after_control: bool) -> tuple[list[int], Any]:
        """Ids, and a function that gives the control tokens among them as (first, one past the last character)."""
        if self._backend is None:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            return ids, lambda: [match.span() for match in self.pattern.finditer(text)]
        before = 0
        if after_control and self._anchored is not None:
            anchored, anchor = self._anchored, self._anchor
            if anchor in text:
                anchored, anchor = self._with_anchor(text)
            found, before = anchored.encode(anchor + text, add_special_tokens=False), len(anchor)
        else:
            found = self._plain.encode(text, add_special_tokens=False)
        skip = 1 if before else 0
        ids = found.ids[skip:]
        if self._renamed:
            ids = [self._renamed.get(token_id, token_id) for token_id in ids]

        def offsets() -> list[tuple[int, int]]:
            pairs = zip(ids, found.offsets[skip:], strict=True)
            return [
                (start - before, stop - before) for token_id, (start, stop) in pairs if token_id in self._control_ids
            ]

        return ids, offsets

    def _plain_ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _stripped(self) -> Tokenizer:
        """The backend without added tokens but those of white space; model, normalizer and pre-tokenizer are shared."""
        from tokenizers import Tokenizer

        assert self._backend is not None
        stripped = Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            stripped.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            stripped.pre_tokenizer = self._backend.pre_tokenizer
        for token_id, token in self._tokenizer.added_tokens_decoder.items():
            if not str(token).strip():
                stripped.add_tokens([token])
                given = stripped.token_to_id(str(token))
                if given != token_id:
                    self._renamed[given] = token_id
        return stripped

    def _with_anchor(self, text: str) -> tuple[Tokenizer, str]:
        """A copy with one token that `text` does not hold, which goes before a text in place of a control token."""
        from tokenizers import AddedToken

        number = 0
        while (anchor := f"\ufdd0{number}\ufdd1") in text:
            number += 1
        copy = self._stripped()
        copy.add_special_tokens([AddedToken(anchor, normalized=False)])
        return copy, anchor
