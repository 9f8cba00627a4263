"""The local page in a real browser, over a real server with a tiny model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from planted_chat import NEEDLES, spaced
from planted_chat import ask as needle_question
from server_case import NAME, Served, copy_with_plain_template, serve, user, wait_for

from longrun.needles.needles import generate_sentences
from longrun.patterns.head_map import HeadMap
from longrun.session.session import Session

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

    from longrun.lab.planted import PlantedModel

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
TEXT = "".join(f"Line {number} tells of the {number * 37 % 101} ships that came.\n" for number in range(1, 40))
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'

DROPPED = """() => {
  const data = new DataTransfer();
  data.items.add(new File(['Dropped here.'], 'b.md'));
  return data;
}"""
FOCUS = """() => {
  const each = document.activeElement, style = getComputedStyle(each);
  return each === document.body ? null : [each.id || each.className, style.outlineStyle, style.transitionDuration];
}"""
ONE_OF_EACH = """() => {
  for (const [tag, className] of [["p", "problem"], ["p", "label"], ["mark", ""]]) {
    document.body.append(Object.assign(document.createElement(tag), { className }));
  }
}"""
CONTRAST = """(selector) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const element = document.querySelector(selector);
  let behind = element;
  const back = () => getComputedStyle(behind).backgroundColor;
  while (numbers(back())[3] === 0) behind = behind.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(back())];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.fixture(scope="module")
def kept(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that keeps documents."""
    with serve(chat_model, documents=tmp_path_factory.mktemp("kept")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox"]
    ) as running:  # fmt: skip
        yield running


@contextmanager
def opened(browser: Browser, served: Served, expected: str | None = None, **settings: Any) -> Iterator[Page]:
    """The page in a browser of its own, that of a wide screen where nothing else is said; it asks no other origin, and
    its console shows no error but for those that hold `expected`."""
    with browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings}) as context:
        page, wrong = context.new_page(), []
        page.set_default_timeout(15_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(served.root + "/") else 0)
        page.goto(served.root)
        yield page
        assert [each for each in wrong if expected is None or expected not in each] == []


def many_heads(route: Route) -> None:
    """The state as it is, but of a model with 16 KV heads in a layer."""
    told = route.fetch().json()
    told["heads"]["reaches"] = [["all", "streaming", 4096, 131072] * 4] * 3
    route.fulfill(json=told)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()


def answer_of(page: Page) -> str:
    """The text of the last answer, when it is whole."""
    page.locator("#progress").wait_for(state="hidden")
    return page.locator(".turn.assistant .body").last.text_content() or ""


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

    def held(self: Session, token_ids: Any, progress: Any = None) -> Any:
        steps.append(len(token_ids))
        assert len(steps) == 1 or go_on.wait(20)
        return read(self, token_ids, progress)

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


@in_browser
def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(chat_model: Path, browser: Browser) -> None:
    with serve(chat_model, key="secret") as served, opened(browser, served, expected="401 (Unauthorized)") as page:
        for key in ("wrong", "secret"):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use this key").click()
            if key == "wrong":
                page.get_by_text("The server refused that key.").wait_for()
        page.get_by_text("This server keeps no documents").wait_for()
        ask(page, "who?")
        assert answer_of(page) == served.expected(served.prompt_ids(user("who?")), 20)
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        page.reload()
        page.locator("#model option").first.wait_for(state="attached")
        assert not page.locator("#key").is_visible()


@in_browser
def test_memory_and_heads_are_shown_in_words(chat_model: Path, browser: Browser) -> None:
    scores = ((0.9, 0.1, 0.2), (0.8, 0.7, 0.1), (0.1, 0.2, 0.3))
    with (
        serve(chat_model, head_map=HeadMap(scores, 16, 32), retrieval_ratio=1 / 3) as served,
        opened(browser, served) as page,
    ):
        page.get_by_text("The plan, line by line").click()
        page.get_by_text("How far each head looks back").click()
        rows = page.locator("#head-map tr")
        assert [row.split() for row in rows.all_inner_texts()] == [
            ["layer", "h0", "h1", "h2"], ["0", "all", "stream", "stream"],
            ["1", "all", "all", "stream"], ["2", "stream", "stream", "stream"],
        ]  # fmt: skip
        assert "3 of 9 KV heads keep all tokens" in (page.locator("#heads-line").text_content() or "")
        told = httpx.get(f"{served.root}/status").json()
        assert page.locator("#plan-table tr").count() == len(told["memory"]["items"]) + 2
        assert "0 of 2,000 tokens" in (page.locator("#now").text_content() or "")


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction_and_all_text_can_be_read(
    kept: Served, browser: Browser, scheme: str
) -> None:
    with opened(browser, kept, viewport={"width": 400, "height": 800}, color_scheme=scheme) as page:
        page.route("**/status", many_heads)
        page.reload()
        page.locator("#model option").first.wait_for(state="attached")
        ask(page, f"```\n{'w' * 300}\n```\n{'v' * 300}")
        answer_of(page)
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        for button in ("Chat", "Documents", "Memory"):
            page.get_by_role("button", name=button, exact=True).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            assert page.evaluate("document.querySelector('main').scrollWidth") <= 400
        page.evaluate(ONE_OF_EACH)
        for selector in ("body", ".quiet", "#send", ".problem", ".turn.user .body", ".turn h3", "mark", ".label"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector


@in_browser
def test_everything_goes_by_keyboard_with_the_focus_in_sight(kept: Served, browser: Browser) -> None:
    with opened(browser, kept, reduced_motion="reduce") as page:
        page.locator("#model option").first.wait_for(state="attached")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # skips to the question
        page.keyboard.type("who?")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("and")
        page.keyboard.press("Enter")
        assert answer_of(page) == kept.expected(kept.prompt_ids(user("who?\nand")), 20)
        page.reload()
        page.locator("#model option").first.wait_for(state="attached")
        seen = set()
        page.keyboard.press("Tab")
        while told := page.evaluate(FOCUS):
            assert told[1] != "none" and set(told[2].split(", ")) == {"0s"}, told
            seen.add(told[0])
            page.keyboard.press("Tab")
        assert {"skip", "new-chat", "log", "model", "question", "send", "files"} <= seen
