"""The local page in a real browser, over a real server with a tiny model: chat, documents, passages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from page_case import answer_of, ask, in_browser, opened
from planted_chat import NEEDLES, spaced
from planted_chat import ask as needle_question
from server_case import NAME, Served, copy_with_plain_template, serve, user, wait_for

from longrun.needles.needles import generate_sentences
from longrun.session.session import Session

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from longrun.lab.planted import PlantedModel

TEXT = "".join(f"Line {number} tells of the {number * 37 % 101} ships that came.\n" for number in range(1, 40))
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'

DROPPED = """() => {
  const data = new DataTransfer();
  data.items.add(new File(['Dropped here.'], 'b.md'));
  return data;
}"""


@contextmanager
def held_after(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[threading.Event]:
    """Answers wait after so many tokens until the event is set."""
    go_on, generate = threading.Event(), Session.generate

    def held(self: Session, *arguments: Any, **settings: Any) -> Iterator[int]:
        for number, token_id in enumerate(generate(self, *arguments, **settings)):
            if number == count:
                assert go_on.wait(20)
            yield token_id

    with monkeypatch.context() as patch:
        patch.setattr(Session, "generate", held)
        try:
            yield go_on
        finally:
            go_on.set()


@in_browser
def test_an_answer_streams_and_is_that_of_the_python_api(
    kept: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kept.expected(kept.prompt_ids(user("how many?")), 20)
    with opened(browser, kept) as page, held_after(monkeypatch, 7) as go_on:
        ask(page, "how many?")
        body = page.locator(".turn.assistant .body")
        wait_for(lambda: len(body.text_content() or "") >= 5)
        part = body.text_content()
        assert part and expected.startswith(part) and part != expected
        assert page.locator("#log").get_attribute("aria-busy") == "true"
        assert page.locator("#progress-text").text_content() == "Writing"
        assert page.get_by_role("button", name="Send").is_disabled()
        go_on.set()
        assert answer_of(page) == expected
        assert "ended at its most tokens" in (page.locator(".turn footer").text_content() or "")
        page.reload()
        assert answer_of(page) == expected
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0
        page.reload()
        assert page.locator(".turn").count() == 0


@in_browser
@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_answer_here_and_on_the_server(
    kept: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with opened(browser, kept) as page:
        page.get_by_text("Settings").click()
        page.get_by_label("Most tokens").fill("1500")
        with held_after(monkeypatch, 10) as go_on:
            ask(page, "go on")
            wait_for(lambda: len(page.locator(".turn.assistant .body").text_content() or "") >= 5)
            page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
            part = answer_of(page)
            go_on.set()
        wait_for(lambda: kept.health()["running"] == 0)
        assert kept.health()["session_tokens"] < 1000
        assert 5 <= len(part) < 100 and "stopped" in (page.locator(".turn footer").text_content() or "")
        page.get_by_label("Most tokens").fill("12")
        ask(page, "and now?")
        talk = [*user("go on"), {"role": "assistant", "content": part}, *user("and now?")]
        page.locator(".turn.assistant footer").nth(1).wait_for()
        assert answer_of(page) == kept.expected(kept.prompt_ids(talk), 12)


@in_browser
def test_reading_shows_how_far_and_can_be_stopped(
    kept: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps, go_on = Session.prefill, [], threading.Event()

    def held(self: Session, token_ids: Any, progress: Any = None, **how: Any) -> Any:
        steps.append(len(token_ids))
        assert len(steps) == 1 or go_on.wait(20)
        return read(self, token_ids, progress, **how)

    question = "how far was it? " * 60
    total = len(kept.prompt_ids(user(question.strip())))
    with opened(browser, kept) as page:
        monkeypatch.setattr(Session, "prefill", held)
        ask(page, question)
        wait_for(lambda: len(steps) == 2)
        bar = page.locator("#progress-bar")
        wait_for(lambda: steps[0] <= bar.evaluate("(bar) => bar.value") < bar.evaluate("(bar) => bar.max") == total)
        assert f"of {total:,} tokens" in (page.locator("#progress-text").text_content() or "")
        page.get_by_role("button", name="Stop").click()
        page.locator(".turn").first.wait_for(state="detached")
        go_on.set()
        assert page.get_by_label("Question", exact=True).input_value() == question.strip()
        wait_for(lambda: kept.health()["running"] == 0)
        assert kept.health()["session_tokens"] < total


@in_browser
def test_errors_are_told_in_words_and_the_question_is_not_lost(kept: Served, browser: Browser) -> None:
    with opened(browser, kept, expected="400 (Bad Request)") as page:
        question = "long " * 500
        ask(page, question)
        problem = page.get_by_role("alert")
        problem.get_by_text("exceed the context of 2K tokens").wait_for()
        assert page.get_by_label("Question", exact=True).input_value() == question.strip()
        assert page.locator(".turn").count() == 0
        page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full') } }")
        ask(page, "who?")
        problem.get_by_text("too long to be kept").wait_for()
        assert page.locator(".turn").count() == 2
        page.reload()
        assert page.locator(".turn").count() == 0


@in_browser
def test_a_document_is_added_asked_and_deleted(kept: Served, browser: Browser) -> None:
    name = "-img-src-x-onerror-hit-.txt"
    with opened(browser, kept) as page:
        text = TEXT[:600] + HOSTILE
        file = {"name": "<img src=x onerror=hit>.txt", "mimeType": "text/plain", "buffer": text.encode()}
        page.locator("#files").set_input_files([file])
        item = page.locator("#document-list li")
        item.get_by_text("✓ ready").wait_for()
        told = httpx.get(f"{kept.root}/documents").json()["data"][0]
        assert told["name"] == name and f"{told['tokens']:,} tokens" in (item.text_content() or "")
        dropped = page.evaluate_handle(DROPPED)
        page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
        page.get_by_role("button", name="Ask about b.md").and_(page.locator(":enabled")).wait_for()
        page.get_by_role("button", name=f"Ask about {name}").click()
        ask(page, "who?")
        expected = kept.expected(kept.prompt_ids(user(f"{text}\n\nwho?")), 20)
        assert answer_of(page) == expected
        loaded = page.locator("#now .gauge", has_text="Last document loaded")
        loaded.get_by_text(f"{told['tokens']:,} tokens in").wait_for(state="attached")
        page.get_by_role("button", name=f"Delete {name}").click()
        page.get_by_role("button", name="Cancel").click()
        assert item.count() == 2
        for each in (name, "b.md"):
            page.get_by_role("button", name=f"Delete {each}").click()
            page.locator("#sure-yes").click()
            page.get_by_role("button", name=f"Delete {each}").wait_for(state="detached")
        page.get_by_text("is no longer served").wait_for()
        assert httpx.get(f"{kept.root}/documents").json()["data"] == []
        assert page.evaluate("window.hit") is None and page.locator("#document-list img").count() == 0


def put(served: Served, name: str, text: str) -> None:
    """A document, and wait until it is read."""
    kind = {"Content-Type": "text/plain"}
    assert httpx.put(f"{served.root}/documents/{name}", content=text.encode(), headers=kind).status_code == 202
    wait_for(lambda: httpx.get(f"{served.root}/documents/{name}").json()["state"] == "ready")


def marked(page: Page) -> list[tuple[str, str, str]]:
    """(number, text, marked part) of every line of the open text in which something is marked."""
    page.locator("#reader mark").first.wait_for()
    lines = page.locator("#reader .line:has(mark)").all()
    return [(e.get_attribute("data-number"), e.text_content(), e.locator("mark").text_content()) for e in lines]


@in_browser
def test_a_passage_opens_the_text_at_its_place_and_marks_it(
    planted: PlantedModel, tmp_path: Path, browser: Browser
) -> None:
    """Of a document, of a file in one, and of a message; by keyboard."""
    lines = [*islice(generate_sentences(5), 30)]
    lines[11] = NEEDLES[0].sentence
    text = "\n".join(lines)
    model = copy_with_plain_template(planted.path, tmp_path / "model")
    with (
        serve(model, documents=tmp_path / "kept", head_map=model / "head_map", retrieval_ratio=1 / 8) as served,
        opened(browser, served) as page,
    ):
        put(served, "plain.txt", text)
        put(served, "code", f"==> long/text <==\n{lines[0]}\n\n==> text/a <==\n{text}\n")
        page.get_by_text("Settings").click()
        page.get_by_label("Most tokens").fill("8")
        for document, name in (("plain.txt", "plain.txt"), ("code", "text/a")):
            page.get_by_role("button", name="New chat").click()
            page.get_by_role("button", name=f"Ask about {document}").click()
            ask(page, needle_question(0))
            assert answer_of(page).strip().startswith(spaced(NEEDLES[0].key)[:5])
            chips = page.locator(".chip")
            chips.first.wait_for()
            assert (chips.first.text_content() or "").startswith(name)
            chips.first.focus()
            page.keyboard.press("Enter")
            body = {"model": f"{NAME}@{document}", "messages": user(needle_question(0)), "max_tokens": 8}
            told = served.post("/v1/chat/completions", body | {"looked_at": True}).json()
            passage = told["looked_at"][0]
            found = marked(page)
            assert "\n".join(part for _, _, part in found) == text.encode()[slice(*passage["bytes"])].decode()
            assert [each for each, _, _ in found] == [
                str(n) for n in range(passage["lines"][0], passage["lines"][1] + 1)
            ]
            assert all(shown == lines[int(each) - 1] for each, shown, _ in found)
            assert page.locator("#reader .label").text_content() == f"Looked at: {round(100 * passage['share'])}%"
            box, view = page.locator("#reader mark").first.bounding_box(), page.locator("#reader-text").bounding_box()
            assert box and view and view["y"] <= box["y"] <= view["y"] + view["height"]
            page.keyboard.press("Escape")
            page.locator("#reader").wait_for(state="hidden")
            assert page.evaluate("document.activeElement.className") == "chip"
        page.get_by_role("button", name="New chat").click()
        page.locator("#model").select_option(NAME)
        ask(page, f"{text}\n\n{needle_question(0)}")
        answer_of(page)
        page.locator(".chip").first.click()
        assert "message 1" in (page.locator("#reader-title").text_content() or "")
        assert marked(page)[-1][1] in lines


@in_browser
def test_a_passage_whose_place_is_not_known_is_shown_by_itself(kept: Served, browser: Browser) -> None:
    """The tiny model's tokenizer knows no line ends, so that its tokens do not spell the text."""
    put(kept, "ships.txt", TEXT)
    with opened(browser, kept) as page:
        page.get_by_role("button", name="Ask about ships.txt").click()
        ask(page, "which?")
        page.locator(".chip").first.click()
        page.get_by_text("Its place in the text is not known.").wait_for()
        assert "ships that came" in (page.locator("#reader mark").text_content() or "")
    assert httpx.delete(f"{kept.root}/documents/ships.txt").status_code == 200


@in_browser
def test_what_a_model_writes_stays_text(kept: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"{HOSTILE} and `code`"
    ids = kept.reference.encode(said, begins=False)
    monkeypatch.setattr(Session, "generate", lambda *_, **__: iter([*ids, 1]))
    with opened(browser, kept) as page:
        page.get_by_text("Settings").click()
        page.get_by_label("Show what an answer looked at").uncheck()
        ask(page, HOSTILE)
        assert answer_of(page) == said
        assert page.locator(".turn.user .body").text_content() == HOSTILE
        assert page.locator("#log img, #log script").count() == 0 and page.evaluate("window.hit") is None


@in_browser
def test_fenced_code_is_shown_as_code(kept: Served, browser: Browser) -> None:
    with opened(browser, kept) as page:
        shown = page.evaluate(
            "async (text) => { const body = document.createElement('div');"
            "(await import('/page/markdown.js')).show(body, text);"
            "return [...body.children].map((each) => [each.tagName, each.textContent]) }",
            "One:\n```html\n<b>\n~~~\n</b>\n```\nthen ```not``` one\n~~~\nstill open",
        )
    assert shown == [["DIV", "One:"], ["PRE", "<b>\n~~~\n</b>"], ["DIV", "then ```not``` one"], ["PRE", "still open"]]
