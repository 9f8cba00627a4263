"""What would fit: searches over placements, each answer verified by placing it once more."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from longrun.errors import HeadMapError, PlanError
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
from longrun.specs.prefill_spec import EXACT
from longrun.units import format_bytes

MAX_CAPACITY = 10**9  # where to stop looking: without retrieval heads the cache does not grow at all
_ROUND_BYTES = 10**8


@dataclass(frozen=True)
class Suggestion:
    """One change that makes the plan fit (for the capacity: the most that fits).

    Attributes:
        setting: ctx (the capacity), retrieval_ratio, kv_bytes, weights, kv, chunk_size, hot_pool, select, prefill, host
            or gpu.
        value: what to set it to, in tokens or bytes where it is one.
        words: the advice in words; option: the same as options of a command, empty where no option does it.
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


def largest_capacity(settings: PlanSettings) -> int:
    """The most tokens that fit; 0 where not even one does, `MAX_CAPACITY` where there is no limit."""
    return largest(1, MAX_CAPACITY + 1, lambda capacity: fits(settings, capacity)) or 0


def shortfall(settings: PlanSettings, capacity: int) -> tuple[int, int]:
    """(device, host) bytes of memory that `capacity` tokens lack: on the device alone, or on both with the host pool in
    use, whichever is less in all."""
    device = place(settings, capacity).device_short
    enough = replace(settings, device_bytes=settings.device_bytes + device)
    found = [(device, place(enough, capacity).host_short)]
    alone = place(replace(settings, host_bytes=0), capacity).device_short
    if fits(replace(settings, device_bytes=settings.device_bytes + alone), capacity):
        found.append((alone, 0))
    return min(found, key=lambda pair: (sum(pair), pair))


def suggest(
    settings: PlanSettings,
    capacity: int,
    resplits: Callable[[float], Sequence[HeadSplit]],
    fewer_kv_bytes: Callable[[int], HeadSplit] | None = None,
    kv_bytes: int = 0,
    least: int = 1,
) -> tuple[Suggestion, ...]:
    """The nearest changes of one setting each with which `capacity` tokens fit (for the capacity itself: the most that
    fits); where no setting is enough, the memory that is, with the weights as they are and in the fewest bits.

    Args:
        settings: settings with which `capacity` does not fit.
        resplits: what the split may be with another retrieval ratio; all of them must fit.
        fewer_kv_bytes: where the split was allocated from `kv_bytes`, the one of other bytes. Another context or page
            format would then give another split, so neither is suggested.
        least: tokens that a context must have.
    """
    found = [
        _more_memory(settings, capacity, "host", "host_bytes"),
        _fewer_weight_bits(settings, capacity, or_context=fewer_kv_bytes is None),
        _smaller_chunk(settings, capacity),
        _no_hot_pool(settings, capacity),
        _no_selection(settings, capacity),
        _exact_prefill(settings, capacity),
    ]
    if fewer_kv_bytes is None:
        found[:0] = [_smaller_capacity(settings, least), _fewer_retrieval_heads(settings, capacity, resplits)]
        found.insert(-4, _quantized_pages(settings, capacity))
    else:
        found.insert(0, _fewer_kv_bytes(settings, capacity, fewer_kv_bytes, kv_bytes))
    if not any(found):
        memory = _more_memory(settings, capacity, "gpu", "device_bytes")
        found += [memory, _fewest_weight_bits_and_memory(settings, capacity, memory)]
    return tuple(suggestion for suggestion in found if suggestion)


def _smaller_capacity(settings: PlanSettings, least: int) -> Suggestion | None:
    capacity = largest_capacity(settings)
    if capacity < least:
        return None
    return Suggestion("ctx", capacity, f"a context of {capacity} tokens", f"--ctx {capacity}")


def _fewer_retrieval_heads(
    settings: PlanSettings, capacity: int, resplits: Callable[[float], Sequence[HeadSplit]]
) -> Suggestion | None:
    total = settings.config.num_layers * settings.config.num_kv_heads
    count = largest(
        1,
        settings.split.total_retrieval,
        lambda count: all(fits(replace(settings, split=split), capacity) for split in resplits(count / total)),
    )
    if count is None:
        return None
    ratio = _short_ratio(count, total)
    given = " with a head map" if settings.split.is_full else ""
    words, option = f"a retrieval ratio of {ratio!r}{given}", f"--retrieval-ratio {ratio!r}{given}"
    return Suggestion("retrieval_ratio", ratio, words, option)


def _fewer_kv_bytes(
    settings: PlanSettings, capacity: int, split_of: Callable[[int], HeadSplit], kv_bytes: int
) -> Suggestion | None:
    """The most bytes, in three digits, whose allocation fits."""
    step = 10 ** max(0, len(str(kv_bytes)) - 3)

    def holds(steps: int) -> bool:
        try:
            return fits(replace(settings, split=split_of(steps * step)), capacity)
        except HeadMapError:  # not even the window of every head
            return False

    least = bisect_left(range(1, kv_bytes // step + 1), True, key=lambda steps: _can_be_split(split_of, steps * step))
    steps = largest(1 + least, -(-kv_bytes // step), holds)
    if steps is None:
        return None
    size = steps * step
    return Suggestion("kv_bytes", size, f"kv_bytes of {format_bytes(size)}", f"--kv-bytes {size}")


def _can_be_split(split_of: Callable[[int], HeadSplit], size: int) -> bool:
    try:
        split_of(size)
    except HeadMapError:
        return False
    return True


def _short_ratio(count: int, total: int) -> float:
    """The ratio with the fewest decimals that keeps exactly `count` of `total` heads."""
    for digits in range(1, 17):
        ratio = round(count / total, digits)
        if round(ratio * total) == count:
            return ratio
    return count / total


def _more_memory(settings: PlanSettings, capacity: int, key: str, field: str) -> Suggestion | None:
    """Memory of one kind, in steps of 0.1 GB, with everything else as it is."""
    steps = 10**7  # a petabyte: more than any machine has
    now = -(-getattr(settings, field) // _ROUND_BYTES)
    if not fits(replace(settings, **{field: steps * _ROUND_BYTES}), capacity):
        return None
    too_small = largest(now, steps, lambda step: not fits(replace(settings, **{field: step * _ROUND_BYTES}), capacity))
    size = (now if too_small is None else too_small + 1) * _ROUND_BYTES
    main_memory = " (main memory, too)" if settings.device_type == "cpu" else ""
    words = f'{key} = "{size / 10**9:.1f} GB" under [memory] in the budget file{main_memory}'
    return Suggestion(key, size, words)


def _fewest_weight_bits_and_memory(
    settings: PlanSettings, capacity: int, as_it_is: Suggestion | None
) -> Suggestion | None:
    """The fewest bits with the memory they need, where that is less than with the present format."""
    name = WEIGHT_FORMATS[-1]
    memory = _more_memory(replace(settings, weight_format=name), capacity, "gpu", "device_bytes")
    if memory is None or as_it_is is None or memory.value >= as_it_is.value:
        return None
    return Suggestion(
        "weights", name, f"weights as {name} with {memory.words}", f"--weights {name} with {memory.words}"
    )


def _fewer_weight_bits(settings: PlanSettings, capacity: int, or_context: bool) -> Suggestion | None:
    """The weight format with the most bits below the present one that fits (`WEIGHT_FORMATS` falls in bits). Of the two
    4-bit ones that is int4 on a GPU and nf4 on a CPU, the faster there.

    Where none holds `capacity`, and the present format holds no token at all, the one that holds the most, with
    `or_context`.
    """
    names = WEIGHT_FORMATS[WEIGHT_FORMATS.index(settings.weight_format) + 1 :]
    if settings.device_type == "cuda":
        names = sorted(names, key=lambda name: name == "nf4")
    smaller = [replace(settings, weight_format=name) for name in names]
    for option in smaller:
        if fits(option, capacity):
            name = option.weight_format
            return Suggestion("weights", name, f"weights as {name}", f"--weights {name}")
    if not or_context or largest_capacity(settings):
        return None
    most, option = max(
        ((largest_capacity(option), option) for option in smaller), key=lambda pair: pair[0], default=(0, None)
    )
    if not most:
        return None
    name = option.weight_format
    words, option_text = f"weights as {name} with a context of {most} tokens", f"--weights {name} with --ctx {most}"
    return Suggestion("weights", name, words, option_text)


def _quantized_pages(settings: PlanSettings, capacity: int) -> Suggestion | None:
    config = settings.config
    served = config.head_dim in GPU_HEAD_DIMS and config.group_size <= GPU_MAX_GROUP
    if settings.device_type == "cuda" and not (served and settings.page_size == GPU_PAGE_SIZE):
        return None
    if settings.kv_format in QUANTIZED_KV_FORMATS or not fits(replace(settings, kv_format=DEFAULT_KV_FORMAT), capacity):
        return None
    return Suggestion("kv", DEFAULT_KV_FORMAT, f"KV pages as {DEFAULT_KV_FORMAT}", f"--kv {DEFAULT_KV_FORMAT}")


def _no_hot_pool(settings: PlanSettings, capacity: int) -> Suggestion | None:
    if not settings.hot_bytes or not fits(replace(settings, hot_bytes=0), capacity):
        return None
    return Suggestion("hot_pool", "off", "host pages read in place, without a hot pool", "--hot-pool off")


def _no_selection(settings: PlanSettings, capacity: int) -> Suggestion | None:
    """Without selection no page has a digest."""
    if settings.selection is None or not fits(replace(settings, selection=None), capacity):
        return None
    return Suggestion("select", "off", "decoding that reads all pages", "--select off")


def _exact_prefill(settings: PlanSettings, capacity: int) -> Suggestion | None:
    """Without the memory in which tiles choose their pages."""
    if settings.prefill is None or not fits(replace(settings, prefill=None), capacity):
        return None
    return Suggestion("prefill", EXACT, "documents read exactly", f"--prefill {EXACT}")


def _smaller_chunk(settings: PlanSettings, capacity: int) -> Suggestion | None:
    chunk_size = largest(
        settings.page_size,
        min(settings.chunk_size, capacity),
        lambda size: fits(replace(settings, chunk_size=size), capacity),
    )
    if chunk_size is None:
        return None
    return Suggestion(
        "chunk_size", chunk_size, f"prefill in chunks of {chunk_size} tokens", f"--chunk-size {chunk_size}"
    )
