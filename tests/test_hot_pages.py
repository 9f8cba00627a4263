"""Host pages that were chosen lately: which page gets which slot, against a plain model of it, by the reference, by the
CUDA kernels' own source on a CPU (cuda_on_cpu.py), and on a GPU (`-m gpu`)."""

from collections import OrderedDict
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_on_cpu import COMPILER, host_hot_pages
from page_views import UNREAD, random_pages

from longrun.kernels import hot_pages
from longrun.kernels.cuda_module import CudaUnavailable, compile_source
from longrun.kernels.hot_pages import HotPages
from longrun.kernels.hot_pages_cuda import MOST_SLOTS, SOURCE, CudaHotPages, defines_of
from longrun.kernels.page_view import PageView, decode_attention
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import encode_pages

OTHER_SLOT = 100_000
on_cpu = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Trace:
    """Steps that choose pages: heads with slots and without, slots of each, pages in all, the most that are chosen.

    Attributes:
        kept: share of the pages that the next step chooses again.
        dim: head_dim, and with it the bytes of a page.
    """

    hot_heads: int
    cold_heads: int
    slots: int
    pages: int
    most: int
    kept: float = 0.6
    dim: int = 64
    steps: int = 12

    def __str__(self) -> str:
        return "-".join(str(x) for x in vars(self).values())


TRACES = [
    Trace(1, 0, 1, 4, 1, kept=0),
    Trace(2, 1, 5, 9, 5),
    Trace(3, 0, 33, 40, 7),
    Trace(1, 0, 64, 200, 64, kept=0.9),
    Trace(2, 0, 65, 150, 65, kept=0),
    Trace(4, 2, 150, 300, 130, dim=128, steps=8),
    Trace(2, 0, 40, 30, 20),  # room for every page
    Trace(35, 0, 9, 30, 8, steps=4),  # more heads than lanes
]


class Cache:
    """Pages in two memories, and steps of a trace over them, which move pages and give them other contents.

    Args:
        real: pages that attention can read; otherwise any bytes.
    """

    def __init__(self, trace: Trace, device="cpu", seed=0, real=False) -> None:
        self.trace, self.device, self.real, self.seed, self.g = (
            trace,
            device,
            real,
            seed,
            torch.Generator().manual_seed(seed),
        )
        self.heads, self.fmt = trace.hot_heads + trace.cold_heads, PageFormat("k5v3", 64, trace.dim)
        count = self.heads * trace.pages
        self.payload, index = self.contents(trace.pages)
        self.places = torch.randperm(count, generator=self.g).view(self.heads, trace.pages)
        self.on_host = torch.rand(self.heads, trace.pages, generator=self.g) < 0.7
        self.on_host[trace.hot_heads :] = False
        self.storage, other = torch.full((2, count, self.fmt.payload_bytes), 0xAA, dtype=torch.uint8)
        self.storage = self.storage.to(device)
        self.other = other.pin_memory() if device == "cuda" else other
        self.table = torch.full((self.heads, trace.pages + 3), UNREAD, dtype=torch.int32, device=device)[:, 1:-2]
        self.lists = torch.full((self.heads, trace.most + 6), UNREAD, dtype=torch.int32, device=device)
        zeros = torch.zeros(self.heads, dtype=torch.int32, device=device)
        self.view = PageView(
            self.storage, self.table, index.to(device), self.lists[:, 2:-1], zeros + 1, zeros.clone(), zeros.clone(),
            self.fmt, other=self.other, other_slot=OTHER_SLOT, skip=1, limit=trace.most,
        )  # fmt: skip
        self.chosen = [[] for _ in range(self.heads)]
        self.write()

    def contents(self, pages: int):
        """Payload and index of so many pages a head."""
        if self.real:
            return encode_pages(*random_pages(self.heads, pages, self.fmt, self.seed), self.fmt)
        g = torch.Generator().manual_seed(self.seed)
        payload = torch.randint(0, 256, (self.heads, pages, self.fmt.payload_bytes), dtype=torch.uint8, generator=g)
        return payload, torch.full((self.heads, pages, 2, self.fmt.head_dim), torch.nan, dtype=torch.float16)

    def write(self) -> None:
        """Bring memories and table up to date."""
        pages = self.payload.flatten(0, 1)
        self.storage[self.places.flatten()] = pages.to(self.device)
        self.other[self.places.flatten()] = pages
        table = torch.where(self.on_host, self.places + OTHER_SLOT, self.places)
        self.table.copy_(table)

    def write_others(self, first: int) -> None:
        """Give the pages from `first` on another content."""
        self.seed += 1
        self.payload[:, first:] = self.contents(self.trace.pages - first)[0]
        self.write()

    def step(self) -> list[list[int]]:
        """Choose pages: some of the last step's, some others; ascending."""
        trace = self.trace
        for head, last in enumerate(self.chosen):
            count = int(torch.randint(0, trace.most + 1, (1,), generator=self.g)) if trace.most > 1 else 1
            order = torch.randperm(trace.pages, generator=self.g).tolist()
            kept = last[: int(trace.kept * count)]
            self.chosen[head] = sorted((kept + [p for p in order if p not in kept])[:count])
            self.lists.fill_(UNREAD) if head == 0 else None
            self.lists[head, 4 : 4 + count] = torch.tensor(self.chosen[head], dtype=torch.int32)
            self.view.counts[head] = count + self.view.skip
        return self.chosen

    def change(self, hot: HotPages) -> list[int]:
        """Sometimes pages move, and sometimes the last ones get another content; returns the pages that did."""
        trace, lot = self.trace, int(torch.randint(0, 4, (1,), generator=self.g))
        if lot == 0:
            moved = torch.rand(self.on_host.shape, generator=self.g) < 0.2
            moved[trace.hot_heads :] = False
            self.on_host ^= moved
            self.write()
        if lot == 1:
            first = int(torch.randint(0, trace.pages, (1,), generator=self.g))
            self.write_others(first)
            hot.table[:, first:] = -1
            return list(range(first, trace.pages))
        return []


def empty_hot(trace: Trace, view: PageView, room=2) -> HotPages:
    """Nothing in it, and garbage wherever nothing is meant."""
    device, heads = view.table.device, view.num_heads
    order = torch.arange(trace.slots, dtype=torch.int32, device=device).repeat(trace.hot_heads, 1)
    full = lambda *shape: torch.full(shape, UNREAD, dtype=torch.int32, device=device)  # noqa: E731
    memory = torch.full((trace.hot_heads * trace.slots, view.fmt.payload_bytes), 0xBB, dtype=torch.uint8)
    table = full(heads, view.table.shape[1] + 3)[:, 2:-1].fill_(-1)
    return HotPages(
        memory.to(device), table, order, torch.full_like(order, -1), full(heads, trace.most + room, 2), full(heads, 2)
    )


class Lru:
    """One head's slots by plain words: an ordered dictionary of what stands in which slot, the longest unused first. A
    slot that was never used, or whose page is gone, keeps its place in the order under a name of its own."""

    def __init__(self, slots: int) -> None:
        self.slot_of = OrderedDict((f"empty {slot}", slot) for slot in range(slots))

    def gone(self, pages) -> None:
        self.slot_of = OrderedDict((f"gone {s}" if p in pages else p, s) for p, s in self.slot_of.items())

    def step(self, pages) -> list[int]:
        """The pages that were missed."""
        missed = [page for page in pages if page not in self.slot_of]
        for page in pages:
            if page in self.slot_of:
                self.slot_of.move_to_end(page)
        freed = [self.slot_of.popitem(last=False)[1] for _ in missed]
        self.slot_of.update(zip(missed, freed, strict=True))
        for page in pages:
            self.slot_of.move_to_end(page)
        return missed


def check_trace(kernel, trace: Trace, device="cpu", seed=0) -> None:
    """Every step: order, slots and fetches are the model's, what is read is the page, the rest is left alone."""
    cache = Cache(trace, device, seed)
    hot = empty_hot(trace, cache.view)
    models = [Lru(trace.slots) for _ in range(trace.hot_heads)]
    hits = 0
    for _ in range(trace.steps):
        for head, gone in enumerate([cache.change(hot)] * trace.hot_heads):
            models[head].gone(gone)
        chosen, before = cache.step(), HotPages(*(tensor.clone() for tensor in vars(hot).values()))
        kernel.hot_lookup(cache.view, hot)
        assert torch.equal(hot.memory, before.memory)
        kernel.hot_fetch(cache.view, hot)
        expected = before.memory.clone()
        for head, pages in enumerate(chosen):
            host = [page for page in pages if cache.on_host[head, page]]
            missed = []
            if head < trace.hot_heads:
                models[head].gone(set(pages) - set(host))
                missed = models[head].step(host)
                slot_of = models[head].slot_of
                assert hot.order[head].tolist() == list(slot_of.values())
                for page in host:
                    expected[head * trace.slots + slot_of[page]] = cache.payload[head, page].to(device)
                    assert hot.table[head, page] == OTHER_SLOT + head * trace.slots + slot_of[page]
            assert hot.counts[head].tolist() == [len(host), len(missed)]
            hits += len(host) - len(missed)
            resident = [page for page in pages if page not in host]
            assert torch.equal(hot.table[head, resident], cache.table[head, resident])
            rest = [p for p in range(trace.pages) if p not in pages]
            same = hot.table[head, rest] == before.table[head, rest]
            assert (same | (hot.table[head, rest] == -1)).all()
            assert torch.equal(hot.missed[head, len(missed) :], before.missed[head, len(missed) :])
        assert torch.equal(hot.memory, expected)
    assert hits or trace.kept == 0


class Reference:
    hot_lookup, hot_fetch = staticmethod(hot_pages.hot_lookup), staticmethod(hot_pages.hot_fetch)


@pytest.mark.parametrize("trace", TRACES, ids=str)
def test_the_reference(trace):
    for seed in range(3):
        check_trace(Reference, trace, seed=seed)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    sizes = {dim: PageFormat("k5v3", 64, dim).payload_bytes for dim in (64, 128)}
    return {(dim, n): host_hot_pages(size, folder, n) for dim, size in sizes.items() for n in (32, 64, 512)}


@on_cpu
@pytest.mark.parametrize("descending", [0, 1])
@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("trace", TRACES, ids=str)
def test_the_kernels(kernels, trace, threads, descending):
    """Lists and orders of one round of the block's threads and of several; threads take turns in both orders."""
    kernel = kernels[trace.dim, threads]
    kernel.set_descending(descending)
    check_trace(kernel, trace, seed=descending)


@on_cpu
@pytest.mark.parametrize("seed", range(16))
def test_the_kernels_on_random_traces(kernels, seed):
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    g = torch.Generator().manual_seed(seed)
    most = draw(1, 100)
    trace = Trace(draw(1, 3), draw(0, 1), draw(most, 200), draw(most, 220), most, draw(0, 9) / 10, steps=10)
    kernel = kernels[64, (32, 64, 64, 512)[seed % 4]]
    kernel.set_descending(seed % 2)
    check_trace(kernel, trace, seed=seed)


@on_cpu
@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_blocks_that_fetch(tmp_path, blocks):
    """Fewer than pages, and more."""
    check_trace(host_hot_pages(PageFormat("k5v3", 64, 64).payload_bytes, tmp_path, 64, blocks), TRACES[2])


def answers(kernel, trace, device="cpu"):
    """Attention over the same steps, with each number of slots and with none."""
    found = []
    for slots in (None, trace.most, 2 * trace.most + 1, trace.pages + 7):
        cache, outs = Cache(trace, device, seed=5, real=True), []
        hot = None if slots is None else empty_hot(replace(trace, slots=slots), cache.view)
        q = torch.randn(trace.steps, cache.heads, 2, trace.dim, generator=torch.Generator().manual_seed(6)).to(device)
        for step in range(trace.steps):
            cache.change(hot or empty_hot(trace, cache.view))
            cache.step()
            view = cache.view
            if hot is not None:
                kernel.hot_lookup(view, hot)
                kernel.hot_fetch(view, hot)
                view = view.fetched(hot.memory, hot.table)
            outs += [x.flatten() for x in decode_attention(q[step], view, None)]
        found.append(torch.cat(outs))
    return found


def test_no_number_of_slots_changes_an_answer():
    plain, *others = answers(Reference, Trace(2, 1, 9, 30, 9))
    assert not plain.isnan().any() and plain.isfinite().any() and all(torch.equal(plain, other) for other in others)


def test_a_page_with_another_content_must_be_forgotten():
    """The trace's own check: without it attention reads what the page was."""
    cache = Cache(Trace(1, 0, 8, 8, 8))
    hot = empty_hot(cache.trace, cache.view)
    cache.on_host[:] = True
    cache.write()
    cache.step()
    while not cache.chosen[0]:
        cache.step()
    for forgotten in (False, True):
        Reference.hot_lookup(cache.view, hot)
        Reference.hot_fetch(cache.view, hot)
        page = cache.chosen[0][0]
        row = hot.memory[hot.table[0, page] - OTHER_SLOT]
        assert torch.equal(row, cache.payload[0, page])
        cache.write_others(0)
        hot.table[:] = -1 if forgotten else hot.table
        Reference.hot_lookup(cache.view, hot)
        Reference.hot_fetch(cache.view, hot)
        row = hot.memory[hot.table[0, page] - OTHER_SLOT]
        assert torch.equal(row, cache.payload[0, page]) == forgotten
        hot.table[:] = -1


def test_lists_longer_than_the_slots_are_refused():
    cache = Cache(TRACES[1])
    hot = empty_hot(replace(TRACES[1], slots=4), cache.view)
    for call in (Reference.hot_lookup, Reference.hot_fetch):
        with pytest.raises(AssertionError, match="lists of 5 pages, 4 slots"):
            call(cache.view, hot)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_source_compiles(dim, arch):
    try:
        compile_source(SOURCE.read_text(), arch, defines_of(PageFormat("k5v3", 64, dim).payload_bytes))
    except CudaUnavailable as error:
        if "was not found" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("trace", [*TRACES, Trace(4, 1, 700, 990, 512, dim=128, steps=20)], ids=str)
def test_on_the_gpu(trace):
    kernel = CudaHotPages(PageFormat("k5v3", 64, trace.dim).payload_bytes)
    for seed in range(3):
        check_trace(kernel, trace, "cuda", seed)
    assert trace.slots <= MOST_SLOTS


@pytest.mark.gpu
def test_a_captured_graph_reads_the_lists_when_it_runs():
    trace = Trace(3, 0, 40, 60, 20, steps=9)
    cache, kernel = Cache(trace, "cuda"), CudaHotPages(PageFormat("k5v3", 64, 64).payload_bytes)
    hot, expected = empty_hot(trace, cache.view), empty_hot(trace, cache.view)
    cache.step()

    def run(kernel, hot):
        kernel.hot_lookup(cache.view, hot)
        kernel.hot_fetch(cache.view, hot)

    run(kernel, hot)
    run(Reference, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(kernel, hot)
    for _ in range(trace.steps):
        cache.step()
        graph.replay()
        run(Reference, expected)
        for name in ("memory", "table", "order", "owner", "counts"):
            assert torch.equal(getattr(hot, name), getattr(expected, name)), name
