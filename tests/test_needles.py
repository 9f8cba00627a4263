"""Needle prompts: text without repetition, exact lengths, needles where they should be, parts that concatenate."""

from __future__ import annotations

import itertools
import re

import pytest
from transformers import AutoTokenizer

from longrun.errors import InputError
from longrun.lab.planted_tokenizer import build_vocabulary, write_tokenizer
from longrun.needles.needles import (
    HEAD,
    Haystack,
    Needle,
    build_prompt,
    generate_sentences,
    make_needles,
    sentences_from_text,
)
from longrun.needles.words import NAMES, PATTERNS, SLOTS
from longrun.text.encoder import TextEncoder

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Word-level tokenizer of the planted model."""
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder, build_vocabulary(4096), 2**20)
    return AutoTokenizer.from_pretrained(folder)


def train_bpe(folder, style: str):
    """A small BPE tokenizer in the manner of Llama 3 (byte level) or Llama 2 (words begin with a marked space)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if style == "bytes":
        tokenizer = Tokenizer(models.BPE())
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [*map(chr, range(33, 127)), "\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, max_token_length=12
    )
    text = Haystack.generated("train").take(300) + [needle.sentence for needle in make_needles(10, "train")]
    tokenizer.train_from_iterator(text, trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=["words", "bytes", "marked", "chat"])
def tokenizer(request, words, tmp_path_factory):
    if request.param == "words":
        return words
    made = train_bpe(tmp_path_factory.mktemp(request.param), "bytes" if request.param == "chat" else request.param)
    if request.param == "chat":
        made.chat_template = CHAT_TEMPLATE
    return made


def test_generated_text_never_repeats_and_is_the_same_for_a_seed():
    first = list(itertools.islice(generate_sentences(3), 50_000))
    assert len(set(first)) == len(first)
    assert first == list(itertools.islice(generate_sentences(3), 50_000))
    assert len(set(first) & set(itertools.islice(generate_sentences(4), 50_000))) == 0
    assert not re.search(r"[\d:]", " ".join(first))
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in first)
    assert not re.search(r"\b[Aa] [aeiou]", " ".join(first[:2000]))


def test_a_collision_is_drawn_again(monkeypatch):
    monkeypatch.setattr("longrun.needles.needles.PATTERNS", ("The {act}.",))
    all_of_them = list(itertools.islice(generate_sentences(0), len(SLOTS["act"])))
    assert len(set(all_of_them)) == len(SLOTS["act"])


def test_there_are_enough_sentences_for_ten_million_tokens():
    """Expected repeats among a million draws stay below one even within the smallest pattern."""
    import math

    for pattern in PATTERNS:
        choices = math.prod(len(SLOTS[slot]) for slot in re.findall(r"\{(\w+)\}", pattern))
        assert (10**6) ** 2 / 2 / choices < 1


def test_names_occur_in_needles_only():
    haystack_words = {word.lower() for word in itertools.chain.from_iterable(SLOTS.values())}
    assert not haystack_words & {name.lower() for name in NAMES}
    assert len(set(NAMES)) == len(NAMES)


def test_keys_share_no_beginning_and_no_run_of_four():
    for seed in range(20):
        keys = [needle.key for needle in make_needles(40, seed)]
        assert len({key[:2] for key in keys}) == len(keys)
        runs = [key[i : i + 4] for key in keys for i in range(4)]
        assert len(set(runs)) == len(runs)
        assert len({needle.name for needle in make_needles(40, seed)}) == 40
    with pytest.raises(InputError, match="51"):
        make_needles(51, 0)


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        (" 1234567.", True),
        ("1 2 3 4 5 6 7. The", True),
        ("1234567", True),
        ("12345678", False),
        ("123456", False),
        ("The number is 1234567", False),
        ("1234568.", False),
        ("", False),
    ],
)
def test_exact_match(generated, right):
    assert Needle("Amelia", "1234567").matches(generated) is right


@pytest.mark.parametrize("length", [500, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompt_has_the_length_asked_for_and_the_needles_at_the_depth(tokenizer, length, depth):
    needles = make_needles(3, seed=depth)
    prompt = build_prompt(tokenizer, Haystack.generated(1), needles, length, depth)
    longest_sentence = max(
        len(tokenizer(sentence)["input_ids"]) for sentence in Haystack.generated(1).take(length // 10)
    )
    assert length - max(2 * longest_sentence, 0.01 * length) <= prompt.num_tokens <= length
    text = tokenizer.decode(prompt.document_ids, skip_special_tokens=True)
    squeezed = re.sub(r"\s+", "", text)
    places = [re.sub(r"\s+", "", needle.sentence) for needle in needles]
    where = [squeezed.find(sentence) / len(squeezed) for sentence in places]
    assert min(where) >= 0, text[-200:]
    assert all(squeezed.count(sentence) == 1 for sentence in places)
    slack = 0.5 if length == 500 else 0.1  # three needles and the words around them are a good part of a short text
    assert all(abs(at - depth) < slack for at in where)
    for question, at in zip(prompt.questions, where, strict=True):
        assert abs(question.at - at) < slack
    # every needle stands between two whole sentences
    sentences = set(Haystack.generated(1).take(length // 5))
    gaps = {re.sub(r"\s+", "", s) for s in sentences} | set(places) | {re.sub(r"\s+", "", s + ".") for s in [HEAD[:-1]]}
    rest = squeezed
    for piece in sorted(gaps, key=len, reverse=True):
        rest = rest.replace(piece, "|")
    assert len(re.sub(r"[|]", "", rest)) < 120, rest  # the head's sentences and the template's markers


def test_parts_concatenate_to_the_tokenization_of_the_whole(tokenizer):
    needles = make_needles(2, seed=5)
    prompt = build_prompt(tokenizer, Haystack.generated(2), needles, 800, 0.5)
    for question in prompt.questions:
        fed = [*prompt.document_ids, *question.token_ids]
        whole = tokenizer.decode([*fed, *question.expected_ids], skip_special_tokens=False)
        assert whole.replace(" ", "").endswith(f"{question.needle.answer_prefix}{question.needle.key}".replace(" ", ""))
        assert question.needle.question.replace(" ", "") in whole.replace(" ", "")
        if tokenizer.chat_template is not None:
            assert whole.startswith("<s><|user|>\n")
            assert f"{question.needle.question}</s>\n<|assistant|>\n{question.needle.answer_prefix}" in whole
        adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        assert fed.count(tokenizer.bos_token_id) == int(adds_bos)
        if adds_bos:  # these tokenizers keep white space, so the text can be had back and tokenized in one piece
            text = fed if tokenizer.chat_template is not None else fed[1:]
            assert tokenizer(tokenizer.decode(text), add_special_tokens=False)["input_ids"] == text


def test_word_level_cue_holds_the_name_and_matches_the_needle(words):
    """The planted model looks at four tokens: they must be the same before the key and at the end of the question."""
    prompt = build_prompt(words, Haystack.generated(2), make_needles(3, seed=6), 700, 0.5)
    for question in prompt.questions:
        cue = list(question.token_ids[-4:])
        assert words.convert_ids_to_tokens(cue) == ["of", question.needle.name, "is", ":"]
        starts = [i for i in range(len(prompt.document_ids)) if prompt.document_ids[i : i + 4] == cue]
        assert len(starts) == 1
        after = prompt.document_ids[starts[0] + 4 :][: len(question.expected_ids)]
        assert after == list(question.expected_ids)


def test_same_seed_same_prompt_and_longer_prompts_begin_alike(words):
    one, two = (build_prompt(words, Haystack.generated(7), make_needles(2, 7), 900, 1.0) for _ in range(2))
    assert one == two
    longer = build_prompt(words, Haystack.generated(7), make_needles(2, 7), 1800, 1.0)
    assert longer.document_ids[:500] == one.document_ids[:500]


def test_every_needle_has_a_depth_of_its_own(words):
    depths = [0.99, 0.0, 0.5, 0.5, 1.0, 0.25]
    needles = make_needles(6, 3)
    prompt = build_prompt(words, Haystack.generated(3), needles, 20_000, depths)
    assert 20_000 * 0.99 <= prompt.num_tokens <= 20_000
    text = words.decode(prompt.document_ids)
    assert [question.needle for question in prompt.questions] == list(needles)
    assert [question.depth for question in prompt.questions] == depths
    for question in prompt.questions:
        assert abs(question.at - question.depth) < 0.01
        found = text.find(f"The magic number of {question.needle.name} is")
        assert found >= 0 and abs(found / len(text) - question.depth) < 0.02
    assert len({question.at for question in prompt.questions}) == 6  # a sentence at least between any two
    alike = build_prompt(words, Haystack.generated(3), needles, 5000, [0.5] * 6)
    assert alike == build_prompt(words, Haystack.generated(3), needles, 5000, 0.5)
    crowded = build_prompt(words, Haystack.generated(3), needles, 300, [i / 5 for i in range(6)])
    assert all(f"of {needle.name} is" in words.decode(crowded.document_ids) for needle in needles)
    with pytest.raises(InputError, match="2 depths were given for 6 needle"):
        build_prompt(words, Haystack.generated(3), needles, 5000, [0.0, 1.0])
    with pytest.raises(InputError, match=r"depth -0\.1"):
        build_prompt(words, Haystack.generated(3), needles, 5000, [0.0, 1.0, 0.5, 0.5, 0.5, -0.1])


def test_a_long_text_is_tokenized_once(words, monkeypatch):
    """One pass over the whole text, and samples of bounded size: millions of tokens take no longer than they must."""
    passes = []

    encode = TextEncoder.ids

    def counting(self, text, after_control=False):
        passes.append(len(text))
        return encode(self, text, after_control)

    monkeypatch.setattr(TextEncoder, "ids", counting)
    prompt = build_prompt(words, Haystack.generated(4), make_needles(3, 4), 200_000, 0.5)
    assert 199_000 <= prompt.num_tokens <= 200_000
    assert sum(passes) < 1.4 * max(passes)


def test_too_short_a_length_says_what_is_needed(words):
    with pytest.raises(InputError, match=r"length 60 is too short for 3 needle.*at least (\d+) tokens") as caught:
        build_prompt(words, Haystack.generated(1), make_needles(3, 1), 60, 0.5)
    needed = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    assert build_prompt(words, Haystack.generated(1), make_needles(3, 1), needed, 0.5).num_tokens == needed
    with pytest.raises(InputError, match=r"depth 1\.5"):
        build_prompt(words, Haystack.generated(1), make_needles(3, 1), 600, 1.5)


def test_haystack_from_files(tmp_path, words):
    text = "One ring.  Two\nrings! One ring. Three rings?\n\nA heading\n\nFour rings."
    assert list(sentences_from_text(text)) == ["One ring.", "Two rings!", "Three rings?", "A heading", "Four rings."]
    path = tmp_path / "long.txt"
    path.write_text(" ".join(Haystack.generated("file").take(100)), encoding="utf-8")
    prompt = build_prompt(words, Haystack.from_files([path]), make_needles(2, 1), 1000, 0.5)
    assert 950 <= prompt.num_tokens <= 1000
    with pytest.raises(InputError, match=r"ends after 100 different sentences"):
        build_prompt(words, Haystack.from_files([path]), make_needles(2, 1), 5000, 0.5)


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe\x00", "not UTF-8"), (b"  \n", "no text"), (None, "cannot be")]
)
def test_bad_haystack_files(tmp_path, content, said):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        Haystack.from_files([path])
