"""`response_format`: every answer is JSON of its schema, by a library that did not write it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from chat_tokenizers import CHATML, LLAMA2, byte_tokenizer, metaspace_tokenizer
from json_schemas import COUNT, SCHEMAS, array, obj, text
from server_case import Served, serve, user
from tiny_models import tiny_model

from longrun.engine.sampling import SamplingParams
from longrun.engine.token_rule import masked_logits
from longrun.errors import InputError
from longrun.text.json_answers import JsonAnswers, response_schema
from longrun.text.stream import AnswerText
from scripts.fuzz_mutations import damage_json


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random model whose tokens are bytes and a few merges, some ids without a token, and two ends."""
    folder = tmp_path_factory.mktemp("writing") / "model"
    tokenizer = byte_tokenizer(CHATML)
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    tiny_model("llama", vocab_size=len(tokenizer) + 5, eos_token_id=ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serve(folder) as running:
        yield running


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_there_are_fifty() -> None:
    assert len(SCHEMAS) == 50
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def said(served: Served, body: dict[str, Any], streamed: bool = False) -> tuple[str, str]:
    """An answer's text and why it ended."""
    told = served.post("/v1/chat/completions", {"max_tokens": 1500, **body, "stream": streamed})
    assert told.status_code == 200, told.text
    if not streamed:
        choice = told.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    lines = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize("number", range(5))
def test_every_answer_is_json_of_its_schema(writing: Served, number: int) -> None:
    """Of a model that knows nothing: greedy, drawn, streamed, with scores and a penalty."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 3.0, "seed": 2, "top_k": 5, "min_p": 0.1},
        {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "seed": 4, "logprobs": True, "top_logprobs": 2},
    ]
    for place, (name, schema) in enumerate(list(SCHEMAS.items())[number::5]):
        body = {"messages": user("write"), "response_format": form(schema), **settings[place % 5]}
        content, reason = said(writing, body, streamed=place % 2 == 1)
        assert reason == "stop", (name, content)
        jsonschema.validate(json.loads(content), schema)


def test_an_answer_that_is_cut_is_told_to_be(writing: Served) -> None:
    many = form(text("^a{50}$"))
    body = {"messages": user("hi"), "response_format": many}
    assert said(writing, {**body, "max_tokens": 10}) == ('"aaaaaaaaa', "length")
    assert said(writing, {**body, "max_tokens": 52}) == (f'"{"a" * 50}"', "stop")  # complete with its last token
    assert said(writing, {**body, "stop": "aaa"}) == ('"', "stop")
    ask = {"prompt": "hi", "response_format": many, "max_tokens": 5}
    assert writing.post("/v1/completions", ask).json()["choices"][0]["text"] == '"aaaa'


def test_any_object_and_any_text(writing: Served) -> None:
    body = {"messages": user("hi"), "temperature": 1.0, "seed": 5}
    plain = said(writing, {**body, "max_tokens": 30})
    assert said(writing, {**body, "max_tokens": 30, "response_format": {"type": "text"}}) == plain
    content, reason = said(writing, {**body, "max_tokens": 300, "response_format": {"type": "json_object"}})
    assert content.lstrip().startswith("{") and reason in ("stop", "length")
    assert reason == "length" or isinstance(json.loads(content), dict)
    assert said(writing, {**body, "max_tokens": 30}) == plain


def test_tokens_are_the_likeliest_that_are_allowed_and_scores_the_model_s_own(writing: Served) -> None:
    runtime, schema = writing.reference, form(SCHEMAS["extraction"])
    ids = runtime.encode("write it")
    session, other = runtime.new_session(), runtime.new_session()
    session.prefill(ids)
    rule, again = runtime.json_rule(schema), runtime.json_rule(schema)
    scores = list(session.generate_scored(40, SamplingParams(), top=1, rule=rule))
    tokens = [score.token_id for score in scores]
    other.prefill(ids)
    logits = other.score(tokens)
    forced = 0
    for row, score in zip(logits, scores, strict=True):
        bits = again.allowed()
        best = max((i for i in range(len(row)) if bits[i // 8] >> i % 8 & 1), key=lambda i: row[i])
        forced += best != int(row.argmax())
        assert score.token_id == best
        assert score.logprob == pytest.approx(float(row.log_softmax(0)[best]), abs=1e-4)
        assert score.top[0][0] == int(row.argmax())
        again.take(best)
    assert forced > 10
    session = runtime.new_session()
    session.prefill(ids)
    streamed = "".join(runtime.stream(session, 40, response_format=schema))
    assert streamed == runtime.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_what_may_come_next() -> None:
    """Both ends where the value may end; never a control token, nor an id without a token."""
    tokenizer = byte_tokenizer(CHATML)
    ends, size = [tokenizer.eos_token_id, tokenizer.bos_token_id], len(tokenizer) + 5
    rule = JsonAnswers(tokenizer, size, ends).rule({"type": "integer"})

    def allowed() -> set[str | int]:
        bits = rule.allowed()
        ids = {i for i in range(8 * len(bits)) if bits[i // 8] >> i % 8 & 1}
        return ids & set(ends) | {tokenizer.convert_ids_to_tokens(i) for i in ids - set(ends)}

    assert allowed() == {"-", *"0123456789"}
    rule.take(tokenizer.convert_tokens_to_ids("1"))
    assert allowed() == {*ends, *"0123456789"} and not rule.is_complete
    masked = masked_logits(torch.zeros(size), rule.allowed())
    assert masked.isfinite().sum() == 12 and masked[ends].isfinite().all()


def test_a_vocabulary_with_a_space_mark_and_bytes() -> None:
    """What is chosen at random is text that is valid, as the stream of an answer decodes it."""
    tokenizer, rng = metaspace_tokenizer(LLAMA2), random.Random(0)
    answers = JsonAnswers(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for schema in (obj(name=text(maxLength=9), known=COUNT), array(text("^[a é漢]{1,5}$"), 3, 1)):
        for _ in range(5):
            rule, answer, content = answers.rule(schema), AnswerText(tokenizer), ""
            while not rule.is_complete:
                bits = rule.allowed()
                token_id = rng.choice([i for i in range(len(tokenizer)) if bits[i // 8] >> i % 8 & 1])
                if token_id == tokenizer.eos_token_id:
                    break
                rule.take(token_id)
                content += answer.step(token_id)
            jsonschema.validate(json.loads(content + answer.flush()), schema)


REFUSED = {
    "no type": ({"type": "xml"}, "none of the types"),
    "no schema": ({"type": "json_schema", "json_schema": {"name": "a"}}, "needs a schema"),
    "a list": ({"type": "json_schema", "json_schema": {"schema": []}}, "needs a schema"),
    "a key too many": ({"type": "json_object", "schema": {}}, "no 'schema'"),
    "an unknown key": ({"type": "json_schema", "json_schema": {"schema": {}, "shape": 1}}, "no 'shape'"),
    "a wrong type": (form({"type": "colour"}), "Invalid type"),
    "a wrong pattern": (form(text("(")), "unclosed group"),
    "a look-ahead": (form(text("(?=a)b")), "look-around"),
    "an unknown format": (form(text(format="colour")), "Unknown format"),
    "a missing reference": (form({"$ref": "#/$defs/none"}), "does not exist"),
    "a reference elsewhere": (form({"$ref": "http://127.0.0.1/schema"}), "not fetch"),
    "unsupported": (form({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "unsupported, and asked to pass over it": (
        form({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"
    ),
    "oneOf that may overlap": (form({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    "nothing can be it": (form({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
    "properties that are none": (form({"type": "object", "properties": []}), "properties must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_refused_before_anything_is_read(writing: Served, name: str) -> None:
    asked, match = REFUSED[name]
    before = writing.health()["session_tokens"]
    answer = writing.post("/v1/chat/completions", {"messages": user("read nothing of this"), "response_format": asked})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "response_format")
    assert match in error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    assert writing.health()["session_tokens"] == before


def test_damaged_schemas_are_followed_or_refused() -> None:
    tokenizer, seen = byte_tokenizer(CHATML), Counter()
    answers = JsonAnswers(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for number in range(300):
        rng = random.Random(number)
        content, _ = damage_json(rng, json.dumps(rng.choice(list(SCHEMAS.values()))).encode())
        try:
            content = json.loads(content)
            schema = response_schema(form(content))
            seen[bool(answers.rule(schema).allowed().strip(b"\0"))] += 1
        except InputError:
            seen["refused"] += 1
        except (ValueError, RecursionError):  # no JSON any more
            assert not isinstance(content, dict)
    assert not seen[False] and seen[True] > 50 and seen["refused"] > 50


def test_a_tokenizer_of_another_kind_is_refused(served: Served) -> None:
    asked = {"messages": user("hi"), "response_format": {"type": "json_object"}}
    answer = served.post("/v1/chat/completions", asked)
    assert answer.status_code == 400 and "of a kind that llguidance does not know" in answer.json()["error"]["message"]
    with pytest.raises(InputError, match="of a kind that llguidance does not know"):
        served.reference.json_rule({"type": "json_object"})
    assert response_schema(None) is None
