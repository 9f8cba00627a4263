"""Who may ask a server and for how long: keys, host names, clients that leave, limits of time and room."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from server_case import LIMITS, NAME, Served, serve, user, wait_for

from longrun.errors import InputError
from longrun.server.guard import check_exposure, checked_key
from longrun.server.service import Limits
from longrun.session.session import Session

LONG = {"model": NAME, "prompt": "write", "max_tokens": 1900}


def leave(served: Served, body: dict, after: float) -> None:
    """Ask and close the connection after so many seconds."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.root}/v1/completions", json=body, timeout=httpx.Timeout(10, read=after))


def test_writing_stops_when_the_client_leaves(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: served.health()["running"] == 0)
    assert served.health()["session_tokens"] < 1900
    leave(served, LONG, 0.1)
    wait_for(lambda: served.health()["running"] == 0)
    assert served.health()["session_tokens"] < 1900


def test_reading_stops_when_the_client_leaves_and_goes_on_where_it_stopped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = Session.prefill

    def slow(session: Session, *arguments: object, **how: object) -> object:
        time.sleep(0.2)
        return prefill(session, *arguments, **how)

    monkeypatch.setattr(Session, "prefill", slow)
    monkeypatch.setattr("longrun.server.reading.STEP_SECONDS", 0.001)  # steps of one page
    body = {"model": NAME, "prompt": "a long text " * 100, "max_tokens": 1}
    leave(served, body, 1.0)
    wait_for(lambda: served.health()["running"] == 0)
    read = served.health()["session_tokens"]
    assert 0 < read < 1200
    monkeypatch.setattr(Session, "prefill", prefill)
    again = served.client().completions.create(**body)
    assert again.usage.prompt_tokens_details.cached_tokens == read
    assert again.choices[0].text == served.expected(served.reference.encode(body["prompt"]), 1)


def test_a_stream_without_news_is_kept_alive_by_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Session.prefill

    def slow(session: Session, *arguments: object, **how: object) -> object:
        time.sleep(1)
        return prefill(session, *arguments, **how)

    monkeypatch.setattr(Session, "prefill", slow)
    monkeypatch.setattr("longrun.server.http.PING_SECONDS", 0.2)
    body = {"model": NAME, "prompt": "not read before", "max_tokens": 1, "stream": True}
    lines = served.post("/v1/completions", body).text.splitlines()
    text = next(number for number, line in enumerate(lines) if line.startswith("data: "))
    assert sum(line.startswith(":") for line in lines[:text]) >= 2
    assert all(line.startswith((":", "data: ")) for line in lines if line) and lines[-2] == "data: [DONE]"


def test_those_who_leave_the_queue_are_not_answered(served: Served) -> None:
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    threads = [threading.Thread(target=leave, args=(served, LONG, 3.0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.health()["waiting"] == 3)
    for thread in threads:
        thread.join()
    wait_for(lambda: served.health()["waiting"] == 0)
    stream.close()
    wait_for(lambda: served.health()["running"] == 0)


def test_a_full_queue(chat_model: Path) -> None:
    found = []
    with serve(chat_model, most_waiting=1) as served:
        first = served.client().completions.create(**LONG, stream=True)
        next(iter(first))
        ask = partial(served.post, "/v1/completions", LONG | {"max_tokens": 1})
        second = threading.Thread(target=lambda: found.append(ask().status_code))
        second.start()
        wait_for(lambda: served.health()["waiting"] == 1)
        full = ask()
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        first.close()
        second.join()
        assert found == [200]


def test_what_takes_too_long_or_is_too_large(chat_model: Path) -> None:
    limits = Limits(LIMITS.max_new_tokens, 1.0, 3000, body_seconds=0.3)
    with serve(chat_model, limits) as served:
        with pytest.raises(openai.APIError, match="longer than the 1 seconds"):
            list(served.client().completions.create(**LONG, stream=True))
        assert served.post("/v1/completions", {"prompt": "x" * 3000}).status_code == 413

        def slow_body():
            yield b"{"
            time.sleep(0.6)
            yield b"}"

        slow = httpx.post(
            f"{served.root}/v1/completions", content=slow_body(), headers={"content-type": "application/json"}
        )
        assert (slow.status_code, slow.json()["error"]["code"]) == (408, "timeout")


def test_a_key_guards_all_but_health(chat_model: Path) -> None:
    with serve(chat_model, key="secret", origins=["http://page.example"]) as served:
        assert served.client(api_key="secret").models.list().data[0].id == NAME
        for key in ("Secret", "secre", "secret2", "secret secret"):
            answer = httpx.get(f"{served.root}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{served.root}/metrics").status_code == 401
        assert httpx.get(f"{served.root}/health").status_code == 200
        asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(f"{served.root}/v1/models", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "http://page.example"
        refused = httpx.options(f"{served.root}/v1/models", headers=asked | {"Origin": "http://other.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_without_a_key_only_this_machine_is_answered(served: Served) -> None:
    stranger = httpx.get(f"{served.root}/v1/models", headers={"Host": "evil.example"})
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (403, "wrong_host")
    port = served.root.rpartition(":")[2]
    for name in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert httpx.get(f"{served.root}/v1/models", headers={"Host": name}).status_code == 200
    preflight = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{served.root}/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers


def test_a_server_that_others_can_reach_needs_a_key() -> None:
    for address in ("0.0.0.0", "192.168.1.2", "::", "fe80::1%eth0"):
        with pytest.raises(InputError, match="give a key"):
            check_exposure(address, None, [])
        check_exposure(address, "key", [])
    check_exposure("127.0.0.1", None, ["http://page.example"])
    check_exposure("::1", None, [])
    with pytest.raises(InputError, match="every web page"):
        check_exposure("127.0.0.1", None, ["*"])
    for key in ("", "a b", "schlüssel"):
        with pytest.raises(InputError, match="printable ASCII"):
            checked_key(key, "--api-key")


def test_a_defect_in_one_request_does_not_harm_the_next(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": NAME, "prompt": "what is next", "max_tokens": 5}
    before = served.client().completions.create(**body).choices[0].text
    prefill = Session.prefill
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: 1 // 0)
    answer = served.post("/v1/completions", body | {"prompt": "another one"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "ZeroDivision" not in answer.text
    monkeypatch.setattr(Session, "prefill", prefill)
    assert served.client().completions.create(**body).choices[0].text == before
    assert served.post("/v1/chat/completions", {"messages": user("hi"), "max_tokens": 1}).status_code == 200
