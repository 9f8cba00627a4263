"""The server's page in a real browser: opening it, asking, and what must not happen meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from server_case import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


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


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()


def answer_of(page: Page) -> str:
    """The text of the last answer, when it is whole."""
    page.locator("#progress").wait_for(state="hidden")
    return page.locator(".turn.assistant .body").last.text_content() or ""
