"""Triton's kernels of sparse prefill: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

How the interpreted tests run: interpreted.py. They use float32 and float16, because the interpreter multiplies bfloat16
matrices as if they were integers.
"""

from functools import partial

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from streaming_kernels import stack_bytes
from tile_case import (
    NAN,
    PAGE,
    TOLERANCE,
    check_attend,
    check_choice,
    check_scores,
    every_entry,
    piece,
    queries,
    random_scores,
    rms_ratio,
)

from longrun.errors import ConfigError
from longrun.kernels.dense_attention import reference_attention_with_lse
from longrun.kernels.tile_attention import attend_tiles_reference, choose_tiles_reference, score_tiles_reference

pytest.importorskip("triton", reason="Triton is optional without a GPU")

import triton

from longrun.kernels.tile_attend import AttendConfig, attend_tiles_, attend_tiles_kernel
from longrun.kernels.tile_choose import choose_tiles
from longrun.kernels.tile_score import score_tiles, score_tiles_kernel

CONFIGS = {
    "one": AttendConfig(),
    "two": AttendConfig(pages=2),
    "described": AttendConfig(described=True),
    "parts": AttendConfig(block_m=32),
}
CHOICES = [(0.05, 3, 200, 2), (0.2, 0, 40, 0), (1e-3, 16, 25, 4), (0.0, 0, 5000, 0), (0.9, 7, 9, 9), (1.0, 0, 3, 3)]


def check_pieces(tokens, heads, group, dim, pieces, dtype, kernel, device="cpu"):
    """Every page listed, in pieces one after another from nothing: dense attention."""
    g, pages = torch.Generator(device).manual_seed(1), sum(pieces)
    q, (k, v) = queries(tokens, heads, group, dim, dtype, g, device), piece(heads, pages, dim, dtype, g, device)
    total = torch.full((heads, group, tokens, dim), NAN, device=device)
    lse = torch.full((heads, group, tokens), NAN, device=device)
    lse[:, :, ::3] = -torch.inf
    lists, counts = every_entry(heads, group, tokens, pages, device)
    first = 0
    for count in pieces:
        part = slice(first * PAGE, (first + count) * PAGE)
        kernel(q, k[:, part], v[:, part], lists, counts, first, total, lse, dim**-0.5)
        first += count
    k, v = (x.repeat_interleave(group, dim=0).float() for x in (k, v))
    expected = reference_attention_with_lse(q.float().flatten(0, 1), k, v, False, dim**-0.5)
    assert rms_ratio(total.flatten(0, 1), expected[0]) < TOLERANCE[dtype]
    assert rms_ratio(lse.flatten(0, 1), expected[1]) < TOLERANCE[dtype]


def check_long_list(kernel, dtype, device="cpu"):
    """A piece in the middle of a list of 3,000 entries, which is searched in two steps."""
    g = torch.Generator(device).manual_seed(1)
    q, (k, v) = queries(20, 1, 1, 64, dtype, g, device), piece(1, 4, 64, dtype, g, device)
    for count, first_page in ((3000, 2990), (3000, 4499), (3000, 8996), (1, 0), (1024, 1533), (1025, 3), (2500, 0)):
        lists = torch.full((1, 1, 1, 3100), -1, dtype=torch.int32, device=device)
        lists[..., :count] = torch.arange(0, 3 * count, 3, dtype=torch.int32)
        counts = torch.full((1, 1, 1), count, dtype=torch.int32, device=device)
        total, lse = torch.zeros(1, 1, 20, 64, device=device), torch.zeros(1, 1, 20, device=device)
        expected, expected_lse = total.clone(), lse.clone()
        attend_tiles_reference(q, k, v, lists, counts, first_page, expected, expected_lse, 0.125)
        kernel(q, k, v, lists, counts, first_page, total, lse, 0.125)
        assert expected.any() and rms_ratio(total, expected) < TOLERANCE[dtype], (count, first_page)
        assert rms_ratio(lse, expected_lse) < TOLERANCE[dtype]


if INTERPRETED:

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize(
        ("tokens", "heads", "group", "dim", "pages"), [(300, 2, 3, 64, 5), (129, 1, 4, 128, 4), (77, 1, 6, 64, 1)]
    )
    def test_interpreted_attention_to_lists(tokens, heads, group, dim, pages, config):
        check_attend(tokens, heads, group, dim, pages, torch.float32, partial(attend_tiles_, config=config))

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_interpreted_attention_in_float16(config):
        check_attend(200, 1, 4, 64, 5, torch.float16, partial(attend_tiles_, config=config), first_page=0)

    def test_interpreted_attention_with_the_default_config():
        check_attend(130, 1, 1, 128, 3, torch.float32, attend_tiles_)
        check_attend(130, 1, 1, 128, 3, torch.float16, attend_tiles_)

    @pytest.mark.parametrize("before", [-200.0, 90.0])
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_interpreted_attention_far_above_and_below_what_was_found_before(config, before):
        """Weights relative to what was found before overflow in the first case, and vanish in the second."""
        check_attend(150, 1, 3, 64, 4, torch.float32, partial(attend_tiles_, config=config), before=before)

    @pytest.mark.parametrize("pieces", [[6], [1, 3, 2]])
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_interpreted_attention_to_everything_is_dense(config, pieces):
        check_pieces(150, 1, 2, 64, pieces, torch.float32, partial(attend_tiles_, config=config))

    def test_interpreted_search_of_long_lists():
        check_long_list(attend_tiles_, torch.float32)

    @pytest.mark.parametrize(("rows", "heads", "dim", "pages"), [(1, 1, 64, 1), (150, 2, 128, 5), (33, 3, 64, 37)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_interpreted_scores(rows, heads, dim, pages, dtype):
        check_scores(rows, heads, dim, pages, dtype, score_tiles)

    def test_interpreted_scores_of_rows_of_another_dtype():
        check_scores(40, 1, 64, 3, torch.float16, score_tiles, rows_dtype=torch.float32)

    def test_interpreted_scores_are_clamped():
        rows, k = torch.ones(1, 2, 64), torch.ones(1, 128, 64)
        rows[0, 1] = -1.0
        scores = torch.full((1, 2, 2), NAN).half()
        score_tiles(rows, 1e4 * k, scores, 0, 0.125)
        assert scores.tolist() == [[[65504.0, 65504.0], [-65504.0, -65504.0]]]

    @pytest.mark.parametrize(("left", "floor", "cap", "newest"), CHOICES)
    @pytest.mark.parametrize(("rows", "entries"), [(1, 2500), (1, 3), (8, 301)])
    def test_interpreted_choices(rows, entries, left, floor, cap, newest):
        check_choice(3, rows, entries, left, floor, cap, newest, choose_tiles)

    def test_interpreted_choice_without_entries():
        check_choice(2, 1, 0, 0.1, 2, 5, 1, choose_tiles)

    def test_interpreted_choice_of_ties():
        """Many equal scores: the same entries are cut."""
        scores, own_lse = random_scores(3, 1, 3000)
        scores = scores.round()
        found = [torch.full((3, 100), -1, dtype=torch.int32) for _ in range(2)]
        for lists, kernel in zip(found, (choose_tiles, choose_tiles_reference), strict=True):
            counts, missed = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
            kernel(scores.clone(), own_lse, torch.full((3,), 0.01), 5, 100, 2, lists, counts, missed)
            assert counts.tolist() == [100] * 3
        assert torch.equal(*found)


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 60


@not_interpreted
def test_shapes_that_the_kernels_do_not_serve():
    q, k = torch.zeros(1, 1, 5, 32), torch.zeros(1, 64, 32)
    lists, lse = torch.zeros(1, 1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 5)
    with pytest.raises(ConfigError, match="head_dim 32 has no Triton kernels of sparse prefill"):
        attend_tiles_(q, k, k, lists, lists[..., 0], 0, torch.zeros_like(q), lse, 1.0)
    rows, k = torch.zeros(1, 3, 64), torch.zeros(1, 64, 64)
    with pytest.raises(ConfigError, match="page_size 32 has no Triton kernels of sparse prefill"):
        score_tiles(rows, k, torch.zeros(1, 3, 2).half(), 0, 1.0, 32)


def compiled(kernel, constants, capability, described, **options):
    """The kernel for a GPU that is not there, as a launch with aligned tensors would have it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    page = f"tensordesc<bf16[{PAGE}, {constants['HEAD_DIM']}]>"
    pointers = {"q": "*bf16", "rows": "*bf16", "scores": "*fp16", "lists": "*i32", "counts": "*i32"}
    pointers |= {"k": page, "v": page} if described else {"k": "*bf16", "v": "*bf16"}
    pointers |= {"total": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    names = list(types)
    even = [i for i, name in enumerate(names) if types[name][0] == "*" or "stride" in name]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, types, {(names.index(n),): x for n, x in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@not_interpreted
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("capability", "config", "shared"),
    [(80, AttendConfig(), 99 * 1024), (90, AttendConfig(num_stages=3, described=True), 227 * 1024)],
)
def test_attention_compiles_without_spilled_registers(tmp_path, dim, capability, config, shared):
    constants = {
        "HEAD_DIM": dim, "PAGE_SIZE": PAGE, "BLOCK_M": 128, "TILE": 128, "PAGES": 1, "DESCRIBED": config.described,
        "LIMIT": 2.0**90, "SEARCHED": 1024, "PRECISION": "tf32",
    }  # fmt: skip
    built = compiled(
        attend_tiles_kernel, constants, capability, config.described, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    assert stack_bytes(built, tmp_path) == 0 and built.metadata.shared <= shared
    assert ("wgmma" in built.asm["ptx"]) == (capability == 90)


@not_interpreted
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_scores_compile_without_spilled_registers(tmp_path, dim, capability):
    constants = {
        "HEAD_DIM": dim, "PAGE_SIZE": PAGE, "BLOCK_M": 128, "STRETCH": 32, "DESCRIBED": capability == 90,
        "PRECISION": "tf32",
    }  # fmt: skip
    built = compiled(score_tiles_kernel, constants, capability, capability == 90, num_warps=4, num_stages=4)
    assert stack_bytes(built, tmp_path) == 0 and built.metadata.shared <= 99 * 1024


GPU_CONFIGS = CONFIGS | {"wide": AttendConfig(num_stages=3, described=True), "narrow": AttendConfig(num_warps=4)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", GPU_CONFIGS.values(), ids=GPU_CONFIGS)
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "pages"),
    [(300, 2, 3, 64, 5), (1000, 3, 4, 128, 70), (129, 1, 1, 128, 4), (77, 1, 6, 64, 1)],
)
def test_attention_to_lists_on_the_gpu(tokens, heads, group, dim, pages, config, dtype):
    for before in (3.0, -200.0, 90.0):
        kernel = partial(attend_tiles_, config=config)
        check_attend(tokens, heads, group, dim, pages, dtype, kernel, device="cuda", before=before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_default_attention_on_the_gpu(dim, dtype):
    check_attend(700, 2, 4, dim, 40, dtype, attend_tiles_, device="cuda")
    for pieces in ([6], [1, 3, 2]):
        check_pieces(300, 2, 3, dim, pieces, dtype, attend_tiles_, "cuda")
    check_long_list(attend_tiles_, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "heads", "dim", "pages"), [(1, 1, 64, 1), (150, 2, 128, 5), (1025, 3, 64, 137)])
def test_scores_on_the_gpu(rows, heads, dim, pages, dtype):
    check_scores(rows, heads, dim, pages, dtype, score_tiles, device="cuda")
    check_scores(rows, heads, dim, pages, dtype, score_tiles, torch.float32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("left", "floor", "cap", "newest"), CHOICES)
@pytest.mark.parametrize(("rows", "entries"), [(1, 15_625), (1, 3), (2, 1024), (4, 701), (8, 5001)])
def test_choices_on_the_gpu(rows, entries, left, floor, cap, newest):
    floor, cap = min(floor, entries + 9), min(cap, entries + 9)
    check_choice(64, rows, entries, left, floor, cap, newest, choose_tiles, "cuda")


@pytest.mark.gpu
def test_scores_and_choices_beyond_two_billion_scores():
    """Scores of the last rows, and the last tiles' lists, stand beyond 2^31 elements."""
    entries, num_rows = 2**21, 600
    scores = torch.empty(2, num_rows, entries, dtype=torch.float16, device="cuda").fill_(-20.0)
    g = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(2, num_rows, 128, generator=g, device="cuda").bfloat16()
    k = torch.randn(2, 3 * PAGE, 128, generator=g, device="cuda").bfloat16()
    score_tiles(rows, k, scores, entries - 3, 0.3)
    expected = torch.empty(2, num_rows, 3, dtype=torch.float16, device="cuda")
    score_tiles_reference(rows, k, expected, 0, 0.3)
    assert (scores[:, :, -3:].float() - expected.float()).abs().max() < 0.05
    assert (scores[:, :, -4] == -20).all()
    scores = scores.view(2 * num_rows, 1, entries)
    tiles, cap = len(scores), 50
    lists = torch.full((tiles, cap), -1, dtype=torch.int32, device="cuda")
    counts, missed = torch.zeros(tiles, dtype=torch.int32, device="cuda"), torch.zeros(tiles, device="cuda")
    own = torch.zeros(tiles, 1, device="cuda")
    choose_tiles(scores, own, torch.full_like(missed, 1e-3), 5, cap, 1, lists, counts, missed)
    last = [x[-1:].clone() for x in (lists, counts, missed)]
    choose_tiles_reference(scores[-1:], own[-1:], torch.full_like(missed[-1:], 1e-3), 5, cap, 1, *last)
    assert torch.equal(last[0], lists[-1:]) and torch.equal(last[1], counts[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize("config", GPU_CONFIGS.values(), ids=GPU_CONFIGS)
def test_attention_to_scratch_beyond_two_billion_elements(config):
    scratch = torch.empty(2, 3, 9 * 2**20, 128, dtype=torch.bfloat16, device="cuda")
    assert 2 * scratch.stride(1) > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    near = torch.randn(2, 3, 4 * PAGE, 128, generator=g, device="cuda").bfloat16()
    k, v = scratch[:, :, -4 * PAGE :]
    k.copy_(near[0])
    v.copy_(near[1])
    q = queries(200, 3, 2, 128, torch.bfloat16, g, "cuda")
    total, lse = torch.zeros(3, 2, 200, 128, device="cuda"), torch.zeros(3, 2, 200, device="cuda")
    expected, expected_lse = total.clone(), lse.clone()
    lists, counts = every_entry(3, 2, 200, 4, "cuda")
    attend_tiles_(q, k, v, lists, counts, 0, total, lse, 0.1, config=config)
    attend_tiles_reference(q, *near, lists, counts, 0, expected, expected_lse, 0.1)
    assert rms_ratio(total[2], expected[2]) < TOLERANCE[torch.bfloat16]
    assert rms_ratio(lse[2], expected_lse[2]) < TOLERANCE[torch.bfloat16]
