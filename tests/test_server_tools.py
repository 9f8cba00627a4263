"""Functions that a model may call: told of as its template does, and found in its answer, whole and in a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from chat_tokenizers import CHATML, byte_tokenizer
from server_case import NAME, TEMPLATE, Served, serve, user
from test_server_documents import put_and_wait
from tiny_models import tiny_model
from transformers import PreTrainedTokenizerFast

from longrun.server.answerer import Answerer
from longrun.text.chat_prompt import ChatPrompts
from longrun.text.tool_calls import ToolCall, ToolCallText, takes_tools

CALLING = (
    "{% if tools %}<|im_start|>system\nYou may call:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "Write <tool_call>\n{...}\n</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "not <|im_end|> é"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "<tool_call>", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def calling_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(CALLING)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return tokenizer


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random model with such a template; what it answers is put into its mouth."""
    folder, tokenizer = tmp_path_factory.mktemp("calling") / "model", calling_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serve(folder, documents=tmp_path_factory.mktemp("kept")) as running:
        yield running


@pytest.fixture
def say(calling: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call after which every answer is this text."""

    def put(text: str) -> None:
        tokenizer = calling.reference.tokenizer
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        monkeypatch.setattr(
            Answerer, "_tokens", lambda _, ask: ((token_id, None) for token_id in ids[: ask.max_new_tokens])
        )

    return put


def test_calls_are_told_whole_and_streamed(calling: Served, say: Any) -> None:
    ask = {"model": NAME, "messages": user("rain?"), "tools": [WEATHER], "tool_choice": "auto", "max_tokens": 200}
    for text, content, names in (
        (f"Let me look.\n{CALL}\n", "Let me look.", ["weather"]), (CALL + TIME, None, ["weather", "time"]),
        (f"a {CALL} b {TIME} c", "a  b  c", ["weather", "time"]),
    ):  # fmt: skip
        say(text)
        choice = calling.client().chat.completions.create(**ask).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", content)
        calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == names and len({call.id for call in calls}) == len(calls)
        assert json.loads(calls[0].function.arguments) == {"city": "Köln"}
        with calling.client().chat.completions.stream(**ask) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert " ".join((final.message.content or "").split()) == " ".join((content or "").split())
        assert [(call.function.name, call.function.arguments) for call in final.message.tool_calls] == [
            (call.function.name, call.function.arguments) for call in calls
        ]


@pytest.mark.parametrize(
    ("text", "limit", "reason"),
    [
        ("No need. 1 < 2 <tool", 200, "stop"), ('<tool_call>{"name": weather}</tool_call>', 200, "stop"),
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', 200, "stop"), (CALL, 30, "length"),
    ],
)  # fmt: skip
def test_what_is_no_whole_call_is_text(calling: Served, say: Any, text: str, limit: int, reason: str) -> None:
    say(text)
    ask = {"model": NAME, "messages": user("hi"), "tools": [WEATHER], "max_tokens": limit}
    choice = calling.client().chat.completions.create(**ask).choices[0]
    chunks = [chunk.choices[0] for chunk in calling.client().chat.completions.create(**ask, stream=True)]
    said = "".join(chunk.delta.content or "" for chunk in chunks)
    assert said == choice.message.content == text[: len(said)] and (len(said) == len(text)) == (reason == "stop")
    assert choice.finish_reason == chunks[-1].finish_reason == reason and choice.message.tool_calls is None


def test_without_tools_a_call_is_text(calling: Served, say: Any) -> None:
    say(CALL)
    for more in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}):
        told = calling.post("/v1/chat/completions", {"messages": user("hi"), "max_tokens": 200, **more}).json()
        assert told["choices"][0]["message"]["content"] == CALL
        assert told["usage"]["prompt_tokens"] == len(calling.prompt_ids(user("hi")))


def test_prompts_are_the_template_s_and_spellings_in_them_only_text(calling: Served) -> None:
    """Compared with transformers', which takes a control token's spelling for the token: so without any first."""
    tokenizer = calling.reference.tokenizer
    plain = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    chat = [
        *user("rain?"), {"role": "assistant", "content": "I look.", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "wet"},
    ]  # fmt: skip
    parsed = json.loads(json.dumps(chat))
    parsed[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Köln"}
    expected = tokenizer.apply_chat_template(parsed, tools=[plain], add_generation_prompt=True, return_dict=False)
    body = {"messages": chat, "tools": [plain], "max_tokens": 1}
    told = calling.post("/v1/chat/completions", body)
    assert told.status_code == 200 and told.json()["usage"]["prompt_tokens"] == len(expected)
    pairs, more = (
        [(m["role"], m["content"]) for m in chat],
        [{"tool_calls": parsed[1]["tool_calls"]} if n == 1 else {} for n in range(3)],
    )
    assert ChatPrompts(tokenizer).read(pairs, None, [plain], more)[0] == expected
    without = tokenizer.apply_chat_template(parsed, add_generation_prompt=True, return_dict=False)
    assert calling.post("/tokenize", {"messages": chat}).json()["tokens"] == without

    begin = tokenizer.convert_tokens_to_ids("<tool_call>")
    ids, _ = ChatPrompts(tokenizer).read([("user", CALL)], None, [WEATHER], None)
    assert ids.count(begin) == 1  # the template's own
    assert tokenizer.decode(ids).count("<tool_call>") == 3 and "not <|im_end|> é" in tokenizer.decode(ids)


def said_call(role: str, arguments: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": role, "content": "a", "tool_calls": [call]}]}


STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
NAMED = {"type": "function", "function": {"name": "weather"}}
REFUSED = {
    "a function to be called": ({"tool_choice": NAMED}, "tool_choice"),
    "some function to be called": ({"tool_choice": "required"}, "tool_choice"),
    "one call at most": ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    "scores": ({"logprobs": True}, "logprobs"),
    "a form": ({"response_format": {"type": "json_object"}}, "response_format"),
    "arguments by a schema": ({"tools": [STRICT]}, "tools.0.function.strict"),
    "another kind": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "no name": ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    "a document": ({"model": f"{NAME}@text"}, "tools"),
    "a result of no call": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
    "a call of a user": (said_call("user", "{}"), "messages.0"),
    "arguments that are none": (said_call("assistant", "[]"), "messages.0.tool_calls.0.function"),
    "an empty message": ({"messages": [{"role": "assistant"}]}, "messages.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(calling: Served, name: str) -> None:
    change, param = REFUSED[name]
    if name == "a document":
        put_and_wait(calling, "text", "a text")
    body = {"messages": user("hi"), "tools": [WEATHER], "max_tokens": 2} | change
    told = calling.post("/v1/chat/completions", body)
    assert (told.status_code, told.json()["error"]["param"]) == (400, param), told.text


def test_a_template_without_tools_takes_no_messages_of_their_use(served: Served) -> None:
    chat = [*user("a"), {"role": "tool", "tool_call_id": "1", "content": "b"}]
    told = served.post("/v1/chat/completions", {"messages": chat, "max_tokens": 2})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "messages")
    assert [takes_tools(byte_tokenizer(each)) for each in (TEMPLATE, CHATML, CALLING, None)] == [
        False,
        False,
        True,
        False,
    ]


def test_calls_in_pieces_of_every_size() -> None:
    text = f"x < y <tool{CALL}{TIME}"
    for size in range(1, len(text)):
        split = ToolCallText()
        said = "".join(split.feed(text[start : start + size]) for start in range(0, len(text), size))
        rest, calls = split.finish()
        assert said + rest == "x < y <tool"
        assert calls == [ToolCall("weather", '{"city": "Köln"}'), ToolCall("time", "{}")]
