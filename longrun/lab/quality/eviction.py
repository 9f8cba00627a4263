"""Sessions over a cache that evicts: the baselines from the literature, on the weights of a runtime of ours."""

from __future__ import annotations

from longrun.engine.engine import Engine
from longrun.errors import InputError, PlanError
from longrun.lab.evicting_cache import EvictingCache, EvictingSpec
from longrun.lab.eviction_attention import EvictionAttention, EvictionSettings
from longrun.quant.page_codec import exact_dtype
from longrun.runtime.runtime import Runtime
from longrun.session.session import Session
from longrun.units import format_bytes

# TOVA's prefill steps: the fewer tokens, the closer to one at a time; the more, the fewer steps a long text takes.
_TOVA_LEAST = 64
_TOVA_SHARE = 32
_SPARE = 64


class EvictingSession(Session):
    """Made by `make_session`. `attention` decides what its cache drops."""

    attention: EvictionAttention


def tova_chunk(keep: int) -> int:
    """Tokens of a TOVA prefill step: a 32nd of what is kept (3% of it is dropped at a time), at least 64."""
    return max(_TOVA_LEAST, keep // _TOVA_SHARE)


def make_session(
    runtime: Runtime, method: str, keep: int, capacity: int, chunk_size: int | None = None, **settings: int
) -> EvictingSession:
    """An empty session that evicts.

    Read the prompt with `prefill`, then call `end_prompt`; marks and rewinds work as in any session. Positions keep
    counting what was seen, so `seq_len` is that, and `cache.layers[i].counts` what is kept. It cannot be saved.

    Args:
        runtime: with full attention (head map "full"); keys and values are held in its pages' exact dtype.
        method, keep: see `EvictionSettings`; settings: its other fields.
        capacity: tokens seen in all. Retention rules first hold a whole prompt, TOVA never more than keep + chunk.
        chunk_size: tokens of a prefill step; default the plan's, for TOVA at most `tova_chunk(keep)`.

    Raises:
        InputError: an unknown method, keep below 1, or a runtime with streaming heads.
        PlanError: the cache does not fit in what the runtime's weights leave of the budget.
    """
    if keep < 1:
        raise InputError(f"{method} cannot keep {keep} tokens: give at least 1")
    if not runtime.split.is_full:
        raise InputError(f"{method} evicts from full attention: load the model with head map full")
    chosen, plan, parts = EvictionSettings(method, keep, **settings), runtime.plan, runtime.parts
    rule = chosen.rule
    chunk = chunk_size or (min(plan.chunk_size, tova_chunk(keep)) if rule is None else plan.chunk_size)
    config = runtime.config
    spec = EvictingSpec(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=exact_dtype(plan.cache.page_format),
        capacity=capacity,
        room=min(capacity, keep + chunk) if rule is None else capacity,
        spare=_SPARE,
        in_place=rule is None,
    )
    needed = spec.initial_bytes()
    if rule is not None:
        needed += spec.initial_bytes() // config.num_layers  # in compression, one layer stands in memory twice
        needed += spec.received_bytes() if rule.score.reads_received else 0
    room = plan.device_budget - plan.device_bytes + sum(plan.cache.device_bytes().values())
    if needed > room:
        raise PlanError(
            f"{method} holds {format_bytes(needed)} for {capacity:,} tokens and the budget has {format_bytes(room)} "
            f"besides the weights: use a smaller capacity or a larger budget"
        )
    cache = EvictingCache(spec, parts.decoder.device)
    attention = EvictionAttention(cache, chosen)
    engine = Engine(parts.decoder, parts.rotary, attention, cache, chunk)
    session = EvictingSession(engine, plan, runtime.identity, runtime.eos_token_ids)
    session.attention = attention
    session.forbid_saving(f"its cache has dropped tokens ({method}), which the session format cannot say")
    return session


def end_prompt(session: Session) -> None:
    """The prompt ends here: a retention rule compresses now. Any other session is left as it is."""
    if isinstance(session, EvictingSession):
        session.attention.compress()
