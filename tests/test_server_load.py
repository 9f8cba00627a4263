"""scripts/load_server.py and scripts/fuzz_server.py: a few requests pass, and what would be wrong is found."""

from __future__ import annotations

import httpx
import pytest
from server_case import NAME, Served, user

from longrun.errors import InputError
from scripts.ask import ask
from scripts.fuzz_server import fuzz, wrong_with
from scripts.load_server import Load


def test_no_answer_is_lost_or_mixed_up(served: Served) -> None:
    load = Load(served.root, served.reference, NAME, context=2000)
    load.run(24, 8, 1)
    assert load.faults == [] and load.done.total() == 24 and {"leaves", "bad", "too long"} <= set(load.done)
    load._compare("a prompt", False, {"max_tokens": 3}, "no answer of any model")
    assert len(load.faults) == 1 and "the Python API's" in load.faults[0]


def test_damaged_bodies_are_answered_or_refused(served: Served) -> None:
    faults, seen = fuzz(served.root, 60, 3)
    assert faults == [] and sum(seen.values()) == 60 and {"200", "400"} <= set(seen)
    assert served.health()["status"] == "ok"


def test_the_script_that_asks_says_what_was_read_before(served: Served, capsys: pytest.CaptureFixture) -> None:
    client, texts = served.client(), ["a text that is read once " * 30]
    for question in ("who?", "where?"):
        ask(client, NAME, texts, question, 5)
    out, err = capsys.readouterr()
    expected = [served.expected(served.prompt_ids(user(f"{texts[0]}\n\n{each}")), 5) for each in ("who?", "where?")]
    assert out.split("\n")[:2] == expected
    first, second = err.splitlines()
    assert "prompt tokens, 0 of them read before" in first and "7" in second.partition("tokens, ")[2][:2]
    with pytest.raises(InputError, match="exceed the context"):
        ask(client, NAME, ["x" * 2000], "who?", 5)


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (httpx.Response(500, text="x"), "status 500"),
        (httpx.Response(400, json={"error": {"message": "no"}}), "another shape"),
        (httpx.Response(200, json={"error": {}}), "status 200"),
        (httpx.Response(200, text="data: {}\n\n", headers={"content-type": "text/event-stream"}), "without an end"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_response(response: httpx.Response, wrong: str) -> None:
    response.headers.setdefault("content-type", "text/plain")
    assert wrong in wrong_with(response)
