"""A template is a program: rendered as transformers does it, within bounds, and what longrun reads from it."""

from __future__ import annotations

import pytest
from chat_tokenizers import CHATML, LLAMA2, START, byte_tokenizer, metaspace_tokenizer

from longrun.errors import CheckpointError
from longrun.text import chat_template
from longrun.text.chat_template import TemplateError, render_chats
from longrun.text.turn_end import template_ends, tokenizer_ends

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TRICKS = (
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
    "{% generation %}{{ m['content'] | trim }}{% set ns.n = ns.n + 1 %}{% endgeneration %}{% endfor %}"
    "{{ ns.n }}{{ messages | tojson }}{{ strftime_now('%Y') }}{{ bos_token }}{{ dict(a=1) | tojson(indent=1) }}"
)
CHATS = [[("user", "a")], [("user", "Hi 日本 \\ \" '"), ("assistant", " b\n"), ("user", "<|im_end|>")]]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TRICKS])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(template, prompt):
    tokenizer = metaspace_tokenizer(template)
    expected = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in chat], tokenize=False, add_generation_prompt=prompt
        )
        for chat in CHATS
    ]
    assert render_chats(tokenizer, CHATS, prompt) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'x' * 10**10 }}", "needed more than 512 MB of memory"),
        ("{{ '%2000000000d' % 1 }}", "needed more than 512 MB of memory"),
        ("{{ 'a'.center(10**9) | length }}", "needed more than 512 MB of memory"),
        ("{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaa' }}{% endfor %}", "wrote more than 1,048,580 characters"),
        (ENDLESS, "ran for more than 1 seconds of processor time"),
    ],
)
def test_a_template_without_bounds_is_one_sentence(template, why, monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    with pytest.raises(CheckpointError, match=rf"chat template {why}.*remove the template"):
        render_chats(byte_tokenizer(template), [[("user", "a")]])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only cats') }}", "only cats"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{{ ().__class__.__mro__ }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ({"tool_use": CHATML}, "multiple chat templates"),
    ],
)
def test_a_template_that_refuses_tells_its_reason(template, why):
    with pytest.raises(TemplateError, match=why):
        render_chats(byte_tokenizer(template), [[("user", "a")]])


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA2.replace("eos_token", "'<|im_start|>'"), ["<|im_start|>"]),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", []),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}<|im_end|>", []),
        (None, []),
    ],
)
def test_what_a_template_puts_behind_an_answer_ends_a_turn(template, ends):
    tokenizer = byte_tokenizer(template)
    assert template_ends(tokenizer) == {tokenizer.convert_tokens_to_ids(token) for token in ends}
    assert tokenizer_ends(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert tokenizer_ends(tokenizer) == frozenset() and START in tokenizer.get_vocab()
