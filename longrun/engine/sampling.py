"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, then one draw.

The order and the meaning of each step are those of transformers' generation (`RepetitionPenaltyLogitsProcessor`,
`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`), so that settings published with
a model keep their meaning here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.arguments import integer, number
from longrun.engine.best_token import BestToken
from longrun.errors import logits_not_finite


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy), whatever top_k, top_p and min_p say.
        top_k: only the `top_k` most likely tokens stay (ties with the last of them stay, too); 0 keeps all.
        top_p: nucleus sampling (Holtzman et al., 2020): the smallest set of most likely tokens whose probabilities
            add up to `top_p` stays; 1 keeps all.
        repetition_penalty: CTRL's rule (Keskar et al., 2019): for tokens seen before, positive logits are divided by
            it and negative ones multiplied; 1 changes nothing.
        min_p: (Nguyen et al., 2024) tokens less than `min_p` times as probable as the likeliest one are left out;
            0 keeps all.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (  # frozen, and of plain types from here on
            ("temperature", number(self.temperature, "temperature", 0)),
            ("top_k", integer(self.top_k, "top_k")),
            ("top_p", number(self.top_p, "top_p", 0, 1, above=True)),
            ("repetition_penalty", number(self.repetition_penalty, "repetition_penalty", 0, above=True)),
            ("min_p", number(self.min_p, "min_p", 0, 1)),
        ):
            object.__setattr__(self, name, value)


def seen_tokens(token_ids: Sequence[int] | Tensor, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool [vocab_size], true where a token occurs in `token_ids`.

    Kept up to date by the caller (`seen[token_id] = True`), it spares `sample` a pass over millions of tokens a step.
    """
    seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    seen[torch.as_tensor(token_ids, dtype=torch.int64, device=device)] = True
    return seen


def _penalise(logits: Tensor, penalty: float, previous: Sequence[int] | Tensor) -> Tensor:
    if not (isinstance(previous, Tensor) and previous.dtype == torch.bool):
        previous = seen_tokens(previous, logits.shape[0], logits.device)
    largest = torch.finfo(logits.dtype).max  # a tiny penalty must not make a logit infinite
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-largest, largest)
    return torch.where(previous, penalised, logits)


def probabilities(logits: Tensor, params: SamplingParams, previous: Sequence[int] | Tensor = ()) -> Tensor:
    """Float32 [vocab_size]: the distribution `sample` draws from; one-hot for temperature 0.

    Args:
        logits: float32 [vocab_size].
        params: the settings.
        previous: token ids seen so far (prompt and answer), or bool [vocab_size] on the logits' device as
            `seen_tokens` makes it; only read where a repetition penalty is set.

    Raises:
        CheckpointError: the largest logit is NaN or infinite.
    """
    assert logits.dim() == 1 and logits.dtype == torch.float32, (logits.shape, logits.dtype)
    if params.repetition_penalty != 1:
        logits = _penalise(logits, params.repetition_penalty, previous)
    best = logits.argmax()
    if not logits[best].isfinite():  # NaN counts as the largest
        raise logits_not_finite()
    if params.temperature == 0:
        return torch.nn.functional.one_hot(best, logits.shape[0]).float()
    # The largest logit becomes 0 first, or a tiny temperature would make several of them infinite.
    logits = (logits - logits[best]) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if 0 < params.top_k < logits.shape[0]:
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(0)
    if params.top_p < 1:
        sorted_probs, order = probs.sort(descending=True, stable=True)
        before = sorted_probs.cumsum(0, dtype=torch.float64) - sorted_probs
        sorted_probs = sorted_probs.masked_fill(before >= params.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(0, order, sorted_probs / sorted_probs.sum())
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
        probs = probs / probs.sum()
    return probs


def sample(
    logits: Tensor, params: SamplingParams, generator: torch.Generator, previous: Sequence[int] | Tensor = ()
) -> int:
    """The next token id; the same generator state, logits and settings give the same token.

    Args:
        logits: float32 [vocab_size].
        params: the settings; temperature 0 is greedy (after the penalty) and leaves the generator alone.
        generator: where chance comes from; the draw happens on its device.
        previous: as in `probabilities`.

    Raises:
        CheckpointError: the largest logit is NaN or infinite.
    """
    if params.temperature == 0:
        if params.repetition_penalty != 1:
            logits = _penalise(logits, params.repetition_penalty, previous)
        words = torch.empty(2, dtype=torch.int64, device=logits.device)
        BestToken(words).find(logits)
        return BestToken(words.cpu()).read()
    probs = probabilities(logits, params, previous)
    return int(torch.multinomial(probs.to(generator.device), 1, generator=generator))


@dataclass(frozen=True)
class TokenScore:
    """How likely the model found a token where it stands, before temperature and all that follows it.

    Attributes:
        logprob: natural logarithm of its probability.
        top: the likeliest tokens there with theirs, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score_tokens(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of tokens by the logits that predict them.

    Args:
        logits: float32 [n, vocab_size].
        token_ids: n tokens.
        top: how many of the likeliest tokens of each place are named.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logprobs.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenScore(token_id, score, tuple(zip(*row, strict=True)))
        for token_id, score, row in zip(token_ids, own, rows, strict=True)
    ]
