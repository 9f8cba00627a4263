"""A session over a synthetic cache: decode at any length, timed without reading a text of that length first."""

from __future__ import annotations

import torch

from longrun.errors import ContextFullError, InputError
from longrun.lab.synthetic_cache import fill_synthetic
from longrun.session.session import Session


def make_synthetic(session: Session, seq_len: int, seed: int = 0) -> None:
    """Make a new, empty session stand at `seq_len` random tokens, as if they had been read.

    All but the last are random cache content (`longrun.lab.synthetic_cache`) under random token ids; the last one is
    really decoded, which gives the logits to continue from. The same seed gives the same tokens and content wherever
    pages stand. What follows means nothing: it serves timings, and results that come from it must say so. The session
    cannot be saved.

    Args:
        session: empty; `Runtime.new_session` makes one.
        seq_len: tokens, at least 2 and at most the capacity.
        seed: at least 0.

    Raises:
        InputError: the session holds tokens already, or seq_len is below 2.
        ContextFullError: seq_len is above the capacity.
    """
    if session.num_tokens:
        raise InputError(
            f"only an empty session can be made synthetic, and this one holds {session.num_tokens:,} tokens"
        )
    if seq_len < 2:
        raise InputError(f"a synthetic session needs at least 2 tokens, and {seq_len} were asked for")
    if seq_len > session.capacity:
        raise ContextFullError(
            f"{seq_len:,} synthetic tokens are more than this session's capacity of {session.capacity:,}: make the "
            f"session larger"
        )
    session.forbid_saving("its cache is synthetic, random content that no text gave")
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, session.vocab_size, (seq_len,), generator=generator, dtype=torch.int32)
    fill_synthetic(session.cache, seq_len - 1, seed)
    session.restore(token_ids[:-1], None, generator.get_state(), {})
    session.prefill(token_ids[-1:])
