"""What training keeps of the original model: chats count where the model answers, most at the answer's beginning."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from long_text import save_corpus, save_model

from longrun.lab.long_tasks import Corpus
from scripts.training import long_ability
from scripts.training.long_chat import TEST_PROMPTS, chat_prompts
from scripts.training.long_keep import Keeper
from scripts.training.long_lora import LoraModel

NUMBERS = {"seed": 3, "keep_tokens": 64, "keep_positions": 1000, "keep_batch": 2}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> LoraModel:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    settings = {"r": 2, "lora_alpha": 2, "rope_theta": 500.0, "max_position_embeddings": 128, "seed": 1}
    return LoraModel(folder, {**settings, "base_weights": ""}, torch.float32, torch.device("cpu"))


def hidden_of(lora: LoraModel):
    return lambda ids: lora.model.model(input_ids=ids, use_cache=False).last_hidden_state


def test_prompts_are_many_and_none_is_a_test():
    prompts = chat_prompts(10_000)
    assert len(prompts) == len(set(prompts)) > 600
    assert not set(prompts) & set(TEST_PROMPTS)
    assert chat_prompts(50) == prompts[:50]


def test_chats_are_compared_where_they_are_answers(lora, tmp_path):
    save_corpus(tmp_path / "data")
    chats = [(5, list(range(3, 15)))]
    keeper = Keeper(lora, Corpus.read(tmp_path / "data", "train"), chats, NUMBERS, 0, hidden_of(lora))
    rows, places = keeper._some_chats(random.Random(0))
    assert rows == [chats[0][1]] and [place for _, place, _ in places] == [4, 5, 6, 7, 8, 9, 10]
    weights = [weight for _, _, weight in places]
    assert weights[0] == weights[1] == weights[2] > weights[3] == weights[-1] == 1.0


def test_a_chat_cut_within_its_question_still_counts(lora, tmp_path):
    save_corpus(tmp_path / "data")
    keeper = Keeper(lora, Corpus.read(tmp_path / "data", "train"), [(90, [4] * 99)], NUMBERS, 0, hidden_of(lora))
    _, places = keeper._some_chats(random.Random(0))
    assert [place for _, place, _ in places] == [62]


def test_divergence_is_none_before_training_and_some_after(lora, tmp_path):
    save_corpus(tmp_path / "data")
    chats = [(4, list(range(3, 20))), (6, list(range(9, 30)))]
    keeper = Keeper(lora, Corpus.read(tmp_path / "data", "train"), chats, NUMBERS, 0, hidden_of(lora))
    losses = list(keeper.losses(0, range(2)))
    assert len(losses) == 2 and all(abs(loss.item()) < 1e-5 for loss in losses)
    state = {name: tensor.clone() for name, tensor in lora.state().items()}
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert all(loss.item() > 1e-3 for loss in keeper.losses(0, range(2)))
    lora.load_state(state, "test")


def test_an_untrained_adapter_answers_as_the_original(lora):
    class Template:
        pad_token_id = 0

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=torch.tensor([[3 + ord(letter) % 20 for letter in text[:8]]]))

        def decode(self, ids, **_):
            return " ".join(map(str, ids.tolist()))

    found = long_ability.chat_answers(lora, Template(), 4)
    assert all(one["original"] == one["adapted"] for one in found["chat"])
    same, tokens = found["chat_agreement"]
    assert same == tokens >= len(TEST_PROMPTS) and found["chat_begins_alike"] == [len(TEST_PROMPTS)] * 2
