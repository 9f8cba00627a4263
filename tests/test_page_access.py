"""The local page for everybody: by key, by keyboard, on narrow screens, in light and dark; and its numbers in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from page_case import answer_of, ask, in_browser, opened
from server_case import Served, serve, user

from longrun.patterns.head_map import HeadMap

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

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


def many_heads(route: Route) -> None:
    """The state as it is, but of a model with 16 KV heads in a layer, and of a hot pool."""
    told = route.fetch().json()
    counts = {"host_pages_chosen": 1234, "hits": 1000, "hit_rate": 1000 / 1234, "link_bytes": 5}
    told["memory"]["hot_pool"] = {"planned": 2 * 10**9, **counts}
    told["heads"]["reaches"] = [["all", "streaming", 4096, 131072] * 4] * 3
    route.fulfill(json=told)


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
        assert "2.00 GB of GPU memory; 81.0% of 1,234 chosen host pages" in (page.locator("#now").text_content() or "")
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
