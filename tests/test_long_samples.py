"""Training samples: what they hold, that facts compete and none is ambiguous, that tests share nothing with them."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest
from long_text import texts, tokenizer

from longrun.errors import InputError
from longrun.lab import long_words as words
from longrun.lab.long_tasks import Corpus
from longrun.needles import words as needle_words
from scripts.training import long_facts, long_forms
from scripts.training.long_facts import TrainDraw
from scripts.training.long_positions import stretched
from scripts.training.long_samples import AnswerWeights, Sample, SampleWriter


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.of_texts(tokenizer(), texts())


@pytest.fixture(scope="module")
def writer() -> SampleWriter:
    return SampleWriter(tokenizer())


def turns_of(sample: Sample) -> list[tuple[str, str]]:
    """(question, answer) of each turn, decoded."""
    asked = tokenizer().decode(sample.token_ids[sample.joints[-1] :])
    found = re.findall(r"(?:^|<s>user\n)(.*?)</s>\n<s>assistant\n(.*?)</s>", asked, flags=re.S)
    return [(question.strip(), answer) for question, answer in found]


def document_of(sample: Sample) -> str:
    return tokenizer().decode(sample.token_ids[: sample.joints[-1]])


def test_samples_depend_on_seed_and_index_alone(corpus, writer):
    first = writer.training_sample(corpus, 1, 5, 1500)
    again = SampleWriter(tokenizer()).training_sample(corpus, 1, 5, 1500)
    assert first == again
    assert first.token_ids != writer.training_sample(corpus, 1, 6, 1500).token_ids
    assert first.token_ids != writer.training_sample(corpus, 2, 5, 1500).token_ids


@pytest.mark.parametrize("length", [400, 1500, 6000])
def test_a_sample_fills_its_length_and_asks_what_it_tells(corpus, writer, length):
    forms = Counter()
    for index in range(30):
        sample = writer.training_sample(corpus, 0, index, length)
        assert 0.75 * length < len(sample.token_ids) <= length
        assert len(sample.weights) == len(sample.token_ids)
        forms.update(sample.forms)
        turns, document = turns_of(sample), document_of(sample)
        assert len(turns) == len(sample.forms) >= 1
        asked = [form for form in sample.forms if form != "quote"]
        assert len(sample.values) == len(asked)
        for form, (_, answer) in zip(sample.forms, turns, strict=True):
            assert all(run in document for run in re.findall(r"\d{4,}", answer)), (form, answer)
            if form == "quote":
                assert answer in document
    assert len(forms) >= 8
    assert ("quote" in forms) == ("row" in forms) == (length > 1000)


def test_the_tokens_of_an_answer_weigh_what_the_recipe_says(corpus):
    writer = SampleWriter(tokenizer(), AnswerWeights(first=5.0, rest=2.0, around=0.5, first_turn=10.0))
    with_space = 0
    for index in range(30):
        sample = writer.training_sample(corpus, 4, index, 1500)
        end = tokenizer().eos_token_id
        for number, (start, first, stop) in enumerate(sample.values):
            factor = 10.0 if sample.weights[start] > 5.0 else 1.0
            assert factor == 1.0 or number == 0
            assert sample.weights[start:stop] == [5.0 * factor] * (first + 1 - start) + [2.0 * factor] * (
                stop - first - 1
            )
            assert sample.weights[stop] == 0.5 * factor
            value = tokenizer().decode(sample.token_ids[start:stop])
            assert value.strip() and tokenizer().decode([sample.token_ids[first]]).strip()
            assert all(not tokenizer().decode([token]).strip() for token in sample.token_ids[start:first])
            with_space += first > start
        ends = [place for place, weight in enumerate(sample.weights[:-1]) if weight and not sample.weights[place + 1]]
        assert {sample.token_ids[place] for place in ends} <= {end}
        first_answer = next(place for place, weight in enumerate(sample.weights) if weight)
        assert sample.weights[first_answer] in (50.0, 5.0) and sample.weights[first_answer + 1] in (50.0, 20.0, 5.0)
    assert with_space > 20


def test_the_values_asked_are_the_answers_values(corpus, writer):
    for index in range(20):
        sample = writer.training_sample(corpus, 5, index, 1500)
        answers = [answer for form, (_, answer) in zip(sample.forms, turns_of(sample), strict=True) if form != "quote"]
        for answer, (start, _, stop) in zip(answers, sample.values, strict=True):
            assert tokenizer().decode(sample.token_ids[start:stop]).strip() in answer
            rest = answer.replace(tokenizer().decode(sample.token_ids[start:stop]).strip(), "", 1)
            assert not re.search(r"\d{4,}", re.sub(r"[\w-]*[a-zA-Z][\w-]*", "", rest)) or "number" in rest


def test_many_facts_of_few_forms_compete(corpus, writer):
    most, asked = [], []
    for index in range(40):
        sample = writer.training_sample(corpus, 6, index, 6000)
        counts = Counter(form for form in sample.forms if form != "quote")
        most.append(max(counts.values()))
        asked.append(sum(counts.values()))
        assert len(counts) <= 8
    assert np.quantile(most, 0.6) >= 10 and max(asked) >= 30
    assert min(asked) <= 4  # and some samples ask little


def test_no_question_has_two_answers():
    for seed in range(60):
        count = random.Random(seed).choice((8, 40, 320))
        drawn = TrainDraw(random.Random(f"draw/{seed}"), count)
        facts = [drawn.fact() for _ in range(count)]
        subjects = Counter((fact.form, fact.subject) for fact in facts if fact.subject)
        assert max(subjects.values(), default=1) == 1
        texts_ = Counter(text for fact in facts if fact.form != "list" for text in fact.statements)
        assert max(texts_.values(), default=1) == 1
        assert len({fact.form for fact in facts}) <= 6


def test_no_two_lists_tell_the_same_of_one_subject():
    shared = 0
    for seed in range(20):
        drawn = TrainDraw(random.Random(seed), 60)
        facts = [fact for _ in range(3) for fact in drawn.rows(10**9, 40, list).facts]
        told = {(fact.subject, *(name for name, _ in long_forms.ATTRIBUTES if name in fact.question)) for fact in facts}
        assert len(told) == len(facts) == 120
        shared += len({fact.subject for fact in facts}) < 120
    assert shared  # people do occur in two lists


def test_people_of_one_first_name_compete():
    shared = 0
    for seed in range(20):
        drawn = TrainDraw(random.Random(seed), 200)
        people = [drawn._person() for _ in range(200)]
        assert len(set(people)) == 200
        shared += max(Counter(name.split()[0] for name in people).values()) >= 6
    assert shared >= 5


def test_the_kind_of_a_value_is_not_its_forms_alone():
    """A form of numbers has codes as well, and the other way round; every kind of value stays what it is otherwise."""
    found = {name: Counter() for name in (*long_forms.NUMBER_FORMS, *long_forms.CODE_FORMS)}
    for seed in range(300):
        drawn = TrainDraw(random.Random(seed), 20)
        for _ in range(20):
            fact = drawn.fact()
            if fact.form in found:
                found[fact.form][fact.value.isdigit()] += 1
    for name, counts in found.items():
        numbers = counts[True] / counts.total()
        assert counts.total() > 20 and (
            0.6 < numbers < 0.95 if name in long_forms.NUMBER_FORMS else 0.02 < numbers < 0.3
        )


def test_harder_forms_have_the_answer_that_the_text_gives(corpus, writer):
    seen = Counter()
    for index in range(250):
        sample = writer.training_sample(corpus, 3, index, 900)
        document = document_of(sample)
        for form, (question, answer) in zip(sample.forms, turns_of(sample), strict=True):
            if form == "which first":
                a, b = re.search(r"(?:text,|text:) (?!who |which )(.*?) or (.*?)\?", question, flags=re.I).groups()
                assert answer == min((a, b), key=lambda name: re.search(rf"{name} sent", document).start())
            elif form == "last value":
                name = max(re.findall(r"\w+", question), key=lambda word: document.count(word) if "_" in word else 0)
                values = re.findall(rf"\b{name} :?= (\d+)", document)
                assert answer.endswith(values[-1]) and len(values) >= 2
            elif form == "list":
                things = re.split(r", | and ", answer.rstrip("."))
                person = re.search(r"(?:that|did) ([A-Z].*?) (?:bought|buy)", question).group(1)
                lines = [
                    line for line in re.split(r"(?<=\.)\s", document) if re.search(rf"\b{person} (bought|came)", line)
                ]
                assert [next(thing for thing in things if thing in line) for line in lines] == things
            seen[form] += 1
    assert min(seen[form] for form in ("which first", "last value", "list")) >= 5


@pytest.mark.parametrize("style", long_forms.LIST_FORMATS, ids=lambda style: style.name)
def test_every_list_tells_its_values_beside_their_subjects(style, monkeypatch):
    monkeypatch.setattr(long_forms, "LIST_FORMATS", (style,))
    for seed in range(5):
        made = TrainDraw(random.Random(seed), 500).rows(10**9, 60, lambda text: text.split())
        assert made.name == style.name and len(made.facts) == 60
        rows = re.split(r"\n(?=\[)", made.text) if style.name == "records" else made.text.split("\n- ")
        rows = made.text.splitlines() if made.whole_lines else rows
        for fact in made.facts:
            own = [row for row in rows if re.search(rf"(?<![\w-]){re.escape(fact.subject)}(?![\w-])", row)]
            assert len(own) == 1 and fact.value in own[0], (fact, own)
            assert fact.subject in fact.question


def test_lists_are_as_long_as_asked_and_no_longer():
    for kind in set(long_forms.LIST_SUBJECTS):
        drawn = TrainDraw(random.Random(kind), 1500)
        assert len({drawn._one(kind) for _ in range(1500)}) == 1500
    made = TrainDraw(random.Random(1), 500).rows(1000, 900, list)
    assert 500 < len(made.text) < 1600 and len(made.facts) >= 4
    drawn = TrainDraw(random.Random(2), 10)
    drawn._first, drawn._last = ["Ann"], ["Lee"]
    with pytest.raises(InputError, match="no subject is left"):
        [drawn._person() for _ in range(3)]


def test_training_and_tests_share_no_name_form_or_phrasing():
    train, test = set(long_forms.FIRST_NAMES), set(words.TEST_NAMES)
    assert not train & test and not (train | test | set(long_forms.SURNAMES)) & set(needle_words.NAMES)
    assert len(train) == len(long_forms.FIRST_NAMES) and len(test) == len(words.TEST_NAMES)
    assert len(set(long_forms.SURNAMES)) == len(long_forms.SURNAMES)
    names = [form.name for form in long_forms.TRAIN_FORMS]
    assert len(set(names)) == len(names) and not set(names) & {form.name for form in words.TEST_FORMS}
    assert set(long_forms.NUMBER_FORMS) <= set(names)

    def phrases(forms) -> set[str]:
        return {text for form in forms for text in (*form.statements, *form.questions, *form.answers)} - {"{value}"}

    own = phrases(long_forms.TRAIN_FORMS)
    assert not own & phrases(words.TEST_FORMS)
    everything = " ".join([*own, *long_forms.LIST_QUESTIONS, *long_forms.LIST_ANSWERS]).lower()
    assert not any(text in everything for text in ("magic", "the code of", "locker", "harbour", "export ", "born"))
    assert "code" not in {name for name, _ in long_forms.ATTRIBUTES}
    assert words.TEST_INTRODUCTION not in words.INTRODUCTIONS
    table = next(style for style in long_forms.LIST_FORMATS if style.name == "table")
    assert "in stock" not in table.row(("a", [("badge", "1")]), 0)


def test_every_form_can_be_drawn():
    drawn = TrainDraw(random.Random(0), 50)
    for form in long_forms.TRAIN_FORMS:
        fact = drawn._of(form)
        assert fact.value in fact.statements[0] and fact.value not in fact.question
        assert not re.search(r"[{}]", fact.question + fact.before + fact.after)


def test_a_sample_may_be_cut_before_facts_and_questions(corpus, writer):
    lines = 0
    for index in range(20):
        sample = writer.training_sample(corpus, 7, index, 1500)
        assert list(sample.joints) == sorted(set(sample.joints)) and sample.joints[0] > 0
        assert not any(sample.weights[: sample.joints[-1]]) and any(sample.weights[sample.joints[-1] :])
        for joint in sample.joints[:-1]:
            before = tokenizer().decode(sample.token_ids[max(0, joint - 8) : joint])
            lines += bool(re.search(r"[.!?\n]$", before))
    assert lines > 100


def test_positions_jump_at_joints_alone_and_reach_the_window():
    joints, longest, moved, at_questions = [5, 20, 33, 60], [], 0, 0
    for seed in range(300):
        positions = stretched(random.Random(seed), 80, joints, 10_000)
        steps = np.diff(positions)
        jumps = [int(place) + 1 for place in (steps != 1).nonzero()[0]]
        assert set(jumps) <= set(joints) and (steps >= 1).all()
        assert positions[0] >= 0 and positions[-1] < 10_000
        longest.append(int(positions[-1] - positions[0]))
        moved += positions[0] > 0
        at_questions += 60 in jumps
    assert max(longest) > 9_000 and np.median(longest) > 1000 and sum(length < 1000 for length in longest) > 30
    assert 100 < moved < 200 and at_questions > 120
    assert stretched(random.Random(0), 80, joints, 80).tolist() == list(range(80))


def test_too_short(corpus, writer):
    with pytest.raises(InputError, match="too short"):
        writer.training_sample(corpus, 0, 0, 60)
    assert long_facts.TrainDraw(random.Random(0), 4).fact().value
