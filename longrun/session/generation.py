"""Token by token: the one that waits is run, and the next one is chosen from its logits."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import Tensor

from longrun.engine.sampling import SamplingParams, TokenScore, sample, score_tokens, seen_tokens
from longrun.engine.token_rule import TokenRule, masked_logits
from longrun.interrupts import deferred_signals
from longrun.session.sequence import TokenSequence


def generate(
    sequence: TokenSequence,
    max_new_tokens: int,
    params: SamplingParams,
    end_token_ids: Container[int],
    ahead: bool = True,
    rule: TokenRule | None = None,
) -> Iterator[int]:
    """Continue the sequence; see `Session.generate`.

    Args:
        max_new_tokens: at least 1.
        end_token_ids: the first of these is yielded last.
        ahead: a GPU may begin with the next token before this one is used; the logits are the next one's then.
        rule: says which tokens may come and when nothing may follow.
    """
    seen = None
    if params.repetition_penalty != 1:
        seen = seen_tokens(sequence.id_tensor(), sequence.engine.decoder.config.vocab_size, sequence.cache.device)
    for left in range(max_new_tokens, 0, -1):
        token_id = _next_token(sequence, params, seen, more=ahead and left > 1, rule=rule)
        if rule is not None:
            rule.take(token_id)
        yield token_id
        if token_id in end_token_ids or (rule is not None and rule.is_complete):
            return


def generate_scored(
    sequence: TokenSequence, max_new_tokens: int, params: SamplingParams, end_token_ids: Container[int], top: int,
    rule: TokenRule | None = None,
) -> Iterator[TokenScore]:  # fmt: skip
    """`generate`, with how likely each token was and the `top` likeliest ones in its place, whatever a rule allows."""
    for token_id in generate(sequence, max_new_tokens, params, end_token_ids, ahead=False, rule=rule):
        assert sequence.logits is not None
        yield score_tokens(sequence.logits[None], [token_id], top)[0]


def _next_token(
    sequence: TokenSequence, params: SamplingParams, seen: Tensor | None, more: bool, rule: TokenRule | None
) -> int:
    """Run the token that waits and choose the next one, which then waits.

    A chosen token must reach the caller. So where a signal came meanwhile, nothing is chosen before its handlers ran;
    they raise as a rule, and otherwise the choice is made again.

    Args:
        seen: bool [vocab_size] of the tokens so far, kept up to date here; None without a repetition penalty.
        more: another token will be asked for, and its step may begin before this one is used.
        rule: see `generate`; what it does not allow is left out before anything else.
    """
    greedy = params.temperature == 0 and params.repetition_penalty == 1 and rule is None
    while True:
        with deferred_signals() as signals:
            sequence.take_waiting(ahead=greedy and more)
            assert sequence.logits is not None
            before = sequence.generator.get_state()
            token_id = sequence.engine.next_token_id() if greedy else None
            if token_id is None:
                logits = sequence.logits if rule is None else masked_logits(sequence.logits, rule.allowed())
                token_id = sample(logits, params, sequence.generator, () if seen is None else seen)
            if not signals.waiting:
                sequence.ids.append(token_id)
                if seen is not None:
                    seen[token_id] = True
                return token_id
            sequence.generator.set_state(before)
