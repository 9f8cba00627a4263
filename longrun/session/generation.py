"""Token by token: the one that waits is run, and the next one is chosen from its logits."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import Tensor

from longrun.engine.sampling import SamplingParams, sample, seen_tokens
from longrun.interrupts import deferred_signals
from longrun.session.sequence import TokenSequence


def generate(
    sequence: TokenSequence, max_new_tokens: int, params: SamplingParams, end_token_ids: Container[int]
) -> Iterator[int]:
    """Continue the sequence; see `Session.generate`.

    Args:
        max_new_tokens: at least 1.
        end_token_ids: the first of these is yielded last.
    """
    seen = None
    if params.repetition_penalty != 1:
        seen = seen_tokens(sequence.id_tensor(), sequence.engine.decoder.config.vocab_size, sequence.cache.device)
    for left in range(max_new_tokens, 0, -1):
        token_id = _next_token(sequence, params, seen, more=left > 1)
        yield token_id
        if token_id in end_token_ids:
            return


def _next_token(sequence: TokenSequence, params: SamplingParams, seen: Tensor | None, more: bool) -> int:
    """Run the token that waits and choose the next one, which then waits.

    A chosen token must reach the caller. So where a signal came meanwhile, nothing is chosen before its handlers ran;
    they raise as a rule, and otherwise the choice is made again.

    Args:
        seen: bool [vocab_size] of the tokens so far, kept up to date here; None without a repetition penalty.
        more: whether another token will be asked for.
    """
    greedy = params.temperature == 0 and params.repetition_penalty == 1
    while True:
        with deferred_signals() as signals:
            sequence.take_waiting(ahead=greedy and more)
            assert sequence.logits is not None
            before = sequence.generator.get_state()
            token_id = sequence.engine.next_token_id() if greedy else None
            if token_id is None:
                token_id = sample(sequence.logits, params, sequence.generator, () if seen is None else seen)
            if not signals.waiting:
                sequence.ids.append(token_id)
                if seen is not None:
                    seen[token_id] = True
                return token_id
            sequence.generator.set_state(before)
