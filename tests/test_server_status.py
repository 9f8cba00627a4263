"""The page's files and /status over HTTP, without a browser: who gets them, and that the numbers are right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from server_case import Served, serve, user, wait_for

from longrun.patterns.head_map import HeadSplit
from longrun.server.jobs import Finished, Loaded, Piece, Progress
from longrun.server.pace import Pace, Rate
from longrun.server.page_files import PAGE_FILES
from longrun.server.status import told_reaches
from longrun.session.session import Session
from longrun.specs.hot_counts import HotCounts
from longrun.units import ALL_TOKENS


def test_the_page_is_served_with_its_own_files_alone(kept: Served) -> None:
    page = httpx.get(kept.root)
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "default-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for path in PAGE_FILES:
        told = httpx.get(kept.root + path)
        assert told.status_code == 200 and told.headers["x-content-type-options"] == "nosniff"
        assert path == "/" or f'"{path}"' in page.text or f'"./{path.removeprefix("/page/")}"' in "".join(
            file.read_text() for file in PAGE_FILES.values()
        )  # fmt: skip
        assert "://" not in told.text.replace("http://www.w3.org/2000/svg", "")
    assert httpx.get(f"{kept.root}/page/other.js").status_code == 404
    assert httpx.get(f"{kept.root}/page/../app.py").status_code == 404


def test_status_is_the_plan_and_what_is_in_use(kept: Served) -> None:
    kept.post("/v1/chat/completions", {"messages": user("how many ships " * 20), "max_tokens": 9})
    told = httpx.get(f"{kept.root}/status").json()
    tokens = kept.health()["session_tokens"]
    assert told["context"] == {"tokens": tokens, "capacity": 2000, "sparse_tokens": 0} and tokens > 300
    # 3 layers of 3 heads of 16, keys and values, in float32
    assert told["memory"]["cache"]["filled"] == tokens * 9 * 16 * 2 * 4 < told["memory"]["cache"]["planned"]
    items = {item["name"]: item["bytes"] for item in told["memory"]["items"]}
    assert sum(items.values()) == told["memory"]["device"]["planned"] and told["memory"]["host"]["planned"] == 0
    assert 10**7 < told["memory"]["device"]["in_use"] < 10**11
    assert told["heads"]["reaches"] == [["all"] * 3] * 3
    assert told["last"]["writing"]["tokens"] == 8 and told["last"]["writing"]["tokens_per_s"] > 0
    assert told["queue"] == {"running": 0, "waiting": 0, "most": 64}
    held = httpx.put(f"{kept.root}/documents/disk", content=b"x" * 500, headers={"Content-Type": "text/plain"})
    assert held.status_code == 202
    wait_for(lambda: httpx.get(f"{kept.root}/documents/disk").json()["state"] == "ready")
    now = httpx.get(f"{kept.root}/status").json()["documents"]
    assert now["bytes"] > told["documents"]["bytes"] + 500 * 9 * 16 * 2 * 4 / 2 and now["free"] > 0
    assert httpx.delete(f"{kept.root}/documents/disk").status_code == 200


def test_a_hot_pool_tells_what_was_chosen_until_the_last_answer(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(chat_model) as served:
        served.post("/v1/chat/completions", {"messages": user("who?"), "max_tokens": 3})
        assert httpx.get(f"{served.root}/status").json()["memory"]["hot_pool"] is None  # a CPU has none
        monkeypatch.setattr(Session, "hot_counts", HotCounts((6, 4), (1, 1), 500))
        served.post("/v1/chat/completions", {"messages": user("who?"), "max_tokens": 3})
        assert httpx.get(f"{served.root}/status").json()["memory"]["hot_pool"] == {
            "planned": 0, "host_pages_chosen": 10, "hits": 8, "hit_rate": 0.8, "link_bytes": 1000,
        }  # fmt: skip


def test_reaches_are_told_in_the_order_of_the_checkpoint() -> None:
    split = HeadSplit.of_reaches(((32, ALL_TOKENS, 500), (ALL_TOKENS, 32, 32)), 8, 32)
    assert told_reaches(split) == [["streaming", "all", 500], ["all", "streaming", "streaming"]]
    plain = HeadSplit(((True, False), (False, True)), 8, 32)
    assert told_reaches(plain) == [["all", "streaming"], ["streaming", "all"]]


def test_pace_counts_what_was_read_and_the_steps_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 5.0, 5.5, 7.0])
    monkeypatch.setattr("longrun.server.pace.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pace, heard = Pace(), []
    emit = pace.watched(heard.append)
    read = [Progress(500, 100, done, 0.0) for done in (100, 300, 500)]
    events = [Loaded(100, 0.5), *read, Piece("a"), Piece("b"), Finished("stop", 500, 100, 5)]
    for event in events:
        emit(event)
    assert (pace.reading, pace.writing) == (Rate(400, 4.0), Rate(4, 2.0))
    assert pace.loading == Rate(100, 0.5)
    assert heard == events


def test_a_key_guards_the_state_and_not_the_page(chat_model: Path) -> None:
    with serve(chat_model, key="secret") as served:
        assert httpx.get(served.root).status_code == 200 and httpx.get(f"{served.root}/page/main.js").status_code == 200
        assert httpx.get(f"{served.root}/status").status_code == 401
        told = httpx.get(f"{served.root}/status", headers={"Authorization": "Bearer secret"}).json()
        assert told["documents"] is None and told["last"] == {"reading": None, "writing": None, "loading": None}
    with serve(chat_model) as served:
        assert httpx.get(served.root, headers={"Host": "evil.example"}).status_code == 403
