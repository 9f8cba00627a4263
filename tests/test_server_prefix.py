"""A request continues what an earlier one has read, and its answer is that of a session of its own."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest
from server_case import NAME, TEMPLATE, Served, serve, user, wait_for
from tiny_models import save_tiny, save_tokenizer
from transformers import AutoTokenizer

import longrun
from longrun.errors import InputError
from longrun.runtime.runtime import Runtime
from longrun.server import prefix
from longrun.server.command import fewer_marks
from longrun.server.prefix import PrefixMarks

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 25
QUESTIONS = ("who is it?", "where is it?", "when was it?", "who is it?")


def ask(served: Served, messages: list[dict[str, str]], max_tokens: int = 8, model: str = NAME) -> tuple[str, int, int]:
    """The answer, the prompt's tokens, and those that were not read again."""
    answer = served.client().chat.completions.create(model=model, messages=messages, max_tokens=max_tokens)
    usage = answer.usage
    return answer.choices[0].message.content, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def test_with_few_marks_a_text_is_read_again_but_no_document(chat_model: Path, tmp_path: Path) -> None:
    """As the note says that --kv-bytes brings along."""
    assert fewer_marks(16, 16) is None and "for 2 marks, not for 16" in fewer_marks(16, 2)
    with serve(chat_model, marks=2, documents=tmp_path) as served:
        ask(served, user(f"{TEXT}\n\n{QUESTIONS[0]}"))
        assert ask(served, user(f"{TEXT}\n\n{QUESTIONS[1]}"))[2] < len(TEXT) / 2
        httpx.put(f"{served.root}/documents/text", content=TEXT, headers={"Content-Type": "text/plain"})
        wait_for(lambda: httpx.get(f"{served.root}/documents/text").json()["state"] == "ready")
        for question in QUESTIONS[:3]:
            _, total, cached = ask(served, user(question), model=f"{NAME}@text")
            assert total - cached < 100


@pytest.mark.parametrize("apart", [False, True], ids=["one message", "two messages"])
def test_questions_over_one_text_read_only_themselves(served: Served, apart: bool) -> None:
    shares, long = [], TEXT if apart else TEXT[::-1]
    for question in QUESTIONS:
        messages = [*user(long), *user(question)] if apart else user(f"{long}\n\n{question}")
        text, total, cached = ask(served, messages)
        assert text == served.expected(served.prompt_ids(messages), 8)
        shares.append(cached / total)
    assert shares[0] < 0.05 and min(shares[1:]) > 0.95
    assert ask(served, messages)[2] == total  # asked again: nothing to read


def test_a_conversation_reads_only_its_new_turn(served: Served) -> None:
    messages, before = user("tell me more, and at length"), 0
    for _ in range(4):
        answer, total, cached = ask(served, messages, 20)
        assert answer == served.expected(served.prompt_ids(messages), 20)
        assert cached >= before  # the prompt before, with or without its answer
        before = total
        messages = [*messages, {"role": "assistant", "content": answer}, *user("and then?")]


def test_every_request_has_the_answer_of_a_session_of_its_own(served: Served) -> None:
    """Prompts that share beginnings of all lengths, in an order that comes back to earlier ones."""
    draw = random.Random(5)
    texts = [TEXT[: draw.randrange(1, 900)] + draw.choice("abc") * draw.randrange(1, 200) for _ in range(12)]
    client = served.client()
    for text in [*texts, *draw.sample(texts, 6)]:
        answer = client.completions.create(model=NAME, prompt=text, max_tokens=6).choices[0].text
        assert answer == served.expected(served.reference.encode(text), 6)


@pytest.fixture(scope="module")
def runtime(chat_model: Path) -> Runtime:
    return longrun.load(chat_model, "cpu", kv_format="fp32", device="cpu", ctx=2000, compiled_kernels=False, marks=6)


def read(marks: PrefixMarks, session: longrun.Session, ids: list[int]) -> int:
    """What the server does with a prompt; returns the tokens that it did not read."""
    start, places = marks.resume(ids)
    assert session.token_ids == ids[:start]
    for place in places:
        assert start < place <= len(ids) or place == len(ids)
        if place > session.num_tokens:
            session.prefill(ids[session.num_tokens : place])
        marks.take()
    assert session.token_ids == ids and marks.positions == sorted(set(marks.positions))
    return start


def test_marks_stay_within_their_room_and_keep_what_costs_most(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "GRID", 200)
    session = runtime.new_session()
    marks, draw = PrefixMarks(session, {1}), random.Random(0)
    fresh = runtime.new_session()
    text = [draw.randrange(3, 97) for _ in range(1500)]
    for question in range(8):
        ids = text + [draw.randrange(3, 97) for _ in range(20 + question)]
        start = read(marks, session, ids)
        assert len(marks.positions) <= 6
        assert start == 0 if question == 0 else start > 1400
    grid = [place for place in marks.positions if place % 200 == 0]
    assert len(grid) == 3 and min(b - a for a, b in zip([0, *grid], grid, strict=False)) >= 400  # thinned, all over it
    half = text[:700] + [5] * 30
    assert 200 <= read(marks, session, half) <= 700 and marks.positions[-1] == 730
    assert session.logits == pytest.approx(fresh.prefill(half), abs=1e-4)
    assert read(marks, session, half) == 730 and session.logits == pytest.approx(fresh.logits, abs=1e-4)
    marks.forget()
    assert session.num_tokens == 0 and marks.positions == []
    assert read(marks, session, half[:50]) == 0


def test_common_prefix(runtime: Runtime) -> None:
    session = runtime.new_session()
    assert session.common_prefix([4, 5]) == 0
    session.prefill([4, 5, 6])
    next(session.generate(1))
    waiting = session.token_ids[3]
    assert [session.common_prefix(ids) for ids in ([4], [4, 5, 7], [9], [4, 5, 6, waiting, 3])] == [1, 2, 0, 4]
    with pytest.raises(InputError, match="vocabulary"):
        session.common_prefix([97])


def test_marks_are_planned(runtime: Runtime) -> None:
    two = longrun.load(runtime.model_dir, "cpu", kv_format="fp32", device="cpu", ctx=2000, compiled_kernels=False).plan
    size = {plan: {item.name: item.bytes for item in plan.items} for plan in (two, runtime.plan)}
    assert size[runtime.plan]["marks"] == 3 * size[two]["marks"] > 0
    assert size[runtime.plan]["logits"] - size[two]["logits"] == 4 * 97 * 4  # each keeps those of its last token
    assert runtime.new_session().cache.nbytes()["marks"] == size[runtime.plan]["marks"]


def test_angles_that_change_with_the_length_are_read_in_one_piece(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", "dynamic")
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    with serve(tmp_path) as served:
        for text in (TEXT[:300], TEXT[:400], TEXT[:350]):
            assert ask(served, user(text))[0] == served.expected(served.prompt_ids(user(text)), 8)
        assert ask(served, user(text))[2] == 0
