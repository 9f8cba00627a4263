"""Where selecting pages begins to save time: arithmetic over measured kernels, without torch.

A step that selects scores every page by its digest, chooses, and then reads few pages; one that reads all does nothing
else. What choosing costs in every layer must be saved first, so that short texts are read whole. The figures are a data
sheet's and the kernels', never the ones that this machine measured: a plan says the same everywhere.
"""

from __future__ import annotations

from bisect import bisect_left

from longrun.machine.speeds import DATA_SHEETS, Speeds
from longrun.specs.cache_spec import CacheSpec
from longrun.specs.selection_spec import NEVER, Selection
from longrun.units import MAX_TOKENS

# On a GPU: scoring and choosing take so long in a layer, and read its digests at this share of a copy's speed
# (docs/results/h200-select-kernels.json); attention reads pages at that one (h200-kernels.json).
SELECT_LAYER_SECONDS = 21e-6
_DIGESTS, _PAGES = 0.74, 0.87
LINK = 0.92  # of a copy's speed, pages read from host memory

# On a CPU: what scoring a page takes of the time of attending to it (docs/results/cpu-selected-decode-64k-*.json).
CPU_SCORE = 0.41


def data_sheet(budget_source: str) -> Speeds:
    """Of the GPU that a budget is named after, else an H100's."""
    kind = next((kind for kind in DATA_SHEETS if kind.lower() in budget_source.lower()), "H100")
    return DATA_SHEETS[kind]


def select_seconds(cache: CacheSpec, num_pages: int, memory_gb_s: float) -> float:
    """Seconds that a GPU takes to score and choose among `num_pages` pages of all heads."""
    assert cache.digest is not None
    layers = sum(count > 0 for count in cache.retrieval_heads)
    return layers * SELECT_LAYER_SECONDS + num_pages * cache.digest.page_bytes / (_DIGESTS * memory_gb_s * 1e9)


def crossover_pages(cache: CacheSpec, selection: Selection, device_type: str, speeds: Speeds) -> int:
    """Pages that a head which keeps every token must hold for a step that selects to take no longer than one that reads
    all; `NEVER` where that does not come.

    Args:
        cache: with digests. Which of its pages stand on the host counts; beyond its capacity the others are taken to
            stand on the device.
        selection: which selects at any length.
        speeds: of the memory and the link, on a GPU.
    """
    fmt = cache.page_format
    most = MAX_TOKENS // fmt.page_size

    def gains(num_pages: int) -> bool:
        seq_len = (num_pages + fmt.sink_pages) * fmt.page_size + 1
        assert fmt.pooled_pages(seq_len) == num_pages
        held, read = cache.held_pages(seq_len), cache.read_pages(seq_len, selection)
        if device_type == "cpu":
            return read + CPU_SCORE * held <= held
        choosing = select_seconds(cache, held, speeds.memory_gb_s)
        away = cache.keeping_heads * max(0, min(num_pages, cache.pages_per_head) - cache.device_pages_per_head)

        def seconds(pages: int) -> tuple[float, float]:
            link = away * pages / max(1, held) * fmt.payload_bytes / (LINK * speeds.link_gb_s * 1e9)
            return pages * fmt.page_bytes / (_PAGES * speeds.memory_gb_s * 1e9), link

        (few, few_link), (every, every_link) = seconds(read), seconds(held)
        return few + choosing + few_link <= max(every, every_link)  # only all pages are fetched ahead of their layer

    found = bisect_left(range(most + 1), True, key=gains)
    return found if found <= most else NEVER
