"""Tokens back to lines and bytes of their texts, for every pair of tokens, by what the tokens of the part spell."""

from __future__ import annotations

import pytest
from chat_tokenizers import CHATML, LLAMA2, byte_tokenizer, metaspace_tokenizer

from longrun.text.encoder import TextEncoder
from longrun.text.places import Place, TextSource, place_of

TEXT = "one the é\n\n  two: 漢字 ends\r\nlast the the"


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(CHATML), metaspace_tokenizer(LLAMA2)], ids=["bytes", "metaspace"])
def test_every_part_of_a_text(tokenizer) -> None:
    """Bytes of the tokens one by one give the same borders, where they do not cut a character."""
    encoder = TextEncoder(tokenizer)
    before, ids = encoder.ids("the beginning\n\n"), encoder.ids(TEXT, after_control=True)
    tokens = [*before, *ids, *encoder.ids("\nand more", after_control=True)]
    first = len(before)
    source = TextSource("a.txt", TEXT, 0, first + len(ids))
    spelled = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    whole = [count for count, text in enumerate(spelled) if "\ufffd" not in text and TEXT.startswith(text)]
    assert len(whole) > len(TEXT) / 2 and whole[-1] == len(ids)
    for number, begin in enumerate(whole):
        for end in whole[number + 1 :: 3]:
            place = place_of(tokenizer, tokens, [source], first + begin, first + end)
            part = TEXT[len(spelled[begin]) : len(spelled[end])]
            if not part.strip():
                continue
            a, b = len(spelled[begin]) + len(part) - len(part.lstrip()), len(spelled[begin]) + len(part.rstrip())
            assert place.bytes == (len(TEXT[:a].encode()), len(TEXT[:b].encode()))
            assert place.lines == (TEXT[:a].count("\n") + 1, TEXT[:b].count("\n") + 1)
            assert " ".join(TEXT[a:b].split()) in place.shown


def test_a_border_within_a_character_leaves_it_to_the_later_part() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids = TextEncoder(tokenizer).ids("ab漢c")
    assert len(ids) == 6
    source = [TextSource("x", "ab漢c", 0, 6)]
    assert place_of(tokenizer, ids, source, 0, 4).bytes == (0, 2)
    assert place_of(tokenizer, ids, source, 4, 6).bytes == (2, 6)


def test_which_text_it_is() -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoder = TextEncoder(tokenizer)
    ids = encoder.ids("==> a <==\nfirst text\n\nsecond\ntext what?")
    sources = [TextSource("a", "first text", 0, 20), TextSource("b", "second\ntext", 20, 33)]
    assert place_of(tokenizer, ids, sources, 12, 21) == Place("a", (1, 1), (2, 10), "first text")
    assert place_of(tokenizer, ids, sources, 18, 30) == Place("b", (1, 2), (0, 8), "second text")
    assert place_of(tokenizer, ids, sources, 2, 5) == Place("a", (1, 1), (0, 0), "first text")  # its header
    assert place_of(tokenizer, ids, sources, 34, 39) == Place(None, None, None, "what?")
    assert place_of(tokenizer, ids, [TextSource("a", None, 0, 20)], 10, 15) == Place("a", None, None, "first")
    assert place_of(tokenizer, ids, [TextSource("a", "other", 0, 20)], 10, 15) == Place("a", None, None, "first")
