"""How long reading the context and writing a token take, from a plan and a machine's speeds: arithmetic, no torch.

Reading is the time of the linears' and of attention's operations, and of the bytes that every chunk moves beside them.
Writing a token is the time of the bytes that it reads. The shares below are what longrun reaches of a machine's best;
they are fitted to the results in docs/results, and a test holds the two within 20% of each other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longrun.machine.speeds import Speeds
from longrun.plan.crossover import CPU_SCORE, LINK, select_seconds
from longrun.plan.plan import Plan
from longrun.quant.weight_format import is_quantized
from longrun.specs.prefill_spec import TILE, PrefillSpec
from longrun.units import format_bytes, format_seconds, format_tokens

# On a GPU: the linears of a chunk, with norms, RoPE, rotation and the cache's work beside them; a chunk's attention
# reaches what attention alone does. Of one token: the linears by format; what a layer's launches cost.
_CHUNK_LINEARS = 0.72
_TOKEN_LINEARS = {"bf16": 0.90, "int8": 0.83, "int4": 0.75, "nf4": 0.57}
_LAYER_SECONDS = 20e-6

# On a CPU: one token's weights, of reading memory; bf16 and nf4 from single runs.
_CPU_LINEARS = {"fp32": 0.76, "bf16": 0.50, "int8": 0.47, "int4": 0.43, "nf4": 0.36}

# Of sparse reading: the speed of attention to chosen pages, and of scoring all of them, beside dense attention's
# (docs/results/h200-sparse-prefill-kernels.json: scoring takes 0.76% of its time, of its operations 1/256; choosing
# 0.26%).
_TILE_SPEED, _SCORE_SPEED, _CHOOSING = 0.83, 0.51, 0.0026

_MOST_STEPS = 128  # of a long context as many chunks are computed, evenly spread


@dataclass(frozen=True)
class Times:
    """What a run at its full context takes.

    Attributes:
        capacity: tokens of the context.
        read_s: reading the whole context, seconds.
        token_ms: a token written after it, milliseconds.
        host_bytes: of pages in host memory, which every token moves to the device.
        speeds: what this was computed from.
        with_hot_pool: those of them that stand in the hot pool are not moved; the times count none there.
        tile_share: share of the past's pages that sparse reading is assumed to read where a mass decides; else None.
    """

    capacity: int
    read_s: float
    token_ms: float
    host_bytes: int
    speeds: Speeds
    with_hot_pool: bool = False
    tile_share: float | None = None

    def line(self) -> str:
        """As a person reads it."""
        most = "at most " if self.with_hot_pool else ""
        link = (
            f"; each moves {most}{format_bytes(self.host_bytes)} of pages from host memory" if self.host_bytes else ""
        )
        assumed = "" if self.tile_share is None else f" if {self.tile_share:.0%} of the pages hold what is looked for"
        return (
            f"reading {format_tokens(self.capacity)} tokens takes about {format_seconds(self.read_s)}{assumed}, each "
            f"token after them about {format_seconds(self.token_ms / 1e3)} ({self.speeds.origin}){link}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def predict(plan: Plan, speeds: Speeds | None) -> Times | None:
    """The times of a plan; None without speeds, and for what runs through plain torch on a GPU (exact page formats,
    fp32 weights), which nobody has measured."""
    if speeds is None or (plan.device_type == "cuda" and (not plan.attention.fused or plan.weight_format == "fp32")):
        return None
    read, token = read_seconds(plan, speeds, plan.capacity), token_seconds(plan, speeds, plan.capacity)
    hot = plan.cache.hot_slots > 0
    spec = plan.attention.prefill
    share = None if spec is None or spec.mass is None else _tile_share(spec)
    return Times(plan.capacity, read, 1e3 * token, host_bytes(plan, plan.capacity), speeds, hot, share)


def read_seconds(plan: Plan, speeds: Speeds, num_tokens: int) -> float:
    """Seconds of reading `num_tokens` tokens in the plan's chunks, as one document."""
    spec = plan.attention.prefill
    if spec is None or not spec.serves(num_tokens):
        return _steps_seconds(plan, speeds, num_tokens, num_tokens)
    last = min(spec.dense_end, plan.chunk_size)
    end = _chunk_seconds(plan, speeds, last, num_tokens - (spec.dense_end + last) / 2) * spec.dense_end / last
    return _steps_seconds(plan, speeds, num_tokens - spec.dense_end, spec.dense_tokens) + end


def _steps_seconds(plan: Plan, speeds: Speeds, num_tokens: int, dense_tokens: int) -> float:
    """Chunks of `num_tokens` tokens, sparse from `dense_tokens` on."""
    chunks = -(-num_tokens // plan.chunk_size)
    steps = min(chunks, _MOST_STEPS)
    tokens = num_tokens / chunks
    seconds = 0.0
    for step in range(steps):
        past = max(0.0, (step + 0.5) * num_tokens / steps - tokens / 2)
        seconds += _chunk_seconds(plan, speeds, tokens, past, past >= dense_tokens) * chunks / steps
    return seconds


def _chunk_seconds(plan: Plan, speeds: Speeds, tokens: float, past: float, sparse: bool = False) -> float:
    """A chunk after `past` tokens; a sparse one reads the past twice, to choose and to attend."""
    cache, work, page = plan.cache, plan.work, plan.cache.page_format
    group = plan.attention.num_qo_heads // plan.attention.num_kv_heads
    pairs = cache.paged_tokens(past + tokens / 2) + cache.ring_tokens(past + tokens)
    passes, spec = 1, plan.attention.prefill
    if sparse and spec is not None:
        passes = 2
        pairs -= (
            cache.keeping_heads
            * past
            * (1 - _tile_share(spec) / _TILE_SPEED - (spec.rows / 2 / _SCORE_SPEED + spec.correct) / TILE - _CHOOSING)
        )
    attention = 4 * page.head_dim * group * tokens * pairs / speeds.attention_tflops / 1e12
    on_gpu = plan.device_type == "cuda"
    linears = 2 * work.linear_weights * tokens / speeds.matmul_tflops / 1e12 / (_CHUNK_LINEARS if on_gpu else 1)
    dense = 2 * work.dense_bytes if is_quantized(plan.weight_format) else 0
    # A page is read, and written and read once more as exact keys and values.
    past_page = page.page_bytes / page.page_size + 4 * page.head_dim * page.exact_itemsize
    moved = work.linear_bytes + dense + passes * cache.paged_tokens(past) * past_page
    on_device = cache.device_pages_per_head * page.page_size
    on_host = cache.keeping_heads * max(0.0, past - on_device) * page.payload_bytes / page.page_size
    link = passes * on_host / speeds.link_gb_s / 1e9
    seconds = linears + attention + moved / speeds.memory_gb_s / 1e9
    return max(seconds, link / LINK) if on_gpu else seconds + link


def _tile_share(spec: PrefillSpec) -> float:
    """Of the pages; where a mass decides, the middle of what it may be."""
    return spec.cap if spec.mass is None else (min(spec.least, spec.cap) + spec.cap) / 2


def token_seconds(plan: Plan, speeds: Speeds, seq_len: int) -> float:
    """Seconds of one token after `seq_len` tokens, at most the context."""
    cache, work = plan.cache, plan.work
    memory = speeds.memory_gb_s * 1e9
    link = host_bytes(plan, seq_len) / speeds.link_gb_s / 1e9
    held = cache.held_pages(seq_len)
    unread = held - _read_pages(plan, seq_len)
    if plan.device_type == "cuda":
        linears = work.linear_bytes / _TOKEN_LINEARS[plan.weight_format]
        others = work.other_bytes + cache.filled_bytes(seq_len) - unread * cache.page_format.page_bytes
        seconds = (linears + others) / memory + cache.num_layers * _LAYER_SECONDS
        if unread:  # chosen pages are read from the host where attention waits for them
            return seconds + select_seconds(cache, held, speeds.memory_gb_s) + link / LINK
        return max(seconds, link / LINK)
    group = plan.attention.num_qo_heads // plan.attention.num_kv_heads
    spared = (unread - (CPU_SCORE * held if unread else 0)) * cache.page_format.page_size
    pairs = group * (cache.paged_tokens(seq_len) - spared + cache.ring_tokens(seq_len))
    attention = 4 * cache.page_format.head_dim * pairs / speeds.attention_tflops / 1e12
    weights = (work.linear_bytes + work.other_bytes) / memory / _CPU_LINEARS[plan.weight_format]
    return weights + attention + link


def host_bytes(plan: Plan, seq_len: int) -> int:
    """Bytes of pages in host memory that a token reads at `seq_len` tokens: all of them, or as large a part as of all
    pages are selected."""
    cache = plan.cache
    pages = max(0, cache.page_format.pooled_pages(seq_len) - cache.device_pages_per_head)
    share = _read_pages(plan, seq_len) / max(1, cache.held_pages(seq_len))
    return round(share * cache.keeping_heads * pages) * cache.page_format.payload_bytes


def _read_pages(plan: Plan, seq_len: int) -> int:
    """Pages of all heads that a token reads."""
    selection = plan.attention.selection
    held = plan.cache.held_pages(seq_len)
    return held if selection is None else plan.cache.read_pages(seq_len, selection)
