"""Sampling against transformers' own logits processors: the exact distribution, and the draw."""

import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longrun.engine.sampling import SamplingParams, probabilities, sample, seen_tokens
from longrun.errors import InputError

VOCAB = 500


def reference(logits: torch.Tensor, params: SamplingParams, previous: list[int]) -> torch.Tensor:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([previous]), logits[None].clone())[0].softmax(0)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 40, VOCAB, 10 * VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
def test_distribution_equals_transformers(temperature, top_k, top_p, repetition_penalty, min_p):
    params = SamplingParams(temperature, top_k, top_p, repetition_penalty, min_p)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = 4 * torch.randn(VOCAB, generator=generator)
        previous = torch.randint(VOCAB, (300,), generator=generator).tolist()
        expected = reference(logits, params, previous)
        actual = probabilities(logits, params, previous)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_greedy_takes_the_penalised_maximum_and_draws_nothing():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits, SamplingParams(), generator) == 1
    assert sample(logits, SamplingParams(top_k=3, top_p=0.1), generator) == 1
    assert sample(logits, SamplingParams(repetition_penalty=1.2), generator, [1, 3]) == 2
    assert torch.equal(generator.get_state(), before)
    assert logits.tolist() == torch.tensor([1.0, 3.0, 2.9, -1.0]).tolist(), "the caller's logits were changed"


def test_penalty_pushes_negative_logits_down_too():
    logits = torch.tensor([-1.0, -1.1, -5.0])
    params = SamplingParams(repetition_penalty=1.5)
    assert sample(logits, params, torch.Generator(), []) == 0
    assert sample(logits, params, torch.Generator(), [0]) == 1


def test_previous_tokens_as_list_tensor_or_mask_are_the_same():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7))
    previous = [3, 3, 400, 12]
    params = SamplingParams(temperature=0.7, repetition_penalty=1.4)
    expected = probabilities(logits, params, previous)
    assert torch.equal(probabilities(logits, params, torch.tensor(previous)), expected)
    assert torch.equal(probabilities(logits, params, seen_tokens(previous, VOCAB)), expected)
    assert not torch.equal(probabilities(logits, params, []), expected)


def test_same_seed_same_tokens_and_another_seed_differs():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.0, top_k=100, top_p=0.95)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(logits, params, generator) for _ in range(20)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    params = SamplingParams(temperature=1.0)
    generator = torch.Generator().manual_seed(5)
    draws = 4000
    counts = torch.bincount(torch.tensor([sample(logits, params, generator) for _ in range(draws)]), minlength=4)
    expected = logits.softmax(0) * draws
    deviation = (counts - expected).abs()
    assert (deviation <= 4 * (expected * (1 - expected / draws)).sqrt() + 1e-3).all(), counts


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_not_nan(temperature):
    logits = 50 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    probs = probabilities(logits, SamplingParams(temperature=temperature))
    assert probs.argmax() == logits.argmax() and math.isclose(float(probs.sum()), 1.0, rel_tol=1e-6)


def test_minus_infinite_logits_are_never_drawn():
    logits = torch.full((VOCAB,), -torch.inf)
    logits[42] = 1.0
    for params in (SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=7, top_p=0.5)):
        assert sample(logits, params, torch.Generator().manual_seed(0), []) == 42


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is outside the range: give a number at least 0"),
        ({"temperature": math.nan}, "temperature nan is not a finite number"),
        ({"temperature": math.inf}, "temperature inf is not a finite number"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 1.5}, "top_k 1.5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": 1.1}, "min_p 1.1 is outside the range: give a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0"),
    ],
)
def test_impossible_settings_say_which(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**settings)
