"""An answer as text while its tokens come: whole characters, nothing held back too long, ended by stop strings."""

from __future__ import annotations

import pytest
from chat_tokenizers import CHATML, END, byte_tokenizer, ids_of, metaspace_tokenizer

from longrun.errors import ContextFullError, InputError
from longrun.text.stream import AnswerText, StopStrings, TextStream, text_pieces

THINK = "<think>"


@pytest.mark.parametrize("text", ["plain words", "🙂👩‍👩‍👧 emoji", "日本語と漢字", "naïve façade", "a\ufffdb", ""])
@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_streamed_text_is_whole_characters_and_complete(make, text):
    tokenizer = make(None)
    stream = TextStream(tokenizer)
    ids = ids_of(tokenizer, text)
    pieces = [stream.step(token_id) for token_id in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(text) or text.isascii() or make is byte_tokenizer
    assert "".join(pieces) + stream.flush() == text
    assert stream.flush() == ""


def test_streaming_leaves_special_tokens_out_and_shows_a_cut_character_at_the_end():
    tokenizer = byte_tokenizer(CHATML)
    ids = [*ids_of(tokenizer, "a"), tokenizer.eos_token_id, *ids_of(tokenizer, "b🙂")[:-1]]
    stream = TextStream(tokenizer)
    assert "".join(stream.step(token_id) for token_id in ids) == "ab"
    assert stream.flush() == "\ufffd"


def test_streaming_a_long_answer_decodes_only_a_window():
    tokenizer = byte_tokenizer(None)
    stream = TextStream(tokenizer)
    longest = 0
    for token_id in ids_of(tokenizer, "the quick brown fox " * 50):
        stream.step(token_id)
        longest = max(longest, len(stream._ids))
    assert longest <= 8


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_stop_strings_over_pieces(size):
    def run(text: str, *strings: str) -> tuple[str, str | None, list[str]]:
        stop = StopStrings(strings)
        pieces = [stop.feed(text[at : at + size]) for at in range(0, len(text), size)]
        return "".join(pieces) + stop.flush(), stop.found, pieces

    assert run("one two END three", "END")[:2] == ("one two ", "END")
    assert run("one two EN", "END")[:2] == ("one two EN", None)
    assert run("aaab", "aab")[:2] == ("a", "aab")
    assert run("x\n\nUser: y", "User:", "\n\n")[:2] == ("x", "\n\n")
    assert run("nothing here", "END")[:2] == ("nothing here", None)
    assert run("ENENEND!", "END")[:2] == ("ENEN", "END")
    assert run("free", *())[:2] == ("free", None)
    held = run("one two END", "END")[2]
    assert not any("E" in piece for piece in held)


def test_text_is_not_held_back_longer_than_needed():
    stop = StopStrings(["STOP"])
    assert [stop.feed(piece) for piece in ("go S", "T", "A", "RT")] == ["go ", "", "STA", "RT"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop string is empty"):
        StopStrings(["x", ""])
    with pytest.raises(InputError, match="stop string 5 is no text"):
        StopStrings(["x", 5])


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ([END], "ab "),
        (["b" + " " + END], "a"),
        ([f"{END}\n"], "ab "),
        ([f"{END}x"], "ab \ncd"),
        (["c", END], "ab "),
        ([THINK], "ab \nc"),
        (END, "ab "),
    ],
)
def test_a_control_token_is_a_stop_string_like_any_other(stop, shown):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens([THINK])
    end, think = (tokenizer.convert_tokens_to_ids(token) for token in (END, THINK))
    ids = [*ids_of(tokenizer, "ab "), end, *ids_of(tokenizer, "\nc"), think, *ids_of(tokenizer, "d")]
    text = AnswerText(tokenizer, stop)
    assert "".join(text_pieces(ids, (), text)) == shown.replace("cd", f"c{THINK}d")
    assert text.found in (*stop, stop, None) and (text.found is None) == ("d" in shown)


def test_a_text_that_continues_another_goes_on_where_that_stopped():
    for make in (byte_tokenizer, metaspace_tokenizer):
        tokenizer = make(None)
        ids = ids_of(tokenizer, "the 🙂 end of it")
        for place in range(1, len(ids)):
            first, then = AnswerText(tokenizer), AnswerText(tokenizer, before=ids[:place])
            given = "".join(first.step(token_id) for token_id in ids[:place])
            assert given + "".join(text_pieces(ids[place:], (), then)) == "the 🙂 end of it"
    tokenizer = byte_tokenizer(CHATML)
    ids = ids_of(tokenizer, "a STOP")
    for place in range(len(ids)):
        then = AnswerText(tokenizer, ["STOP"], before=ids[:place])
        assert "".join(text_pieces([*ids[place:], 5], (), then)) == "a STOP"[place:2] and then.found


def test_text_pieces_end_with_a_token_and_give_all_before_the_context_is_full():
    tokenizer = byte_tokenizer(None)
    ids = ids_of(tokenizer, "日本 STO")
    pieces = list(text_pieces([*ids, 5, 6], [5], AnswerText(tokenizer, ["STOP"])))
    assert pieces == ["日", "本", " ", "STO"]

    def full():
        yield from ids
        raise ContextFullError("full")

    pieces, given = text_pieces(full(), [5], AnswerText(tokenizer, ["STOP"])), []
    with pytest.raises(ContextFullError):
        given += pieces
    assert "".join(given) == "日本 STO"
