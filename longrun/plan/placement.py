"""Where every byte of a run goes for one capacity: the planner's arithmetic, without torch.

`place` never refuses: it states what the settings need and by how much that exceeds the memory. The bytes themselves
are computed by the parts they belong to (`longrun.specs`); here they are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from longrun.config.model_config import ModelConfig
from longrun.machine.speeds import DATA_SHEETS, Speeds
from longrun.patterns.head_map import HeadSplit
from longrun.plan.crossover import crossover_pages
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS, PageFormat
from longrun.quant.weight_format import is_quantized
from longrun.specs.attention_spec import DEFAULT_SCRATCH_TOKENS, AttentionSpec
from longrun.specs.cache_spec import MARKS, CacheSpec
from longrun.specs.device_allocator import rounding_bytes
from longrun.specs.model_bytes import (
    TOKEN_SLICES,
    activation_bytes,
    compute_itemsize,
    model_weight_bytes,
    model_weight_tensors,
)
from longrun.specs.prefill_spec import PrefillSpec
from longrun.specs.selection_spec import Selection
from longrun.units import ALL_TOKENS

DEFAULT_WEIGHT_FORMAT = {"cpu": "fp32", "cuda": "bf16"}

# What no setting changes, an upper bound of what was measured; without torch nothing better can be known.
# cpu: resident memory besides weights, cache and activations after a prefill (torch, transformers, a tokenizer of
# 49,152 tokens, buffers of matrix products) on x86-64 Linux with torch 2.13 and transformers 5.23: 166 to 285 MB with a
# GGUF file; with a folder, whose tokenizer transformers reads and imports torch's compiler for, 432 to 460; with nf4,
# where bitsandbytes does so, 496. `library_notice` says where it is more.
# cuda: what the driver counts beyond torch's own memory (context, cuBLAS, cuDNN, our kernels) on an H100 with torch
# 2.11: 720 MB after a decode, 805 MB after a prefill with needle questions; rounded up.
RUNTIME_BASE_BYTES = {"cpu": 300 * 10**6, "cuda": 850 * 10**6}
_COMPILER_BYTES, _BITSANDBYTES_BYTES = 160 * 10**6, 100 * 10**6

# What a server holds besides, measured likewise: its libraries (22 MB), and from the first answer of a given form on
# llguidance's tables (197 MB at most for 151,936 tokens, 66 for 49,152).
_SERVER_BYTES, _SERVER_BYTES_PER_TOKEN_ID = 25 * 10**6, 1350

# The most that the GPU kernels' buffer for host pages may take: two halves, so that one fills while the other is read.
FETCH_BYTES = 2 * 256 * 2**20

# Sampling keeps the logits in float32, scaled logits, sorted logits and their int64 order.
_LOGITS_BYTES_PER_TOKEN_ID = 3 * 4 + 8

# On a GPU torch takes tensors below 1 MiB from segments of their own.
_SMALL_TENSOR_BYTES = {"cpu": 0, "cuda": 16 * 2**20}

# Tensors are read in pieces of this size.
_LOADING_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PlanItem:
    """One line of a plan: `bytes` of `name` on `place` ("device" or "host")."""

    name: str
    place: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class PlanSettings:
    """Everything but the capacity that decides a placement.

    Attributes:
        config: shape of the model.
        split: retrieval and streaming heads of the model.
        device_type: "cpu" or "cuda".
        weight_format, kv_format, page_size: formats, see `Budget`.
        chunk_size: the most tokens of one prefill step; capped at the capacity.
        device_bytes, host_bytes: memory that may be used.
        reserved_bytes: device memory that is taken already.
        device_share: the most of a retrieval head's pages that may stand in the device pool, 0 to 1. Below 1 pages
            go to the host pool although the device has room, which is how the host path is exercised.
        gpu_kernels: on cuda, INT4 pages are served by the GPU kernels; False plans for plain torch.
        marks: points of a session to come back to that have memory of their own.
        serves: for `longrun.server`, whose own libraries then have a line (on the CPU: other memory is not planned).
        selection: what a decode step reads of the pages; None is all.
        select_from: pages of a head from which on it selects; None: from where that saves time.
        speeds: of the GPU, for telling where that is.
        hot_bytes: device memory for host pages that were chosen lately, where the GPU's kernels select among some.
        prefill: which pages of the past a document's chunks read; None is all.
        bf16_product_copy: on the CPU, bytes an element that a bf16 product holds besides its result, see
            `longrun.machine.processor`.
    """

    config: ModelConfig
    split: HeadSplit
    device_type: str
    weight_format: str
    kv_format: str
    page_size: int
    chunk_size: int
    device_bytes: int
    host_bytes: int
    reserved_bytes: int = 0
    device_share: float = 1.0
    gpu_kernels: bool = True
    bf16_product_copy: int = 0
    marks: int = MARKS
    serves: bool = False
    selection: Selection | None = None
    select_from: int | None = None
    speeds: Speeds = DATA_SHEETS["H100"]
    hot_bytes: int = 0
    prefill: PrefillSpec | None = None

    @cached_property
    def weight_bytes(self) -> int:
        return model_weight_bytes(self.config, self.weight_format, self.device_type)

    @cached_property
    def weight_rounding(self) -> int:
        """Bytes that a GPU's allocator takes beyond those of the weights."""
        if self.device_type != "cuda":
            return 0
        return rounding_bytes(model_weight_tensors(self.config, self.weight_format, self.device_type))

    @property
    def keeping_heads(self) -> int:
        """Retrieval heads that keep every token."""
        reaches = self.split.retrieval_reaches
        return sum(reach == ALL_TOKENS for row in reaches for reach in row) if reaches else self.split.total_retrieval

    def reads_sparsely(self, capacity: int) -> bool:
        """Whether any of `capacity` tokens may be read sparsely."""
        return self.prefill is not None and self.keeping_heads > 0 and self.prefill.serves(capacity)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation element."""
        return compute_itemsize(self.weight_format, self.device_type)

    @property
    def product_copy(self) -> int:
        return self.bf16_product_copy if self.device_type == "cpu" and self.itemsize == 2 else 0

    @property
    def fused(self) -> bool:
        """The GPU kernels' backend serves these settings, rather than plain torch."""
        return self.device_type == "cuda" and self.kv_format in QUANTIZED_KV_FORMATS and self.gpu_kernels

    @property
    def base_bytes(self) -> int:
        base, bitsandbytes = RUNTIME_BASE_BYTES[self.device_type], self.weight_format == "nf4"
        if self.device_type != "cpu":
            return base
        if bitsandbytes or not self.config.from_gguf:
            base += _COMPILER_BYTES
        return base + (_BITSANDBYTES_BYTES if bitsandbytes else 0)

    @property
    def server_bytes(self) -> int:
        if not self.serves or self.device_type != "cpu":
            return 0
        return _SERVER_BYTES + _SERVER_BYTES_PER_TOKEN_ID * self.config.vocab_size

    @cached_property
    def loading_bytes(self) -> int:
        """Device memory at the worst moment of loading: all weights, the pieces that are on their way, and for
        quantized formats the largest linear before it is quantized (q, k, v are one, gate and up another)."""
        config = self.config
        largest_tensor = max(_numel(weight.shape) for weight in config.weights())
        # A piece stands as read (in two bytes an element, mostly), converted, and reordered.
        passing = min(_LOADING_PIECE_BYTES, 2 * largest_tensor) * (1 + self.itemsize)
        if is_quantized(self.weight_format):
            widest = max(2 * config.intermediate_size, config.q_size + 2 * config.kv_size)
            passing += widest * config.hidden_size * self.itemsize
        libraries = self.base_bytes + self.server_bytes
        return self.weight_bytes + self.weight_rounding + libraries + self.reserved_bytes + passing


@dataclass(frozen=True)
class Placement:
    """Settings at one capacity: the specs to allocate from, every item, and what is missing.

    Attributes:
        device_short, host_short: bytes by which the need exceeds the memory; both 0 where it fits.
    """

    capacity: int
    chunk_size: int
    cache: CacheSpec
    attention: AttentionSpec
    items: tuple[PlanItem, ...]
    device_short: int
    host_short: int

    @property
    def fits(self) -> bool:
        return self.device_short == 0 and self.host_short == 0


def place(settings: PlanSettings, capacity: int) -> Placement:
    """Place a cache of `capacity` tokens: as many pages of every retrieval head on the device as it leaves room for,
    the others (the oldest) on the host. Pages of finite reaches all stand on the device. Where no step would select, as
    reading all takes less time up to the capacity, pages have no digests.

    Raises:
        PlanError: more pages than page tables can name.
        ConfigError: a page format that cannot hold the model's heads.
    """
    placement, selection, select_from = _place(settings, capacity), settings.selection, settings.select_from
    if selection is None or placement.cache.digest is None:  # no head has more pages than it may read
        return placement
    if select_from is None:
        select_from = crossover_pages(placement.cache, selection, settings.device_type, settings.speeds)
    if select_from > placement.attention.listed_pages:
        placement = _place(replace(settings, selection=None), capacity)
    selection = replace(selection, select_from=select_from)
    return replace(placement, attention=replace(placement.attention, selection=selection))


def _place(settings: PlanSettings, capacity: int) -> Placement:
    attention = _attention_spec(settings, capacity)
    cache = _cache_spec(settings, capacity, device_share=settings.device_share)
    if cache.host_pages:
        attention = _with_fetch_tables(attention, cache)
    others = tuple(_items_beside_the_cache(settings, attention, cache))
    other_bytes = sum(item.bytes for item in others)
    missing = other_bytes + sum(cache.device_bytes().values()) - settings.device_bytes
    if missing > 0 and settings.host_bytes > 0 and cache.keeping_heads > 0:
        attention = _with_fetch_tables(attention, cache)
        others = tuple(_items_beside_the_cache(settings, attention, cache))
        other_bytes = sum(item.bytes for item in others)
        empty = _cache_spec(settings, capacity, device_share=0.0)
        left = settings.device_bytes - other_bytes - sum(empty.device_bytes().values())
        pages = max(0, left) // (empty.keeping_heads * empty.page_format.payload_bytes)
        cache = _cache_spec(settings, capacity, device_share=settings.device_share, most_pages=pages)
        missing = -left
    device_bytes = other_bytes + sum(cache.device_bytes().values())
    headroom = max(0, settings.loading_bytes - device_bytes)
    items = [
        *others,
        *(PlanItem(name, "device", size, _NOTES.get(name, "")) for name, size in cache.device_bytes().items()),
        PlanItem("loading headroom", "device", headroom, "tensors on their way"),
        *(PlanItem(name, "host", size) for name, size in cache.host_bytes().items()),
    ]
    return Placement(
        capacity=capacity,
        chunk_size=attention.chunk_size,
        cache=cache,
        attention=attention,
        items=tuple(item for item in items if item.bytes),
        device_short=max(
            0, missing, settings.loading_bytes - settings.device_bytes, _hot_pool_short(settings, attention, cache)
        ),
        host_short=max(0, sum(cache.host_bytes().values()) - settings.host_bytes),
    )


_NOTES = {
    "page index (key scales)": "of host pages too",
    "page digests": "of host pages too; what pages are chosen by",
    "sink pages": "exact",
    "tails": "exact",
    "rings": "streaming heads",
    "marks": "copies of tails and rings",
    "fetch buffer": "host pages in use",
    "hot pool": "host pages chosen lately",
    "hot pool tables": "where these stand",
}


def _hot_pool_short(settings: PlanSettings, attention: AttentionSpec, cache: CacheSpec) -> int:
    """Bytes that the hot pool has too few for the pages of one step, of which a share grows with the context."""
    if not cache.hot_slots:
        return 0
    return cache.keeping_heads * attention.most_read_pages * cache.page_format.payload_bytes - settings.hot_bytes


def _with_fetch_tables(attention: AttentionSpec, cache: CacheSpec) -> AttentionSpec:
    """Fetched host pages are read through page tables of their own, one for each half of the fetch buffer."""
    if not attention.fused:
        return attention
    return replace(attention, fetch_table_pages=2 * cache.pages_per_head * max(cache.retrieval_heads))


def _attention_spec(settings: PlanSettings, capacity: int) -> AttentionSpec:
    config, split, page_size = settings.config, settings.split, settings.page_size
    most_heads = max(split.num_retrieval)
    finite = {min(reach, capacity) for row in split.retrieval_reaches for reach in row if reach < ALL_TOKENS}
    held = min(split.sink_size + max(finite), capacity) if finite else 0  # of a head, at once in the scratch
    scratch_tokens = min(DEFAULT_SCRATCH_TOKENS[settings.device_type], capacity)
    if finite:
        scratch_tokens = max(scratch_tokens, -(-held // most_heads))
    return AttentionSpec(
        scratch_tokens=-(-scratch_tokens // page_size) * page_size,
        max_retrieval_heads=most_heads,
        num_qo_heads=config.num_qo_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        compute_itemsize=settings.itemsize,
        chunk_size=min(settings.chunk_size, capacity),
        sink_size=split.sink_size,
        recent_size=split.recent_size,
        fused=settings.fused,
        head_counts=len({count for count in split.num_retrieval if count}),
        num_layers=config.num_layers,
        reaches=tuple(sorted(finite)),
        streams=min(split.num_retrieval) < config.num_kv_heads,
        selection=settings.selection,
        listed_pages=PageFormat(settings.kv_format, page_size, config.head_dim).pooled_pages(capacity),
        prefill=settings.prefill if settings.reads_sparsely(capacity) else None,
    )


def _items_beside_the_cache(settings: PlanSettings, attention: AttentionSpec, cache: CacheSpec) -> Iterator[PlanItem]:
    base_note = "libraries, measured" if settings.device_type == "cpu" else "CUDA context and libraries, measured"
    layers = activation_bytes(
        settings.config, attention.chunk_size, settings.itemsize, settings.weight_format,
        TOKEN_SLICES[settings.device_type], settings.fused, settings.product_copy,
    )  # fmt: skip
    yield PlanItem("weights", "device", settings.weight_bytes, settings.weight_format)
    yield PlanItem(
        "allocator rounding",
        "device",
        _rounding(settings, cache),
        "of weights, page index and digests" if cache.digest else "of weights and page index",
    )
    yield PlanItem("prefill scratch", "device", attention.scratch_bytes(), "dequantized pages")
    yield PlanItem("sparse prefill", "device", attention.sparse_bytes(), "scores and lists of pages")
    yield PlanItem("decode buffers", "device", attention.decode_bytes(), "and split results")
    yield PlanItem(
        "activations", "device", layers + attention.activation_bytes(), f"{attention.chunk_size:,}-token chunk"
    )
    yield PlanItem("small tensors", "device", _SMALL_TENSOR_BYTES[settings.device_type])
    logits = _LOGITS_BYTES_PER_TOKEN_ID + 4 * max(0, settings.marks - MARKS)  # a mark keeps those of its last token
    yield PlanItem("logits", "device", settings.config.vocab_size * logits, "and sampling")
    yield PlanItem("runtime base", "device", settings.base_bytes, base_note)
    yield PlanItem("server", "device", settings.server_bytes, "libraries, JSON answers")
    yield PlanItem("reserved", "device", settings.reserved_bytes, "taken already")


def _rounding(settings: PlanSettings, cache: CacheSpec) -> int:
    """What a GPU's allocator takes beyond the bytes of the tensors that there is one of in every layer. The few others
    lose less than 2 MiB each."""
    if settings.device_type != "cuda":
        return 0
    return settings.weight_rounding + rounding_bytes(cache.page_tensors)


def _cache_spec(
    settings: PlanSettings, capacity: int, *, device_share: float, most_pages: int | None = None
) -> CacheSpec:
    """Cache with `device_share` of each retrieval head's pages on the device, and at most `most_pages` a head."""
    page_format = PageFormat(settings.kv_format, settings.page_size, settings.config.head_dim)
    counts, reaches, selection = settings.split.num_retrieval, settings.split.retrieval_reaches, settings.selection
    pages = page_format.pooled_pages(capacity) if sum(counts) else 0
    keeping = settings.keeping_heads > 0
    on_device = int(pages * device_share) if keeping else pages
    if most_pages is not None:
        on_device = min(on_device, most_pages)
    digest = selection.digest_format(page_format) if selection and pages > selection.pages_of(pages) else None
    fetch_pages = hot_slots = 0
    if pages > on_device and settings.fused:
        most_fetched = max(2 * max(counts), FETCH_BYTES // page_format.payload_bytes)
        fetch_pages = min(2 * max(counts) * (pages - on_device), most_fetched)
        if settings.hot_bytes and digest is not None:
            hot_slots = min(pages, settings.hot_bytes // (settings.keeping_heads * page_format.payload_bytes))
    return CacheSpec(
        retrieval_heads=counts,
        num_kv_heads=settings.config.num_kv_heads,
        page_format=page_format,
        capacity=capacity,
        sink_size=settings.split.sink_size,
        recent_size=settings.split.recent_size,
        device_pages_per_head=on_device,
        fetch_pages=fetch_pages,
        reaches=reaches,
        marks=settings.marks,
        digest=digest,
        hot_slots=hot_slots,
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
