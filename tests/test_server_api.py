"""Completions, log-probabilities, tokens and counts over HTTP, compared with the Python API and with torch."""

from __future__ import annotations

import httpx
import pytest
import torch
from server_case import NAME, Served, user

from longrun.server.reading import STEP_SECONDS, StepSizes
from longrun.text.spelling import TokenSpelling

TEXT = "once upon a time there was"


def test_completions_are_those_of_the_python_api(served: Served) -> None:
    client, ids = served.client(), served.reference.encode(TEXT)
    expected = served.expected(ids, 9)
    for prompt in (TEXT, [TEXT], ids, [ids]):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=9)
        assert answer.choices[0].text == expected
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 9)
    assert client.completions.create(model=NAME, prompt=TEXT).usage.completion_tokens == 16
    stream = client.completions.create(model=NAME, prompt=TEXT, max_tokens=9, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT + expected
    drawn = client.completions.create(
        model=NAME, prompt=TEXT, max_tokens=9, temperature=2, seed=3, extra_body={"min_p": 0.2, "top_k": 9}
    )
    assert drawn.choices[0].text == served.expected(ids, 9, temperature=2, seed=3, min_p=0.2, top_k=9)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"max_completion_tokens": 3, "stream": False}),  # LangChain
        ("chat/completions", {"max_completion_tokens": 3, "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0,
                              "logprobs": True, "top_logprobs": 2, "seed": 1, "stop": ["~"], "temperature": 0.7}),
        ("completions", {"max_tokens": 3, "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": None,
                         "seed": None, "temperature": 0.7, "top_p": 1}),
        ("chat/completions", {"max_tokens": 3, "stream": False, "temperature": 0.1}),  # LlamaIndex
        ("chat/completions", {"stream": True, "tools": [], "stream_options": {"include_usage": True}}),  # Continue
        ("chat/completions", {"stream": True, "stream_options": {"include_usage": True}, "top_k": 40,  # Open WebUI
                              "temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "seed": 1, "stop": ["~"],
                              "max_tokens": 3}),
    ],
)  # fmt: skip
def test_what_clients_send_by_themselves_is_served(served: Served, path: str, body: dict) -> None:
    """As recorded between them and a server; docs/clients.md names their versions."""
    asks = {"prompt": ["one", "two"]} if path == "completions" else {"messages": user("hello")}
    answer = served.post(f"/v1/{path}", {"model": NAME, **asks, **body})
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"total_tokens"' in answer.text
    else:
        assert len(answer.json()["choices"]) == len(asks.get("prompt", [0]))


def logprobs_of(served: Served, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1, vocab]: what predicts each token but the first, from one pass without a server."""
    session = served.reference.new_session()
    session.prefill(ids[:1])
    return session.score(ids[1:]).log_softmax(-1)


def test_logprobs_of_an_answer_and_of_an_echoed_prompt_are_the_models(served: Served) -> None:
    client, ids = served.client(), served.reference.encode(TEXT)
    ask = {"model": NAME, "prompt": TEXT, "max_tokens": 5, "logprobs": 2}
    plain = client.completions.create(**ask)
    assert plain.choices[0].text == served.expected(ids, 5)
    echoed = client.completions.create(**ask, echo=True)
    assert echoed.choices[0].text == TEXT + plain.choices[0].text
    found = echoed.choices[0].logprobs
    assert "".join(found.tokens) == echoed.choices[0].text and found.text_offset == list(range(len(found.tokens)))
    said = served.reference.encode(echoed.choices[0].text)
    expected = logprobs_of(served, said)
    own = expected.gather(1, torch.tensor(said[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[0] is None and found.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    assert found.token_logprobs[-5:] == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-4)
    best = [sorted(each.values(), reverse=True) for each in found.top_logprobs[1:]]
    assert torch.tensor(best) == pytest.approx(expected.topk(2).values, abs=1e-4)

    scored = client.completions.create(**ask | {"max_tokens": 0}, echo=True)
    assert scored.choices[0].logprobs.tokens == list(TEXT) and scored.usage.completion_tokens == 0
    streamed = list(client.completions.create(**ask, echo=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert [value for part in parts for value in part.text_offset] == found.text_offset


def test_logprobs_of_a_chat(served: Served) -> None:
    ask = {"model": NAME, "messages": user("hello"), "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = served.client().chat.completions.create(**ask).choices[0]
    ids = served.prompt_ids(user("hello"))
    assert answer.message.content == served.expected(ids, 6)
    content = answer.logprobs.content
    assert "".join(each.token for each in content) == answer.message.content
    assert bytes(byte for each in content for byte in each.bytes).decode() == answer.message.content
    expected = logprobs_of(served, ids + served.reference.encode(answer.message.content))[-6:]
    assert [each.logprob for each in content] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert all(each.top_logprobs[0].token == each.token and len(each.top_logprobs) == 3 for each in content)
    streamed = served.client().chat.completions.create(**ask, stream=True)
    tokens = [each for chunk in streamed if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.logprob for each in tokens] == pytest.approx([each.logprob for each in content], abs=1e-4)


def test_a_stop_string_takes_its_scores_along(served: Served) -> None:
    said = served.expected(served.prompt_ids(user("hello")), 8)
    ask = {"messages": user("hello"), "max_tokens": 8, "logprobs": True, "stop": said[3:6]}
    answer = served.client().chat.completions.create(model=NAME, **ask).choices[0]
    assert answer.message.content == "".join(each.token for each in answer.logprobs.content) == said[:3]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ["a", "b"], "stream": True}, {"prompt": []}, {"prompt": ""}, {"prompt": ["a", ""]},
        {"prompt": [97]}, {"prompt": [[1], []]}, {"prompt": [[1], [97]]},
        {"prompt": [1, "a"]}, {"logprobs": 21}, {"suffix": "end"}, {"best_of": 2}, {"max_tokens": -1},
        {"max_tokens": 1990}, {"min_p": 2},
    ],
    ids=str,
)  # fmt: skip
def test_completions_that_are_refused(served: Served, change: dict) -> None:
    answer = served.post("/v1/completions", {"prompt": TEXT, "max_tokens": 1} | change)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_tokenize(served: Served) -> None:
    def ask(body: dict) -> dict:
        return served.post("/tokenize", body).json()

    assert ask({"content": TEXT})["tokens"] == served.reference.encode(TEXT, begins=False)
    assert ask({"content": TEXT, "add_special": True})["tokens"] == served.reference.encode(TEXT)
    chat = ask({"messages": user("hi </s>")})
    assert chat["tokens"] == served.prompt_ids(user("hi </s>")) and chat["count"] == len(chat["tokens"])
    for body in ({}, {"content": "a", "messages": user("a")}, {"messages": user("a"), "add_special": True}):
        assert ask(body)["error"]["type"] == "invalid_request_error"


def test_metrics_count_what_was_asked(served: Served) -> None:
    def values() -> dict[str, float]:
        page = httpx.get(f"{served.root}/metrics").text
        return {
            key: float(value) for key, value in (line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
        }

    before = values()
    served.post("/v1/completions", {"prompt": "count me", "max_tokens": 7, "stop": "\n"})
    served.post("/v1/completions", {"prompt": "", "max_tokens": 7})
    after = values()
    assert after["longrun_prompt_tokens_total"] - before["longrun_prompt_tokens_total"] == 8
    assert after["longrun_generated_tokens_total"] - before["longrun_generated_tokens_total"] == 7
    asked = 'longrun_requests_total{path="/v1/completions",status="%d"}'
    assert [after[asked % status] - before.get(asked % status, 0) for status in (200, 400)] == [1, 1]
    assert after["longrun_session_tokens"] >= 15 and after["longrun_running_requests"] == 0


def test_tokens_are_spelled_with_all_their_bytes() -> None:
    from chat_tokenizers import END, LLAMA2, byte_tokenizer, metaspace_tokenizer

    for tokenizer in (byte_tokenizer(None), metaspace_tokenizer(LLAMA2)):
        spelling, text = TokenSpelling(tokenizer), "the é漢"
        ids = tokenizer(f"a {text}", add_special_tokens=False)["input_ids"]
        spelled = bytes(byte for token_id in ids for byte in spelling.bytes(token_id))
        assert spelled.decode().strip() == f"a {text}"
    assert TokenSpelling(byte_tokenizer(None)).text(byte_tokenizer(None).eos_token_id) == END


def test_steps_shrink_where_tokens_cost_more_and_grow_again() -> None:
    sizes, longest, read = StepSizes(64, 2048), 0.0, []
    for position in range(0, 1_000_000, 10_000):  # from 3,000 tokens a second to 30
        seconds = sizes.next * (0.0003 + 0.033 * position / 1_000_000)
        longest = max(longest, seconds)
        read.append(sizes.next)
        sizes.took(sizes.next, seconds)
    assert max(read) == 2048 and read[-1] == 64 * int(STEP_SECONDS / 0.0333 // 64) and longest < 2 * STEP_SECONDS
    for _ in range(9):
        sizes.took(sizes.next, 1e-9)
    assert sizes.next == 2048
