"""Documents read sparsely on a real GPU: `pytest -m gpu`. Collected only where there is one."""

import gc
from dataclasses import replace

import pytest
import torch
from sparse_case import ALL, DIM, make, random_tokens, read, rms_ratio, spied
from tiny_models import save_tiny

import longrun
from longrun.kernels.gpu_kernels import load_gpu_kernels, reference_kernels
from longrun.specs.prefill_spec import PrefillSpec
from longrun.specs.reach import ALL_TOKENS

pytestmark = pytest.mark.gpu

CHUNKS = [(1300, False), (1024, True), (700, True), (1200, True)]
LENGTH = sum(size for size, _ in CHUNKS)
FEW = PrefillSpec(mass=0.8, newest=2, floor=4, least=0.1, cap=0.5)
SHAPE = {
    "kv": "k5v3", "page_size": 64, "device": "cuda", "scratch": 1024,
    "reaches": ((ALL_TOKENS,) * 3, (ALL_TOKENS, 500)),
}  # fmt: skip


def on_gpu(tokens, dtype):
    return [x.to("cuda", dtype) for x in tokens]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("device_share", [1.0, 0.4, 0.0])
def test_everything_chosen_is_dense_attention(dtype, tolerance, device_share):
    tokens, shape = on_gpu(random_tokens(LENGTH, 2), dtype), {**SHAPE, "dtype": dtype, "device_share": device_share}
    kernels = load_gpu_kernels(DIM, "k5v3")
    out = read(make("cuda", ALL, LENGTH, kernels=kernels, **shape), *tokens, CHUNKS)
    dense = read(make("cuda", None, LENGTH, kernels=kernels, **shape), *tokens, [(size, False) for size, _ in CHUNKS])
    assert rms_ratio(out, dense) < tolerance


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("device_share", [1.0, 0.4])
def test_the_choice_is_that_of_the_references(device_share, rows, correct):
    """But for pages whose shares a rounding moves over the threshold."""
    tokens = on_gpu(random_tokens(LENGTH, 2), torch.bfloat16)
    shape = {**SHAPE, "dtype": torch.bfloat16, "device_share": device_share}
    kernels, references = load_gpu_kernels(DIM, "k5v3"), reference_kernels()
    plain = replace(
        kernels, score_tiles=references.score_tiles, choose_tiles=references.choose_tiles,
        attend_tiles_=references.attend_tiles_,
    )  # fmt: skip
    outs, choices = [], []
    for used in (kernels, plain):
        attention = make("cuda", replace(FEW, rows=rows, correct=correct), LENGTH, kernels=used, **shape)
        chosen = spied(attention)
        outs.append(read(attention, *tokens, CHUNKS))
        choices.append([set(row) for _, _, lists, _ in chosen for row in lists])
    other = [len(a ^ b) for a, b in zip(*choices, strict=True)]
    assert sum(other) <= 0.02 * sum(map(len, choices[0]))
    assert rms_ratio(outs[0], outs[1]) < 3e-2


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("device_share", [1.0, 0.4])
def test_nothing_waits_for_the_device(device_share, correct):
    tokens = on_gpu(random_tokens(LENGTH, 2), torch.bfloat16)
    spec = replace(FEW, correct=correct)
    shape = {**SHAPE, "dtype": torch.bfloat16, "device_share": device_share}
    attention = make("cuda", spec, LENGTH, kernels=load_gpu_kernels(DIM, "k5v3"), **shape)
    attend, calls = attention.sparse.attend_, []

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        calls.append(args[0])

    attention.sparse.attend_ = watched
    read(attention, *tokens, CHUNKS)
    assert calls == [0, 1] * 3


@pytest.mark.parametrize("correct", [False, True])
def test_nothing_grows_after_the_session_is_made(tmp_path, correct):
    """Once a session exists, reading sparsely takes no more memory from the driver."""
    save_tiny(tmp_path, "llama", head_dim=64, hidden_size=192, intermediate_size=320)
    gc.collect()
    torch.cuda.empty_cache()
    spec = PrefillSpec(dense_tokens=0, correct=correct)
    runtime = longrun.load(
        tmp_path, "rtx4090-24g", "full", weight_format="bf16", device="cuda", device_share=0.5, ctx=100_000,
        chunk_size=8192, prefill=spec,
    )  # fmt: skip
    session = runtime.new_session()
    before = torch.cuda.memory_reserved()
    ids = torch.randint(0, 97, (60_000,), generator=torch.Generator().manual_seed(3))
    session.prefill(ids)
    assert session.sparse_tokens > 40_000 and 0 < session.prefill_counts.read_share < 0.5
    list(session.generate(20, eos=False))
    session.prefill(ids[:20_000])
    assert torch.cuda.memory_reserved() == before
