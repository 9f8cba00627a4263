"""One to four tokens with the CPU's compiled kernels against plain torch: weight formats, families, page formats."""

import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.patterns.head_map import HeadMap
from longrun.quant.weight_format import WEIGHT_FORMATS

T = 150


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in ("llama", "qwen2", "qwen3"):
        made[family] = tmp_path_factory.mktemp(family)
        save_tiny(made[family], family)
    return made


def load(folder, weight_format, kv_format, compiled, **options):
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]  # mixed, all streaming, all retrieval
    head_map = HeadMap.from_scores(scores, sink_size=16, recent_size=48)
    return longrun.load(
        folder, "cpu", head_map, kv_format, weight_format, "cpu", ctx=T + 60, compiled_kernels=compiled, **options
    )


def logits(runtime, lengths):
    ids = torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    session = runtime.new_session()
    rows = [session.prefill(part) for part in ids.split(lengths)]
    session.cache.check()
    return torch.stack(rows)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_kernels_equal_torch(folders, weight_format, family, monkeypatch):
    """Few tokens from the first on, over page ends, ring ends and host pages."""
    lengths = [1] * 70 + [2, 3, 4, 5] * 3 + [1] * 20
    compiled = load(folders[family], weight_format, "fp32", True, device_share=0.5)
    linear, calls = compiled.parts.cpu_kernels.linear, []
    monkeypatch.setattr(linear, "_run", lambda call, run=linear._run: calls.append(call.tokens) or run(call))
    actual = logits(compiled, lengths)
    # A layer has four linears. Of several tokens only the last goes through the last layer's last three and lm_head.
    assert [calls.count(n) for n in (1, 2, 3, 4, 5)] == [90 * (3 * 4 + 1) + 12 * 4, 27, 27, 27, 0]
    expected = logits(load(folders[family], weight_format, "fp32", False, device_share=0.5), lengths)
    assert rms_ratio(actual, expected) < (0.03 if weight_format == "bf16" else 2e-5)


@pytest.mark.parametrize("kv_format", ["k5v3", "int4", "bf16"])
def test_page_formats(folders, kv_format):
    lengths = [3] + [1] * 140
    actual, expected = (
        logits(load(folders["llama"], "int4", kv_format, compiled), lengths) for compiled in (True, False)
    )
    assert rms_ratio(actual, expected) < 0.02  # a key between two steps may take either


def test_another_number_of_threads_changes_nothing(folders):
    runtime = load(folders["llama"], "int4", "k5v3", True)
    threads = torch.get_num_threads()
    lengths = [80] + [1] * 10
    expected = logits(runtime, lengths)
    ids = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(1))
    session = runtime.new_session()
    session.prefill(ids[:80])
    try:
        for i in range(10):
            torch.set_num_threads(1 + i % 2)
            session_logits = session.prefill(ids[80 + i : 81 + i])
            assert torch.equal(session_logits, expected[1 + i])
    finally:
        torch.set_num_threads(threads)
