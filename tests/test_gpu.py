"""The torch path on a real GPU: `pytest -m gpu`. Collected only where there is one."""

import pytest
import torch
from tiny_models import tiny_model

import longrun
from longrun.kernels.dense_attention import attention_with_lse, reference_attention_with_lse
from longrun.patterns.head_map import HeadMap

pytestmark = pytest.mark.gpu


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len", "causal"), [(123, 123, True), (128, 1000, False), (1, 77, False)])
def test_attention_with_lse(dtype, tolerance, head_dim, q_len, kv_len, causal):
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(3, q_len, head_dim, device="cuda", dtype=dtype, generator=g)
    k, v = torch.randn(2, 3, kv_len, head_dim, device="cuda", dtype=dtype, generator=g)
    out, lse = attention_with_lse(q, k, v, causal, head_dim**-0.5)
    expected, expected_lse = reference_attention_with_lse(q, k, v, causal, head_dim**-0.5)
    assert rms_ratio(out, expected) < tolerance
    assert lse.shape == expected_lse.shape
    assert rms_ratio(lse, expected_lse) < tolerance


@pytest.mark.parametrize("kv", ["int4", "bf16", "fp32"])
def test_runtime_on_the_gpu_agrees_with_the_cpu(tmp_path, kv):
    tiny_model("llama", head_dim=16).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))
    head_map = HeadMap.from_scores([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], sink_size=16, recent_size=48)
    rows = {}
    for device in ("cpu", "cuda"):
        runtime = longrun.load(
            tmp_path, budget="cpu" if device == "cpu" else "rtx4090-24g", head_map=head_map, kv_format=kv,
            weight_format="fp32", device=device, ctx=400, device_share=0.5, chunk_size=64, retrieval_ratio=0.5,
        )  # fmt: skip
        session = runtime.new_session()
        session.prefill(ids[:200])
        assert session.cache_bytes == runtime.plan.cache_bytes
        rows[device] = session.score(ids[200:]).cpu()
        session.cache.check()
        rows[device, "tokens"] = list(session.generate(8, eos=False))
    assert rms_ratio(rows["cuda"], rows["cpu"]) < 5e-3
    assert rows["cuda", "tokens"] == rows["cpu", "tokens"]
