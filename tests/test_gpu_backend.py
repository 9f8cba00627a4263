"""The GPU backend's own logic over the torch references of its kernels, against the torch backend; on any machine."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_model

pytest.importorskip("triton", reason="the GPU backend needs Triton, which is optional without a GPU")

from longrun.attention import prefill
from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError
from longrun.kernels import gpu_kernels
from longrun.kernels.cuda_module import CudaUnavailable
from longrun.kernels.gpu_kernels import reference_kernels
from longrun.model.checkpoint import load_decoder
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.plan.plan import make_plan
from longrun.runtime import backend
from longrun.runtime.backend import Parts, build_engine
from longrun.specs.reach import ALL_TOKENS

CTX = 700
TOLERANCE = 5e-3
SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 192}
SCORES = {
    "mixed": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
    "full": [[1.0] * 3] * 3,
    "streaming": [[0.0] * 3] * 3,
}


ONE_BY_ONE = (*[1] * 13, 41, *[1] * 16, 50, *[1] * 12, 49)
"""From token 439: one by one where a tail becomes a page, at 448, 512 and 576, and in chunks between."""


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def engines(
    folder,
    scores="mixed",
    device_share=1.0,
    chunk_size=100,
    kernels=None,
    kv="int4",
    select=None,
    select_from=0,
    **changes,
):
    """The fused engine over reference kernels, and the plain torch one, of the same checkpoint and split."""
    config = ModelConfig.from_dir(folder)
    head_map = HeadMap.from_scores(SCORES[scores], sink_size=16, recent_size=48)
    split = head_map.split(threshold=0.5)
    budget = Budget.load("rtx4090-24g").override(
        kv_format=kv,
        weight_format="fp32",
        chunk_size=chunk_size,
        pages_per_head=select,
        select_from=None if select is None else select_from,
    )
    permutation = [split.permutation(layer_idx) for layer_idx in range(config.num_layers)]
    rotary = RotaryTable(RopeParameters.from_dir(folder), config.head_dim)
    found = []
    for fused in (True, False):
        plan = make_plan(config, budget, CTX, split=split, device_share=device_share, gpu_kernels=fused)
        assert plan.attention.fused == fused
        used = (kernels or reference_kernels()) if fused else None
        decoder = load_decoder(folder, config, permutation, "fp32", "cpu", 64, used)
        if changes:
            cache = dataclasses.replace(plan.cache, **changes)
            plan = dataclasses.replace(plan, cache=cache)
        found.append(build_engine(Parts(decoder, rotary, rotary, None, used), plan))
    return found


def run_both(pair, ids, pieces):
    """Logits after every piece, from both engines; the caches are accounted for each time."""
    rows = ([], [])
    for engine, found in zip(pair, rows, strict=True):
        for piece in ids.split(pieces):
            found.append(engine.run(piece)[-1])
        engine.cache.check()
        assert engine.cache.seq_len == len(ids)
    return [torch.stack(found) for found in rows]


def apart_by_rounding(pair, plain, ids, pieces):
    """RMS ratio between the plain engine's logits and the same with keys moved by a float32 rounding or so, the
    largest of three. A rounding that falls the other way is a nibble, the tiny models are peaked, and where one falls
    depends on the processor."""
    engine, found = pair[1], []
    run = engine.attention.run
    for seed in range(3):
        noise = torch.Generator().manual_seed(seed)
        engine.cache.rewind(pair[2])

        def moved(layer_idx, q, k, v, step, noise=noise):
            k.mul_(1 + 1e-6 * torch.randn(k.shape, generator=noise))
            return run(layer_idx, q, k, v, step)

        engine.attention.run = moved
        found.append(rms_ratio(torch.stack([engine.run(piece)[-1] for piece in ids.split(pieces)]), plain))
    engine.attention.run = run
    return max(found)


def check_agreement(pair, ids, pieces):
    """Both engines give the same logits, but for what rounding alone does."""
    pair = (*pair, pair[1].cache.mark())
    fused, plain = run_both(pair[:2], ids, pieces)
    apart = rms_ratio(fused, plain)
    assert apart < TOLERANCE or apart < min(apart_by_rounding(pair, plain, ids, pieces), 8 * TOLERANCE)


@pytest.mark.parametrize(
    ("scores", "device_share", "kv"),
    [(scores, share, "int4") for scores in SCORES for share in (1.0, 0.4, 0.0)] + [("mixed", 0.4, "k5v3")],
)
def test_prefill_and_decode_agree_with_the_torch_backend(tmp_path, scores, device_share, kv):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (620,), generator=torch.Generator().manual_seed(1))
    pieces = [250, 1, 1, 64, 123, *ONE_BY_ONE]
    check_agreement(engines(tmp_path, scores, device_share, kv=kv), ids, pieces)


@pytest.mark.parametrize("device_share", [1.0, 0.4])
@pytest.mark.parametrize("kv", ["int4", "k5v3"])
def test_heads_of_finite_reach(tmp_path, device_share, kv):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (660,), generator=torch.Generator().manual_seed(9))
    pair = engines(tmp_path, "mixed", device_share, kv=kv, reaches=((ALL_TOKENS, 200), (130,), ()))
    held = pair[0].cache.layers[1][0]
    check_agreement(pair, ids, [250, 1, 1, 64, 123, *ONE_BY_ONE, 40])
    assert held.num_pages() < held.num_pooled


def test_pages_of_any_position_may_stand_on_the_host(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (600,), generator=torch.Generator().manual_seed(10))
    moved, plain = (engines(tmp_path, "full", 0.4, fetch_pages=12)[0] for _ in range(2))
    run_both((moved, plain), ids[:420], [380, 20, *[1] * 20])
    for pages, _ in moved.cache.layers:
        for head, (away, back) in enumerate((([2, 3], [0]), ([4], [1]), ([3], [0]))):
            pages.places.move(head, away, to_host=True)
            pages.places.move(head, back, to_host=False)
    pieces = [1] * 10 + [12] + [1] * 8 + [90] + [1] * 10 + [45] + [1] * 5  # pages are added and leave meanwhile
    found = [torch.stack([engine.run(piece)[-1] for piece in ids[420:].split(pieces)]) for engine in (moved, plain)]
    moved.cache.check()
    assert rms_ratio(*found) < TOLERANCE


@pytest.mark.parametrize(("family", "rope"), [("qwen2", "default"), ("qwen3", "default"), ("llama", "dynamic")])
def test_families(tmp_path, family, rope):
    tiny_model(family, rope, **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (330,), generator=torch.Generator().manual_seed(2))
    check_agreement(engines(tmp_path), ids, [130, *[1] * 70, 60, *[1] * 5, 50, *[1] * 15])


@pytest.mark.parametrize("scores", ["mixed", "full"])
@pytest.mark.parametrize(("dim", "num_qo_heads"), [(64, 3), (128, 9), (16, 12)])
def test_shapes_of_heads_that_are_rotated(tmp_path, scores, dim, num_qo_heads):
    """Groups of one, three and four; a head_dim that is a square and one that is not."""
    sizes = {"hidden_size": 64 * num_qo_heads, "intermediate_size": 192}
    tiny_model("llama", head_dim=dim, num_attention_heads=num_qo_heads, **sizes).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(6))
    pair = engines(tmp_path, scores)
    fused, plain = run_both(pair, ids, [200, 40, *[1] * 20, 50, *[1] * 20, 50, *[1] * 20])
    assert (
        rms_ratio(fused, plain) < 8 * TOLERANCE
    )  # wide heads are more peaked; a key's rounding depends on the product
    held = [engine.cache.layers[0][0].sink_k.float() for engine in pair]
    assert rms_ratio(*held) < TOLERANCE  # and the same keys stand in both caches


def test_a_backend_that_forgets_to_rotate_is_noticed(tmp_path):
    """In prefill or in decode: the tests above would see it."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (330,), generator=torch.Generator().manual_seed(7))
    for name, kv in (("_rotation", "int4"), ("_signs", "int4"), ("_rotates_values", "k5v3")):
        pair = engines(tmp_path, kv=kv)
        attention = pair[0].attention
        setattr(attention if name == "_rotation" else attention.decode, name, None)
        fused, plain = run_both(pair, ids, [200, *[1] * 20, 35, *[1] * 15, 60])
        assert rms_ratio(fused, plain) > 20 * TOLERANCE, name


def test_many_rounds_of_fetched_pages(tmp_path):
    """Two pages a head and round: the pages of a layer come in several rounds, through both halves of the buffer."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (640,), generator=torch.Generator().manual_seed(3))
    pair = engines(tmp_path, "full", 0.1, fetch_pages=12)
    decode = pair[0].attention.decode
    assert len(decode._host_parts(0, pair[0].cache.layers[0][0])) > 2
    check_agreement(pair, ids, [400, *[1] * 10, 35, *[1] * 5, 120, *[1] * 10, 50, *[1] * 10])


def test_a_chunk_in_a_full_ones_shape_gives_the_same(tmp_path, monkeypatch):
    """Rows of padding stand behind the last token and are seen by nobody; q, k and v are given in that shape."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (260,), generator=torch.Generator().manual_seed(8))
    pair = engines(tmp_path)
    attention, lengths = pair[0].attention, []
    attention._prefill_pages._pads_chunks = True
    monkeypatch.setattr(prefill, "padded_rows", lambda heads, q_len, head_dim, start, chunk_size: chunk_size)
    dense = attention._prefill_pages._kernels.dense_attention

    def watched(q, k, v, causal, softmax_scale, plan_uses):
        lengths.append(q.shape[1])
        assert not causal or k.shape[1] == v.shape[1] == q.shape[1]
        return dense(q, k, v, causal, softmax_scale, plan_uses)

    paged = attention._prefill_pages
    paged._kernels = dataclasses.replace(paged._kernels, dense_attention=watched)
    check_agreement(pair, ids, [100, 63, 1, 96])
    assert set(lengths) == {100, 2 * 100}  # over the past the group's queries stand in one row


def test_one_token_at_a_time_from_an_empty_cache(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(4))
    check_agreement(engines(tmp_path, device_share=0.5), ids, [1] * 200)


def test_rewinding_over_a_flushed_tail(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (260,), generator=torch.Generator().manual_seed(5))
    fused, _ = engines(tmp_path, device_share=0.4)
    fused.run(ids[:190])
    mark = fused.cache.mark()
    first = torch.stack([fused.run(token)[-1] for token in ids[190:].split([1] * 6 + [55] + [1] * 9)])
    fused.cache.rewind(mark)
    fused.cache.check()
    again = torch.stack([fused.run(token)[-1] for token in ids[190:].split([1] * 6 + [55] + [1] * 9)])
    assert torch.equal(first, again)


def test_a_kernel_that_does_not_compile_is_named(tmp_path, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from longrun.kernels import ring_decode

    def fail(*args, **kwargs):
        raise OutOfResources(300_000, 232_448, "shared memory")

    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    broken = dataclasses.replace(reference_kernels(), ring_decode=ring_decode.ring_decode)
    monkeypatch.setattr(ring_decode, "check_ring_decode", fail)
    message = r"GPU kernel ring_decode cannot .*shared memory.*bf16"
    with pytest.raises(ConfigError, match=message), backend._naming_kernels():
        engines(tmp_path, kernels=broken)[0].run(torch.arange(1))


def test_nvrtc_missing_is_one_sentence(monkeypatch):
    def unavailable(head_dim, kv_format):
        raise CudaUnavailable("libnvrtc.so.13 was not found")

    monkeypatch.setattr(gpu_kernels, "CudaPageDecode", unavailable)
    with pytest.raises(ConfigError, match=r"k5v3 decode kernel .*libnvrtc.so.13 was not found.*kv_format bf16"):
        gpu_kernels.load_gpu_kernels(128, "k5v3")


def test_decode_buffers_are_planned(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    fused, plain = engines(tmp_path, device_share=0.4)
    assert plain.attention.spec.decode_bytes() == 0
    assert 4 * fused.attention.spec.fetch_table_pages == fused.attention.decode._fetcher.nbytes > 0
