"""What would fit: searches over placements, each answer verified by placing it once more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from longrun.errors import PlanError
from longrun.patterns.head_map import HeadSplit
from longrun.plan.placement import PlanSettings, place
from longrun.quant.kv_format import (
    DEFAULT_KV_FORMAT,
    GPU_HEAD_DIMS,
    GPU_MAX_GROUP,
    GPU_PAGE_SIZE,
    QUANTIZED_KV_FORMATS,
)
from longrun.quant.weight_format import WEIGHT_FORMATS

MAX_CTX = 10**9  # where to stop looking: without retrieval heads the cache does not grow at all
_ROUND_BYTES = 10**8


@dataclass(frozen=True)
class Suggestion:
    """One change that makes the plan fit (for `ctx`: the most that fits).

    Attributes:
        setting: ctx, retrieval_ratio, weights, kv, chunk_size, host or gpu.
        value: what to set it to, in tokens or bytes where it is one.
        words: says so to a person; option: the same as options of a command, empty where it is none's.
    """

    setting: str
    value: int | float | str
    words: str
    option: str = ""

    def told_by(self, options: Collection[str]) -> str:
        """As a command with these options says it."""
        named = [word for word in self.option.split() if word.startswith("--")]
        return self.option if named and set(named) <= set(options) else self.words


def fits(settings: PlanSettings, capacity: int) -> bool:
    """Whether the memory holds `capacity` tokens with these settings."""
    try:
        return place(settings, capacity).fits
    except PlanError:
        return False


def largest(start: int, stop: int, good: Callable[[int], bool]) -> int | None:
    """Largest n in [start, stop) with good(n), where good is true up to some n and false after it; None if never."""
    if start >= stop or not good(start):
        return None
    while stop - start > 1:
        middle = (start + stop) // 2
        start, stop = (middle, stop) if good(middle) else (start, middle)
    return start


def largest_ctx(settings: PlanSettings) -> int:
    """Largest context in tokens that fits; 0 where not even one token does, `MAX_CTX` where there is no limit."""
    return largest(1, MAX_CTX + 1, lambda ctx: fits(settings, ctx)) or 0


def shortfall(settings: PlanSettings, ctx: int) -> tuple[int, int]:
    """(device, host) bytes of memory with which `ctx` tokens fit, where they do not: more on the device alone, or on
    both with the host pool in use, whichever is less in all."""
    device = place(settings, ctx).device_short
    enough = replace(settings, gpu_bytes=settings.gpu_bytes + device)
    found = [(device, place(enough, ctx).host_short)]
    alone = place(replace(settings, host_bytes=0), ctx).device_short
    if fits(replace(settings, gpu_bytes=settings.gpu_bytes + alone), ctx):
        found.append((alone, 0))
    return min(found, key=lambda pair: (sum(pair), pair))


def suggest(
    settings: PlanSettings, ctx: int, resplits: Callable[[float], Sequence[HeadSplit]]
) -> tuple[Suggestion, ...]:
    """The nearest changes of one setting each with which `ctx` tokens fit (for the context: the most that fits); where
    no setting is enough, the memory that is, with the weights as they are and in the fewest bits.

    Args:
        settings: settings with which `ctx` does not fit.
        resplits: what the split may be with another retrieval ratio; all of them must fit.
    """
    found = [
        _smaller_ctx(settings),
        _fewer_retrieval_heads(settings, ctx, resplits),
        _more_memory(settings, ctx, "host", "host_bytes"),
        _fewer_weight_bits(settings, ctx),
        _quantized_pages(settings, ctx),
        _smaller_chunk(settings, ctx),
    ]
    if not any(found):
        memory = _more_memory(settings, ctx, "gpu", "gpu_bytes")
        found += [memory, _fewest_weight_bits_and_memory(settings, ctx, memory)]
    return tuple(suggestion for suggestion in found if suggestion)


def _smaller_ctx(settings: PlanSettings) -> Suggestion | None:
    ctx = largest_ctx(settings)
    return Suggestion("ctx", ctx, f"a context of {ctx} tokens", f"--ctx {ctx}") if ctx else None


def _fewer_retrieval_heads(
    settings: PlanSettings, ctx: int, resplits: Callable[[float], Sequence[HeadSplit]]
) -> Suggestion | None:
    total = settings.config.num_layers * settings.config.num_kv_heads
    count = largest(
        1,
        settings.split.total_retrieval,
        lambda count: all(fits(replace(settings, split=split), ctx) for split in resplits(count / total)),
    )
    if count is None:
        return None
    ratio = _short_ratio(count, total)
    given = " with a head map" if settings.split.is_full else ""
    words, option = f"a retrieval ratio of {ratio!r}{given}", f"--retrieval-ratio {ratio!r}{given}"
    return Suggestion("retrieval_ratio", ratio, words, option)


def _short_ratio(count: int, total: int) -> float:
    """The ratio with the fewest decimals that keeps exactly `count` of `total` heads."""
    for digits in range(1, 17):
        ratio = round(count / total, digits)
        if round(ratio * total) == count:
            return ratio
    return count / total


def _more_memory(settings: PlanSettings, ctx: int, key: str, field: str) -> Suggestion | None:
    """Memory of one kind, in steps of 0.1 GB, with everything else as it is."""
    steps = 10**7  # a petabyte: more than any machine has
    now = -(-getattr(settings, field) // _ROUND_BYTES)
    if not fits(replace(settings, **{field: steps * _ROUND_BYTES}), ctx):
        return None
    too_small = largest(now, steps, lambda step: not fits(replace(settings, **{field: step * _ROUND_BYTES}), ctx))
    size = (now if too_small is None else too_small + 1) * _ROUND_BYTES
    main_memory = " (main memory, too)" if settings.device_type == "cpu" else ""
    words = f'{key} = "{size / 10**9:.1f} GB" under [memory] in the budget file{main_memory}'
    return Suggestion(key, size, words)


def _fewest_weight_bits_and_memory(settings: PlanSettings, ctx: int, as_it_is: Suggestion | None) -> Suggestion | None:
    """The fewest bits with the memory they need, where that is less than with the present format."""
    name = WEIGHT_FORMATS[-1]
    memory = _more_memory(replace(settings, weight_format=name), ctx, "gpu", "gpu_bytes")
    if memory is None or as_it_is is None or memory.value >= as_it_is.value:
        return None
    return Suggestion(
        "weights", name, f"weights as {name} with {memory.words}", f"--weights {name} with {memory.words}"
    )


def _fewer_weight_bits(settings: PlanSettings, ctx: int) -> Suggestion | None:
    """The weight format with the most bits below the present one that fits (`WEIGHT_FORMATS` falls in bits). Of the two
    4-bit ones that is int4 on a GPU and nf4 on a CPU, the faster there.

    Where none holds `ctx`, and the present format holds no token at all, the one that holds the most.
    """
    names = WEIGHT_FORMATS[WEIGHT_FORMATS.index(settings.weight_format) + 1 :]
    if settings.device_type == "cuda":
        names = sorted(names, key=lambda name: name == "nf4")
    smaller = [replace(settings, weight_format=name) for name in names]
    for option in smaller:
        if fits(option, ctx):
            name = option.weight_format
            return Suggestion("weights", name, f"weights as {name}", f"--weights {name}")
    if largest_ctx(settings):
        return None
    most, option = max(
        ((largest_ctx(option), option) for option in smaller), key=lambda pair: pair[0], default=(0, None)
    )
    if not most:
        return None
    name = option.weight_format
    words, option_text = f"weights as {name} with a context of {most} tokens", f"--weights {name} with --ctx {most}"
    return Suggestion("weights", name, words, option_text)


def _quantized_pages(settings: PlanSettings, ctx: int) -> Suggestion | None:
    config = settings.config
    served = config.head_dim in GPU_HEAD_DIMS and config.group_size <= GPU_MAX_GROUP
    if settings.device_type == "cuda" and not (served and settings.page_size == GPU_PAGE_SIZE):
        return None
    if settings.kv_format in QUANTIZED_KV_FORMATS or not fits(replace(settings, kv_format=DEFAULT_KV_FORMAT), ctx):
        return None
    return Suggestion("kv", DEFAULT_KV_FORMAT, f"KV pages as {DEFAULT_KV_FORMAT}", f"--kv {DEFAULT_KV_FORMAT}")


def _smaller_chunk(settings: PlanSettings, ctx: int) -> Suggestion | None:
    chunk_size = largest(
        settings.page_size, min(settings.chunk_size, ctx), lambda size: fits(replace(settings, chunk_size=size), ctx)
    )
    if chunk_size is None:
        return None
    return Suggestion(
        "chunk_size", chunk_size, f"prefill in chunks of {chunk_size} tokens", f"--chunk-size {chunk_size}"
    )
