"""The runtime on a real GPU: `pytest -m gpu`. Collected only where there is one."""

import gc

import pytest
import torch
from tiny_models import save_tiny, tiny_model

import longrun
from longrun.attention.torch_backend import TorchAttention
from longrun.engine.decode_graph import DecodeGraph
from longrun.errors import PlanError
from longrun.kernels.dense_attention import attention_with_lse, reference_attention_with_lse
from longrun.patterns.head_map import HeadMap
from longrun.plan.budget import Budget
from longrun.quant.kv_format import QUANTIZED_KV_FORMATS

pytestmark = pytest.mark.gpu

SHAPE = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 320}
SCORES = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "kv_len", "causal"),
    [(3, 3, 123, 123, True), (3, 3, 128, 1000, False), (3, 3, 1, 77, False), (8, 2, 123, 123, True)],
)
def test_attention_with_lse(dtype, tolerance, head_dim, heads, kv_heads, q_len, kv_len, causal):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(heads, q_len, head_dim, device="cuda", dtype=dtype, generator=g)
    k, v = torch.randn(2, kv_heads, kv_len, head_dim, device="cuda", dtype=dtype, generator=g)
    out, lse = attention_with_lse(q, k, v, causal, head_dim**-0.5)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
    expected, expected_lse = reference_attention_with_lse(q, k, v, causal, head_dim**-0.5)
    assert rms_ratio(out, expected) < tolerance
    assert lse.shape == expected_lse.shape
    assert rms_ratio(lse, expected_lse) < tolerance


def load(folder, device, kv="int4", weights="fp32", device_share=0.5, **changes):
    head_map = HeadMap.from_scores(SCORES, sink_size=16, recent_size=48)
    settings = {"chunk_size": 100, "ctx": 900, "retrieval_ratio": 0.5, "device_share": device_share, **changes}
    settings.setdefault("budget", "cpu" if device == "cpu" else "rtx4090-24g")
    return longrun.load(folder, head_map=head_map, kv_format=kv, weight_format=weights, device=device, **settings)


def rounded_as_on_the_gpu(run):
    """`TorchAttention.run` with queries rounded to float16 and keys moved by a float32 rounding or so."""
    noise = torch.Generator().manual_seed(0)

    def rounded(self, layer_idx, q, k, v, step):
        q.copy_(q.half())
        k.mul_(1 + 1e-6 * torch.randn(k.shape, generator=noise))
        return run(self, layer_idx, q, k, v, step)

    return rounded


@pytest.mark.parametrize("device_share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kv", ["int4", "k5v3", "bf16", "fp32"])
def test_runtime_on_the_gpu_agrees_with_the_cpu(tmp_path, monkeypatch, kv, family, device_share):
    """Prefill in chunks, a token at a time over page borders, offloaded pages, rewinding: logits and tokens. q and p
    enter the tensor cores as float16, the tiny models are peaked, and a rounding the other way is a nibble: how far
    such roundings alone move INT4 rows, the CPU shows."""
    if kv not in QUANTIZED_KV_FORMATS and (family != "llama" or device_share == 1.0):
        pytest.skip("the exact formats share the torch path of the CPU")
    tiny_model(family, **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (600,), generator=torch.Generator().manual_seed(1))
    rows = {}
    for name in ("cpu", "cuda") if kv not in QUANTIZED_KV_FORMATS else ("cpu", "cuda", "rounded"):
        device = "cuda" if name == "cuda" else "cpu"
        if name == "rounded":
            monkeypatch.setattr(TorchAttention, "run", rounded_as_on_the_gpu(TorchAttention.run))
        runtime = load(tmp_path, device, kv, device_share=device_share)
        session = runtime.new_session()
        assert isinstance(session._engine.decode_step, DecodeGraph) == (device == "cuda" and kv in QUANTIZED_KV_FORMATS)
        session.prefill(ids[:350])
        assert session.cache_bytes == runtime.plan.cache_bytes
        mark = session.mark()
        found = [session.prefill(token).cpu() for token in ids[350:500].split(1)]
        session.rewind(mark)
        found += [session.prefill(token).cpu() for token in ids[350:450].split(1)]
        found += list(session.score(ids[450:]).cpu())
        session.cache.check()
        rows[name] = torch.stack(found)
        assert len(list(session.generate(100, eos=False))) == 100
        session.cache.check()
    tolerance = 5e-3 if kv not in QUANTIZED_KV_FORMATS else max(5e-3, 1.5 * rms_ratio(rows["rounded"], rows["cpu"]))
    assert tolerance < 5e-2
    assert rms_ratio(rows["cuda"], rows["cpu"]) < tolerance
    assert (rows["cuda"].argmax(-1) == rows["cpu"].argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize("device_share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(("kv", "head_dim"), [("int4", 64), ("k5v3", 128)])
def test_digests_are_those_of_the_stored_pages(tmp_path, kv, head_dim, device_share):
    """Pages from prefill and from decode, straight to the host and spilled, rewound, saved and loaded: `check` computes
    every digest again, in torch."""
    shape = {"head_dim": head_dim, "hidden_size": 6 * head_dim, "intermediate_size": 320, "num_attention_heads": 6}
    save_tiny(tmp_path / "model", "llama", **shape, max_position_embeddings=2048)
    budget = Budget.load("rtx4090-24g").override(pages_per_head=5, select_from=0)
    runtime = load(tmp_path / "model", "cuda", kv, device_share=device_share, budget=budget)
    ids = torch.randint(0, 97, (700,), generator=torch.Generator().manual_seed(1))
    session = runtime.new_session()
    session.prefill(ids[:350])
    assert session.cache_bytes == runtime.plan.cache_bytes
    mark = session.mark()
    session.prefill(ids[350:500], one_by_one=True)
    session.cache.check()
    session.prefill(ids[500:])
    session.cache.check()
    session.rewind(mark)
    session.prefill(ids[400:700])
    session.cache.check()
    session.save(tmp_path / "s")
    again = runtime.load_session(tmp_path / "s")
    again.cache.check()
    for (pages, _), (other, _) in zip(session.cache.layers, again.cache.layers, strict=True):
        if pages is not None:
            assert pages.num_pooled == 9 and pages.digest.any()
            assert torch.equal(pages.digest[:, :9], other.digest[:, :9])


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4", "int4"])
def test_weight_formats_decode_as_they_prefill(tmp_path, weights):
    """One path reads packed weights, the other dequantizes them. How far bf16 rounding alone puts decode and prefill
    apart on a tiny, peaked model, plain torch shows: the kernels may not be worse."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(2))
    apart = {}
    for compiled in (True, False):
        runtime = load(tmp_path, "cuda", weights=weights, chunk_size=400, compiled_kernels=compiled)
        session = runtime.new_session()
        session.prefill(ids[:300])
        mark = session.mark()
        at_once = session.score(ids[300:]).cpu()
        session.rewind(mark)
        one_by_one = torch.stack([session.prefill(token).cpu() for token in ids[300:-1].split(1)])
        apart[compiled] = rms_ratio(one_by_one, at_once[1:])
    assert apart[True] < 1.25 * apart[False]


def test_sampling_on_the_gpu_repeats_with_a_seed(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    session = load(tmp_path, "cuda").new_session()
    session.prefill(torch.arange(80))
    mark = session.mark()
    answers = []
    for _ in range(2):
        session.rewind(mark)
        answers.append(
            list(session.generate(40, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3, eos=False))
        )
    assert answers[0] == answers[1]


def test_nothing_grows_after_the_session_is_made(tmp_path):
    """Once a session exists, prefill, decode, rewinding and saving take no more memory from the driver."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    session = load(tmp_path, "cuda", weights="bf16", ctx=100_000, chunk_size=8192).new_session()
    before = torch.cuda.memory_reserved()
    ids = torch.randint(0, 97, (40_000,), generator=torch.Generator().manual_seed(3))
    session.prefill(ids)
    mark = session.mark()
    list(session.generate(70, eos=False))
    session.rewind(mark)
    session.save(tmp_path / "session")
    session.prefill(ids[:5000])
    assert torch.cuda.memory_reserved() == before


def test_memory_that_another_process_holds_is_refused(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.empty(torch.cuda.mem_get_info()[0] - 5 * 10**9, dtype=torch.uint8, device="cuda")
    with pytest.raises(PlanError, match=r"of GPU memory, and .* are free, as .* are taken already"):
        load(tmp_path, "cuda", ctx=40_000_000)
    del held
    torch.cuda.empty_cache()


def test_a_saved_session_goes_on_with_the_same_tokens(tmp_path):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path / "model")
    runtime = load(tmp_path / "model", "cuda", device_share=0.3)
    session = runtime.new_session()
    session.prefill(torch.randint(0, 97, (500,), generator=torch.Generator().manual_seed(4)))
    list(session.generate(10, eos=False))
    session.save(tmp_path / "saved")
    expected = list(session.generate(80, eos=False))
    del session
    gc.collect()
    assert list(runtime.load_session(tmp_path / "saved").generate(80, eos=False)) == expected
