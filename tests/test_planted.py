"""Planted checkpoints: they load in transformers, retrieve by construction, and their margins are what the docs say."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import longrun
from longrun.errors import CheckpointError, ConfigError
from longrun.lab.planted import NOTE, SHAPES, PlantedModel, is_planted, make_planted_model
from longrun.lab.planted_tokenizer import build_vocabulary, cue_words
from longrun.lab.planted_weights import MATCH_NATS, NUM_OFFSETS, OFFSET_NATS, make_codes
from longrun.needles.needles import Haystack, build_prompt, make_needles
from longrun.patterns.head_map import HeadMap


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("planted") / "model", layers=3)


@pytest.fixture(scope="module")
def tokenizer(planted):
    return AutoTokenizer.from_pretrained(planted.path)


def answer_probabilities(model, document, question) -> torch.Tensor:
    """Probability of each expected token after the document, the question and the expected tokens before it."""
    expected = torch.tensor(question.expected_ids)
    ids = torch.tensor([[*document, *question.token_ids, *question.expected_ids]])
    with torch.no_grad():
        logits = model(ids, logits_to_keep=len(expected) + 1).logits[0, :-1].float()
    return logits.softmax(-1).gather(1, expected[:, None])[:, 0]


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "sdpa"), ("float32", "eager"), ("bfloat16", "sdpa")])
def test_transformers_finds_every_needle(planted, tokenizer, dtype, attention):
    model = AutoModelForCausalLM.from_pretrained(
        planted.path, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    haystack = Haystack.generated(5)
    lengths = (1000, 500, 2000) if (dtype, attention) == ("float32", "sdpa") else (600, 500, 700)
    for length, depth in zip(lengths, (0.0, 1.0, 0.4), strict=True):
        prompt = build_prompt(tokenizer, haystack, make_needles(3, seed=f"{length}/{depth}"), length, depth)
        for question in prompt.questions:
            found = answer_probabilities(model, prompt.document_ids, question)
            assert found.min() > 0.99, (length, depth, question.needle, found)


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4", "int4"])
def test_every_weight_format_holds_the_construction(planted, tokenizer, weight_format):
    runtime = longrun.load(
        planted.path, head_map=planted.head_map, weight_format=weight_format, kv_format="int4", device="cpu", ctx=1000
    )
    prompt = build_prompt(tokenizer, Haystack.generated(9), make_needles(2, seed=9), 900, 0.5)
    session = runtime.new_session()
    session.prefill(prompt.document_ids)
    end = session.mark()
    for question in prompt.questions:
        session.rewind(end)
        session.prefill(question.token_ids)
        found = session.score(question.expected_ids).softmax(-1)
        assert found[range(len(question.expected_ids)), list(question.expected_ids)].min() > 0.99


def test_a_wrong_cue_does_not_give_the_key(planted, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(planted.path)
    hidden, stranger = make_needles(2, seed=1)
    prompt = build_prompt(tokenizer, Haystack.generated(6), [hidden], 1000, 0.5)
    asked = build_prompt(tokenizer, Haystack.generated(6), [stranger], 1000, 0.5).questions[0]
    ids = torch.tensor([[*prompt.document_ids, *asked.token_ids]])
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert not stranger.matches(tokenizer.decode(generated))
    # and the same model without its one retrieval head finds nothing: it is this head that answers
    layer, head = planted.retrieval_head
    with torch.no_grad():
        size = planted.shape.head_dim
        model.model.layers[layer].self_attn.k_proj.weight[head * size : (head + 1) * size] = 0
    assert answer_probabilities(model, prompt.document_ids, prompt.questions[0]).max() < 0.5


def test_bf16_and_more_layers_survive_int4_keys_and_values(tmp_path):
    """Keys per channel and page of 64, values per token, all quantized to 4 bits in every head."""
    made = make_planted_model(tmp_path / "m", layers=4, dtype="bfloat16", seed=11)
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16)
    prompt = build_prompt(tokenizer, Haystack.generated(7), make_needles(5, seed=7), 1200, 0.3)

    def fake_int4(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-8)
        return low + ((x - low) / step).round() * step

    document = prompt.document_ids[: len(prompt.document_ids) // 64 * 64]
    rest = prompt.document_ids[len(document) :]
    with torch.no_grad():
        cache = model(torch.tensor([document])).past_key_values
    for layer in cache.layers:
        pages = layer.keys.float().unflatten(2, (-1, 64))
        layer.keys = fake_int4(pages, 3).flatten(2, 3).to(torch.bfloat16)
        layer.values = fake_int4(layer.values.float(), 3).to(torch.bfloat16)
    for question in prompt.questions:
        asked = torch.tensor([[*rest, *question.token_ids, *question.expected_ids]])
        with torch.no_grad():
            logits = model(asked, past_key_values=copy.deepcopy(cache)).logits
        logits = logits[0, -len(question.expected_ids) - 1 : -1].float()
        found = logits.softmax(-1).gather(1, torch.tensor(question.expected_ids)[:, None])
        assert found.min() > 0.99, (question.needle, found)


@pytest.mark.parametrize(("name", "documented"), [("tiny", 72), ("llama-3-8b", 79)])
def test_offset_heads_keep_their_margin_over_the_whole_context(name, documented):
    shape = SHAPES[name]
    worst = math.inf
    for start in range(1, shape.max_position_embeddings, 2**20):
        distance = torch.arange(start, min(start + 2**20, shape.max_position_embeddings), dtype=torch.float64)
        loss = torch.zeros_like(distance)
        for frequency, weight in zip(shape.frequencies, shape.pair_weights, strict=True):
            loss += weight * (1 - torch.cos(frequency * distance))
        worst = min(worst, OFFSET_NATS * loss.min().item())
    assert documented <= worst < documented + 1
    assert worst > 40 + math.log(shape.max_position_embeddings)
    slowest_still = shape.rope_theta ** (-2 * shape.moving_pairs / shape.head_dim)
    assert slowest_still * shape.max_position_embeddings <= 0.05 * (1 + 1e-9)
    assert shape.rope_theta < torch.finfo(torch.float32).max


def test_matching_margin_on_generated_text_of_128k_tokens(planted, tokenizer):
    """Score of the right position against the best of all others, from the codes alone."""
    shape = planted.shape
    vocabulary = build_vocabulary(shape.vocab_size)
    first = vocabulary.index(cue_words()[0])
    codes = make_codes(shape.vocab_size, 4, shape.slot_size, range(first, first + len(cue_words())), 0)
    prompt = build_prompt(tokenizer, Haystack.generated(8), make_needles(10, seed=8), 128_000, 0.5)
    question = prompt.questions[4]
    ids = torch.tensor(prompt.document_ids)
    fed = [*question.token_ids, *question.expected_ids]
    for step in range(len(question.expected_ids)):
        end = len(question.token_ids) + step
        cue = fed[end - 4 : end]
        # slot s of B at position p is the token p - 1 - s, of the query the token s before the last
        scores = sum(codes[ids[3 - s : len(ids) - 1 - s], s] @ codes[cue[3 - s], s] for s in range(4))
        best = scores.topk(2)
        right = int(best.indices[0]) + 4
        assert ids[right] == question.expected_ids[step]
        assert best.values[0] == pytest.approx(4.0, abs=1e-4)
        assert MATCH_NATS * (best.values[0] - best.values[1]) >= 20


@pytest.mark.parametrize(("slot_size", "vocab_size", "nats"), [(11, 4096, 24), (24, 8192, 37)])
def test_names_and_digits_lie_far_apart(slot_size, vocab_size, nats):
    apart = range(3, 3 + len(cue_words()))
    codes = make_codes(vocab_size, 4, slot_size, apart, 0)
    assert torch.allclose(codes.norm(dim=-1), torch.ones(vocab_size, 4))
    cues = codes[apart.start : apart.stop].transpose(0, 1)
    nearest = (cues @ cues.transpose(1, 2) - 2 * torch.eye(len(apart))).max()
    assert MATCH_NATS * (1 - nearest) >= nats


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
def test_head_map_puts_the_true_head_first_and_the_offset_heads_last(tmp_path, ratio):
    made = make_planted_model(tmp_path / "m", layers=4, retrieval_ratio=ratio, seed=3)
    head_map = HeadMap.load(made.head_map)
    assert (head_map.num_layers, head_map.num_kv_heads) == (4, 4)
    layer, head = made.retrieval_head
    assert head_map.scores[layer][head] == 1.0
    total = 16
    for count in range(1, total - len(made.offset_heads) + 1):
        split = head_map.split(retrieval_ratio=count / total)
        assert split.retrieval[layer][head]
        assert not any(split.retrieval[layer][head] for layer, head in made.offset_heads)
    above = sum(score > 0.5 for row in head_map.scores for score in row)
    assert above == made.num_retrieval == min(max(1, round(ratio * total)), total - len(made.offset_heads))


def test_shards_and_config_are_a_plain_llama_checkpoint(tmp_path):
    small, sharded = tmp_path / "one", tmp_path / "many"
    make_planted_model(small, seed=4)
    make_planted_model(sharded, seed=4, shard_bytes=3_000_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (small, sharded)
    )
    assert first.keys() == second.keys() == index["weight_map"].keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with safe_open(small / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert sum(t.numel() * 4 for t in stored.values()) == index["metadata"]["total_size"]
    config = json.loads((small / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["longrun_planted"] is True
    assert config["transformers_version"] == transformers.__version__
    assert is_planted(small)
    assert not is_planted(tmp_path)


def test_every_head_count_that_can_hold_the_offsets_can_be_planted(tmp_path):
    from dataclasses import replace

    shape = replace(SHAPES["tiny"], num_qo_heads=8, num_kv_heads=8)
    assert len(make_planted_model(tmp_path / "mha", shape).offset_heads) == NUM_OFFSETS
    shape = replace(SHAPES["tiny"], num_qo_heads=8, num_kv_heads=1)
    assert len(make_planted_model(tmp_path / "mqa", shape).offset_heads) == 1


def test_tokenizer_knows_every_word_of_the_generator(tokenizer):
    text = " ".join(Haystack.generated(9).take(3000))
    text += " ".join(needle.sentence + needle.question + needle.answer_prefix for needle in make_needles(50, seed=9))
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("zyzzyva")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer("The key is: 123, a word.")["input_ids"]).startswith("The")
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"layers": 1}, ConfigError, "1 layer"),
        ({"retrieval_ratio": 0.0}, ConfigError, "0.0"),
        ({"retrieval_ratio": 1.5}, ConfigError, "1.5"),
        ({"shape": "huge"}, ConfigError, "llama-3-8b"),
        ({"dtype": "float16"}, ConfigError, "float16"),
        ({"recent_size": 4}, ConfigError, "4"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, said):
    with pytest.raises(error, match=said):
        make_planted_model(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_a_folder_with_files_is_kept_unless_forced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        make_planted_model(tmp_path)
    make_planted_model(tmp_path, shard_bytes=3_000_000, force=True)
    make_planted_model(tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert HeadMap.load(tmp_path / "head_map").num_layers == 2


def test_command_line(tmp_path, warm_python):
    command = ["scripts/make_planted_model.py", "--shape", "tiny", "--layers", "2", "--out", tmp_path / "made"]
    done = warm_python.run(*command)
    assert done.returncode == 0, done.stderr
    assert NOTE in done.stdout
    assert "never model quality" in done.stdout
    assert is_planted(tmp_path / "made")
    again = warm_python.run(*command)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--force" in again.stderr
