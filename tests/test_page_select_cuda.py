"""The CUDA kernels that score and choose pages, against the torch references: their own source on a CPU
(cuda_on_cpu.py), compiled where a compiler is found, and on a real GPU (`-m gpu`)."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import COMPILER, host_select
from page_views import scattered_view
from selected_pages import CASES, Case, check_choice, chosen_by_hand, make, poisoned_scores, random_scores

from longrun.errors import ConfigError
from longrun.kernels import cuda_module, page_select_cuda
from longrun.kernels.page_choose import Budget
from longrun.kernels.page_score import score_pages
from longrun.kernels.page_select_cuda import SOURCE, ChoiceWorkspace, CudaPageSelect, num_parts, score_defines
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat

FORMATS = [DigestFormat(64, dim, centre_bits=bits) for dim in (64, 128) for bits in (4, 8)]
SCALE = 0.3
TOLERANCE = 5e-5  # of the largest score: a query has 16 bits a channel
TINY = PageFormat("int4", 16, 16)  # choosing reads no page
on_cpu = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return {fmt: host_select(fmt, folder) for fmt in FORMATS}


@pytest.fixture(params=["ascending", "descending"])
def order(request, kernels):
    """Threads take turns in both orders: a barrier that is missing shows in one of them."""
    for kernel in kernels.values():
        kernel.set_descending(request.param == "descending")


def check_scores(kernel, case, given, view, digest):
    expected = poisoned_scores(view, case.group)
    score_pages(given, view, digest, lam=case.lam, softmax_scale=SCALE, out=expected)
    out = poisoned_scores(view, case.group)
    assert kernel.score_pages(given, view, digest, lam=case.lam, softmax_scale=SCALE, out=out) is out
    assert torch.equal(out.isnan(), expected.isnan())
    error, size = ((x.nan_to_num().abs().max().item()) for x in (out - expected, expected))
    assert error <= TOLERANCE * size, (error, size)


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(kernels, order, case):
    kernel = kernels[case.digest]
    q, view, digest = make(case)
    check_scores(kernel, case, q, view, digest)
    check_scores(kernel, case, q.bfloat16(), view, digest)


@on_cpu
@pytest.mark.parametrize(("stages", "warps", "splits"), [(2, 1, 1), (3, 2, 1), (4, 8, 2), (3, 4, 40)])
def test_scores_by_other_blocks(tmp_path, stages, warps, splits):
    """A warp with many tiles (page numbers stand in batches of 32), and more warps than tiles."""
    case = Case((130, 67, 0, 129), 4, 64, 8)
    kernel = host_select(case.digest, tmp_path, stages, warps, splits)
    check_scores(kernel, case, *make(case))


@on_cpu
def test_extreme_queries(kernels):
    """No query at all; one channel far above the others; codes at both ends."""
    case = Case((5, 0, 9), 3, 128, 8, skip=1, limit=7)
    q, view, digest = make(case)
    kernel = kernels[case.digest]
    check_scores(kernel, case, torch.zeros_like(q), view, digest)
    outlying = q.clone()
    outlying[..., 3] = -300
    check_scores(kernel, case, outlying, view, digest)
    check_scores(kernel, case, torch.full_like(q, 7), view, digest)
    centre = digest.unflatten(2, (4, -1))[..., : case.dim]
    for code in (127, 129):
        centre[:] = code
        check_scores(kernel, case, torch.full_like(q, 7), view, digest)


@on_cpu
def test_scores_do_not_depend_on_the_blocks(kernels, tmp_path):
    """The same bits however the list is cut: an entry's score is its own."""
    case = Case((37, 66), 4, 64)
    q, view, digest = make(case)
    found = []
    for kernel in (kernels[case.digest], host_select(case.digest, tmp_path, 2, 2, 5)):
        out = poisoned_scores(view, case.group)
        found.append(kernel.score_pages(q, view, digest, lam=0.5, softmax_scale=SCALE, out=out).nan_to_num())
    assert torch.equal(*found)


def choosing(kernel):
    """`choose_pages` with a workspace full of garbage."""

    def choose(scores, view, **how):
        space = ChoiceWorkspace.empty(*scores.shape, scores.device)
        for tensor in vars(space).values():
            tensor.view(torch.uint8).fill_(0x7F)
        kernel.choose_pages(scores, view, **how, workspace=space)

    return choose


LISTS = [
    ((40,), {}),
    ((0, 1, 63, 64, 131), {}),
    ((500, 2, 0, 333), {"skip": 3, "limit": 431}),
    ((33, 700, 33), {"shared": True}),
    ((0, 0), {}),
]


@on_cpu
@pytest.mark.parametrize(("pages", "newest"), [(1, 0), (1, 1), (7, 4), (64, 0), (300, 4), (800, 4)])
@pytest.mark.parametrize(("counts", "part"), LISTS, ids=str)
def test_choices(kernels, order, counts, part, pages, newest):
    view = scattered_view(TINY, counts, **part)
    choose = choosing(kernels[FORMATS[0]])
    for seed, (group, ties) in enumerate([(4, False), (3, True)]):
        check_choice(choose, view, random_scores(view, group, seed, ties), pages, newest)


@on_cpu
@pytest.mark.parametrize("share", [1, 33, 2500, 9_999, 10_000])
@pytest.mark.parametrize(("counts", "part"), LISTS, ids=str)
def test_choices_of_a_share(kernels, order, counts, part, share):
    view = scattered_view(TINY, counts, **part)
    check_choice(choosing(kernels[FORMATS[0]]), view, random_scores(view, 4), 5, 4, share=share)


@on_cpu
@pytest.mark.parametrize("seed", range(30))
def test_choices_of_random_lists(kernels, seed):
    kernels[FORMATS[0]].set_descending(seed % 2)
    check_random_lists(choosing(kernels[FORMATS[0]]), seed, 600, "cpu")


def check_random_lists(choose, seed, longest, device):
    g = torch.Generator().manual_seed(seed)
    drawn = lambda low, high, n=(): torch.randint(low, high + 1, n, generator=g).tolist()  # noqa: E731
    counts = drawn(0, longest, (3,))
    view = scattered_view(TINY, counts, skip=drawn(0, 3), limit=drawn(0, 2 * longest), device=device)
    pages = drawn(1, longest)
    scores = random_scores(view, drawn(1, 8), seed, seed % 3 == 0, spread=10.0 ** drawn(-4, 3))
    check_choice(choose, view, scores, pages, drawn(0, min(5, pages)), share=drawn(0, 10_000) * (seed % 2))


@on_cpu
def test_scores_that_are_hard_to_tell_apart(kernels):
    check_hard_scores(choosing(kernels[FORMATS[0]]), 1200, "cpu")


def check_hard_scores(choose, count, device):
    """All pages in one bin: equal ones, ones that differ in their last bits, zeros of both signs, far below the best,
    and rising or falling from page to page."""
    view = scattered_view(TINY, (count, count - 1), device=device)
    plain = torch.zeros(2, 2, count + 5, device=device)
    bits = torch.randint(0, 40, plain.shape, generator=torch.Generator().manual_seed(0)).to(device)
    near = (torch.full_like(plain, 3.0).view(torch.int32) + bits).view(torch.float32)
    far = near - 1000
    far[:, :, 17] = 0
    rising = torch.arange(count + 5, device=device).float().expand(2, 2, -1).contiguous() / 64
    signed = torch.where(bits % 2 == 0, 0.0, -0.0)
    for scores in (plain, near, far, rising, -rising, signed, signed * 1e-30, near * 1e4):
        for pages in (1, count // 2, count - 1):
            check_choice(choose, view, scores, pages, 1)


@on_cpu
def test_everything_at_once(kernels):
    """Scored and chosen by the kernels is what the references score and choose."""
    case = Case((300, 41), 4, 128)
    q, view, digest = make(case)
    kernel = kernels[case.digest]
    scores = poisoned_scores(view, 4)
    kernel.score_pages(q, view, digest, lam=0.25, softmax_scale=SCALE, out=scores)
    check_choice(choosing(kernel), view, scores, 40, 4)


@on_cpu
def test_a_list_longer_than_the_room_writes_nothing_beyond(kernels):
    case = CASES[4]
    q, view, digest = make(case)
    memory = torch.full((3 * 3 * 5 + 8,), torch.nan)
    out = memory[: 3 * 3 * 5].view(3, 3, 5)
    kernels[case.digest].score_pages(q, view, digest, lam=0.5, softmax_scale=1.0, out=out)
    assert memory[3 * 3 * 5 :].isnan().all() and not out[2].isnan().any()


def test_bytes_of_the_workspace():
    for shape in ((4, 4, 51_560), (1, 8, 1), (3, 5, 257)):
        space = ChoiceWorkspace.empty(*shape, torch.device("cpu"))
        assert sum(x.nbytes for x in vars(space).values()) == ChoiceWorkspace.bytes_for(*shape)
    assert [num_parts(n) for n in (0, 1, 256, 257, 10**6)] == [1, 1, 1, 2, 128]


@on_cpu
def test_shapes_without_a_kernel_are_refused(kernels):
    kernel, how = kernels[DigestFormat(64, 64)], {"lam": 0.5, "softmax_scale": 1.0}
    with pytest.raises(ConfigError, match="page_size 32"):
        page_select_cuda.check_digests(DigestFormat(32, 64))
    q, view, digest = make(Case((3,), 9, 64))
    scores = poisoned_scores(view, 9)
    with pytest.raises(ConfigError, match="9 query heads"):
        kernel.score_pages(q, view, digest, **how, out=scores)
    out = {"pages_out": torch.zeros(1, 3, dtype=torch.int32), "counts_out": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(ConfigError, match="9 query heads"):
        kernel.choose_pages(scores, view, budget=Budget(3), newest=0, **out)
    q, view, digest = make(Case((3,), 2, 64, 8))
    with pytest.raises(AssertionError, match="centre_bits=4"):  # of another format than the kernels'
        kernel.score_pages(q, view, digest, **how, out=poisoned_scores(view, 2))


def test_every_kernel_waits_for_those_before_it():
    """Before anything else: else it reads what they have not written yet, where kernels overlap."""
    bodies = re.findall(r'extern "C" __global__ [^{]*\{\s*(\S+)', SOURCE.read_text())
    assert bodies == ["after_earlier();"] * 5


def test_what_a_launch_says_lies_as_in_cuda_h():
    """CUlaunchAttribute and CUlaunchConfig on a 64-bit machine."""
    attribute, launch = cuda_module._Attribute, cuda_module._Launch
    assert (attribute.value.offset, ctypes.sizeof(attribute)) == (8, 72)
    offsets = [getattr(launch, name).offset for name, *_ in launch._fields_]
    assert (offsets, ctypes.sizeof(launch)) == ([0, 12, 24, 32, 40, 48], 56)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_cuda_kernels_compile(tmp_path, arch, fmt):
    defines = [f"-D{name}={value}" for name, value in score_defines(fmt, 3, 4).items()]
    command = ["nvcc", f"-arch={arch}", *defines, "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "-o", str(tmp_path / "k.cubin"), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores") == 5 and "warning" not in done.stderr


@pytest.fixture(scope="module")
def on_gpu():
    return {fmt: CudaPageSelect(fmt) for fmt in FORMATS}


LONG = [
    *(
        Case((500, 170, 0, 499), group, dim, bits, skip=3, lam=lam)
        for group, lam in ((1, 0.5), (4, 0), (4, 0.25), (7, 1.0))
        for dim, bits in ((64, 4), (64, 8), (128, 4), (128, 8))
    ),
    Case((5001,), 4, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_scores_on_gpu(on_gpu, case):
    kernel = on_gpu[case.digest]
    q, view, digest = make(case, "cuda")
    for given in (q, q.bfloat16()):
        check_scores(kernel, case, given, view, digest)


@pytest.mark.gpu
def test_choices_on_gpu(on_gpu):
    choose = choosing(on_gpu[FORMATS[0]])
    for counts, part in LISTS:
        view = scattered_view(TINY, counts, **part, device="cuda")
        for pages, newest in ((1, 0), (7, 4), (300, 4), (800, 4)):
            check_choice(choose, view, random_scores(view, 4, pages), pages, newest)
    for seed in range(40):
        check_random_lists(choose, seed, 30_000 if seed % 2 else 1000, "cuda")
    for count in (1200, 70_000):
        check_hard_scores(choose, count, "cuda")


@pytest.mark.gpu
def test_digests_past_2_to_31_bytes_on_gpu(on_gpu):
    case = Case((90, 91), 4, 128)
    fmt, far = case.digest, 2**31 // case.digest.page_bytes + 5
    q, view, small = make(case, "cuda")
    expected, out = poisoned_scores(view, 4), poisoned_scores(view, 4)
    score_pages(q, view, small, lam=0.5, softmax_scale=SCALE, out=expected)
    big = torch.full((2, far + small.shape[1], fmt.page_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    big[:, far:] = small
    on_gpu[fmt].score_pages(q, replace(view, pages=view.pages + far), big, lam=0.5, softmax_scale=SCALE, out=out)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.allclose(out, expected, 1e-4, 1e-3, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0, 1500])
def test_graph_replay_with_other_lists_on_gpu(on_gpu, share):
    case = Case((3000,) * 3, 4, 128, skip=2)
    kernel, space = on_gpu[case.digest], ChoiceWorkspace.empty(3, 4, 3010, torch.device("cuda"))
    q, view, digest = make(case, "cuda")
    scores = torch.empty(3, 4, 3010, device="cuda")
    found, counts = (torch.empty(*shape, dtype=torch.int32, device="cuda") for shape in ((3, 460), (3,)))

    def select():
        kernel.score_pages(q, view, digest, lam=0.25, softmax_scale=SCALE, out=scores)
        kernel.choose_pages(
            scores, view, budget=Budget(100, share), newest=4, pages_out=found, counts_out=counts, workspace=space
        )

    select()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select()
    for seed, lengths in enumerate(((3000, 3000, 3000), (0, 1, 2999), (101, 102, 103), (3000, 5, 700))):
        q.copy_(make(case, "cuda", seed)[0])
        view.counts.copy_(torch.tensor(lengths, dtype=torch.int32))
        for poisoned in (scores, found, counts, *vars(space).values()):
            poisoned.view(torch.uint8).fill_(0xFF)
        graph.replay()
        expected = torch.full_like(scores, torch.nan)
        score_pages(q, view, digest, lam=0.25, softmax_scale=SCALE, out=expected)
        assert torch.equal(scores.isnan(), expected.isnan())
        assert torch.allclose(scores, expected, 1e-4, 1e-3, equal_nan=True)
        for head, numbers in enumerate(chosen_by_hand(view, scores, 100, 4, share)):
            assert found[head, : int(counts[head])].tolist() == numbers
            assert (found[head, len(numbers) :] == -1).all()


@pytest.mark.gpu
def test_layers_that_overlap_choose_the_same_on_gpu(on_gpu):
    """Layers share scores and workspace, and a kernel begins before the one ahead of it has ended."""
    case = Case((2000, 1500, 1999, 64), 4, 128)
    layers = [make(case, "cuda", seed) for seed in range(6)]
    scores, space = torch.empty(4, 4, 2000, device="cuda"), ChoiceWorkspace.empty(4, 4, 2000, torch.device("cuda"))
    found, counts = (
        torch.empty(2, len(layers), *shape, dtype=torch.int32, device="cuda").fill_(-1) for shape in ((4, 64), (4,))
    )

    def select(kernel, which):
        for layer, (q, view, digest) in enumerate(layers):
            kernel.score_pages(q, view, digest, lam=0.25, softmax_scale=SCALE, out=scores)
            kernel.choose_pages(
                scores, view, budget=Budget(64), newest=4, pages_out=found[which, layer],
                counts_out=counts[which, layer], workspace=space,
            )  # fmt: skip

    select(CudaPageSelect(case.digest, overlap=False), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(on_gpu[case.digest], 1)
    for _ in range(50):
        found[1], counts[1] = -1, -1
        graph.replay()
        assert torch.equal(*found) and torch.equal(*counts)
    assert (counts == 64).all() and (found >= 0).all()
