"""Tasks over real code and rules of a system prompt: what is extracted, how answers are judged, what a row measures."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from chat_tokenizers import CHATML, byte_tokenizer
from transformers import AutoTokenizer

import longrun
from longrun.errors import InputError
from longrun.lab.quality.answers import first_line, holds_value, is_finished, same_names
from longrun.lab.quality.asked import ASKED_TASKS, PER_TASK, CodeDocuments
from longrun.lab.quality.code_source import (
    CONSTANT,
    DEFAULT,
    SIGNATURE,
    WHICH_FILE,
    Fact,
    SourceFile,
    facts_of,
    source_facts,
    standard_library,
)
from longrun.lab.quality.measure_answers import measure_asked
from longrun.lab.quality.measures import Opened
from longrun.lab.quality.row import Row
from longrun.lab.quality.rules import NUM_RULES, draw_rules, draw_topics, system_prompt

TEXT = '''"""A made-up module."""
LIMIT = 4096
NAME = 'grey heron'
NAMED = "named"
ZERO, ON = 0, True
TWICE = 7
TWICE = 8
small = 55


class Collector:
    def __init__(self, source, size=64, mode="binary", strict=True, first=None):
        self.source = source

    def gather(self, *parts):
        def hidden(a, b, c):
            pass


def merge_all(left, right, *, key=12):
    pass


def twice(a, b, c):
    pass


def twice(a, b, c):
    pass
'''


def test_facts_are_short_literal_and_said_once():
    found = facts_of(SourceFile("pack/heron.py", TEXT))
    assert set(found) == {
        Fact(CONSTANT, "LIMIT", "4096", 2),
        Fact(CONSTANT, "NAME", "'grey heron'", 3),
        Fact(SIGNATURE, "Collector.__init__", "source, size, mode, strict, first", 12),
        Fact(DEFAULT, "Collector.__init__", "64", 12, "size"),
        Fact(DEFAULT, "Collector.__init__", '"binary"', 12, "mode"),
        Fact(WHICH_FILE, "Collector", "pack/heron.py", 11),
        Fact(WHICH_FILE, "merge_all", "pack/heron.py", 20),
    }
    assert facts_of(SourceFile("merge.py", TEXT))[-1].subject == "Collector"  # merge_all would be guessed
    assert facts_of(SourceFile("broken.py", "def (")) == ()


def test_the_library_is_told_by_version_and_checksum():
    files = standard_library()
    assert len(files) > 200 and not any(
        f"/{name}/" in f"/{file.name}" for file in files for name in ("test", "tests", "site-packages")
    )
    told = source_facts()
    assert told["modules"] == len(files) and told == source_facts() and len(told["sha256"]) == 64
    heapq = next(file for file in files if file.name == "heapq.py")
    for fact in facts_of(heapq):
        line = heapq.text.splitlines()[fact.line - 1]
        assert fact.subject.rpartition(".")[2] in line


@pytest.mark.parametrize(
    ("answer", "value", "right"),
    [
        ("4096", "4096", True),
        ("`4096`.", "4096", True),
        ("The value of LIMIT in v2.py is 4096.", "4096", True),
        ("LIMIT = 4096", "4096", True),
        ("```python\nLIMIT = 4096\n```", "4096", True),
        ("40960", "4096", False),
        ("It is 4096 or 8192", "4096", False),
        ("-4096", "4096", False),
        ("0x1000", "0x1000", True),
        ("8192\n4096", "4096", False),
        ('"grey heron"', "'grey heron'", True),
        ("The value of `NAME` in `heron.py` is `'grey heron'`.", "'grey heron'", True),
        ("grey", "'grey heron'", False),
        ("a grey heron", "'grey heron'", False),
        ("", "'grey heron'", False),
        ("pack/heron.py", "pack/heron.py", True),
        ("The file is pack/heron.py.", "pack/heron.py", True),
        ("heron.py", "pack/heron.py", False),
    ],
)
def test_values(answer, value, right):
    assert holds_value(answer, value) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("self, source, size", True),
        ("`self`, `source`, `size`.", True),
        ("__init__(self, source: str, size=64)", True),
        ("source, size", True),
        ("source", False),
        ("self, size, source", False),
        ("self, source, size, mode", False),
    ],
)
def test_names(answer, right):
    assert same_names(answer, "source, size") == right


def test_an_answer_ends_with_its_first_line():
    assert not is_finished("4096") and is_finished("4096\n") and not is_finished("```python\n")
    assert is_finished("```python\nX = 1\n") and first_line("\n```\n X = 1 \n") == "X = 1"


def test_rules_accept_their_example_and_nothing_else():
    rules = draw_rules(random.Random(3))
    assert len({rule.kind for rule in rules}) == len({rule.label for rule in rules}) == NUM_RULES
    said = system_prompt(rules)
    for rule in rules:
        assert f"Rule {rule.label}: {rule.instruction}." in said and "{" not in rule.instruction.replace(
            '{"answer"', ""
        )
        assert rule.is_followed(rule.example("Paris")) and not rule.is_followed("The capital is Paris.")
        others = [other for other in rules if other is not rule and other.is_followed(rule.example("Paris"))]
        assert not others, (rule.kind, [other.kind for other in others])
    assert draw_rules(random.Random(4)) != rules and len(set(draw_topics(random.Random(0), 8))) == 8


def library(count: int = 26) -> list[SourceFile]:
    """Small modules, each with names of its own."""
    found = []
    for n in range(count):
        names = {"Collector": f"Collector{n}x", "LIMIT": f"LIMIT_{chr(65 + n)}Q", "merge_all": f"merge_all{n}x"}
        text = TEXT.replace("4096", str(5000 + 37 * n))
        for name, other in names.items():
            text = text.replace(name, other)
        found.append(SourceFile(f"pack/m{n}.py", text))
    return found


@pytest.fixture(scope="module")
def tokenizer(planted):
    return AutoTokenizer.from_pretrained(planted.path)


def test_documents_hold_whole_files_and_what_is_asked(tokenizer):
    def made():
        return list(CodeDocuments(tokenizer, library()).code(4000, 2, seed=0))

    documents = made()
    for one, other in zip(documents, made(), strict=True):
        assert one.token_ids == other.token_ids and [q.text for q in one.questions] == [q.text for q in other.questions]
    assert documents[0].token_ids != documents[1].token_ids
    for document in documents:
        tasks = [question.task for question in document.questions]
        assert set(tasks) == set(ASKED_TASKS) - {"rules"} and all(tasks.count(task) <= PER_TASK for task in tasks)
        for question in document.questions:
            assert 0 < question.depth < 1 and question.is_right(question.expected) and not question.is_right("nothing")
            assert 3400 < len(document.token_ids) + len(question.token_ids) <= 4000
            assert len(question.alone_ids) < len(document.token_ids)
    with pytest.raises(InputError, match="ask for at least 2K"):
        next(CodeDocuments(tokenizer, library()).code(500, 1, seed=0))


def test_questions_follow_the_chat_template_and_rules_stand_in_the_system_prompt():
    tokenizer = byte_tokenizer(CHATML)
    documents = CodeDocuments(tokenizer, library())
    (code,), (rules,) = list(documents.code(9000, 1, 0)), list(documents.rules(9000, 1, 0))
    asked = code.questions[0]
    whole = tokenizer.decode([*code.token_ids, *asked.token_ids, *asked.expected_ids])
    assert whole.startswith("<|im_start|>user\n") or "<|im_start|>user\n" in whole
    assert whole.endswith(f"\n\n{asked.text}<|im_end|>\n<|im_start|>assistant\n{asked.expected}")
    said = tokenizer.decode(rules.token_ids)
    assert said.startswith("<|im_start|>system\nYou answer questions in a few words.")
    before = tokenizer.decode(rules.token_ids[: rules.opening])
    assert before.startswith("<|im_start|>system\n") and before.endswith("<|im_end|>\n<|im_start|>user\n")
    assert tokenizer.decode(rules.token_ids[rules.opening :]).startswith("Here are the files")
    assert [question.kind for question in rules.questions] and len(rules.questions) == NUM_RULES
    for question in rules.questions:
        assert f"Rule {question.text[-2]}: " in said and question.is_right(question.expected)


def test_answers_are_written_and_judged(planted):
    """The planted model copies codes and knows no code: its answers are wrong, and the expected ones are not likely."""
    runtime = longrun.load(planted.path, "cpu", "full", device="cpu", ctx=3000)
    documents = list(CodeDocuments(runtime.tokenizer, library()).code(2800, 1, seed=0))
    few = documents[0].questions[::5]
    documents, row = [replace(documents[0], questions=few)], Row("full")
    opened, seen = Opened.of(runtime, row, 2800), []
    found = measure_asked(runtime, row, opened, documents, seen.append, alone=True)
    assert seen == ["code/0"] and len(found["items"]) == len(few) > 2
    assert all(not item["exact"] and item["known"] is False and item["answer_nll"] > 0 for item in found["items"])
    again = measure_asked(runtime, row, opened, documents, seen.append)
    for one, other in zip(found["items"], again["items"], strict=True):
        assert {**one, "known": 0} == {**other, "known": 0}  # a session that was used before answers as a new one
