"""Simulated KV formats: our own against the real codec, errors by hand, bytes, and rows of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny

import longrun
from longrun.errors import InputError, SessionError
from longrun.lab.planted import make_planted_model
from longrun.lab.quality.formats import SIMULATED_FORMATS, simulated_format
from longrun.lab.quality.measures import cache_bytes, open_session
from longrun.lab.quality.row import Row
from longrun.lab.quality.settings import read_rows
from longrun.lab.quality.simulation import simulate_pages
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.rotation import hadamard_rotation, key_rotation
from scripts.quality import compare

ROOT = Path(__file__).resolve().parents[1]
OWN, PLAIN, FIVE = "sim:k4-channel-rot/v4", "sim:k4-channel/v4", "sim:k5-channel-rot/v3-rot"
PAGE, DIM = 64, 64


def random_pages(seed: int = 0, outliers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, 3, 64, 64]; `outliers` channels of the keys lie 30 times as far from zero."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 3, PAGE, DIM, generator=generator) for _ in range(2))
    k[..., 5 : 5 + outliers] = 30 + 3 * k[..., 5 : 5 + outliers]
    return k, v


def simulated(name: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = simulated_format(name)
    return simulate_pages(k, v, fmt, hadamard_rotation(k.shape[-1], 0) if fmt.rotates else None)


def errors(name: str, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """Root mean square of the errors of keys and values."""
    dk, dv = simulated(name, k, v)
    return (dk - k).square().mean().sqrt().item(), (dv - v).square().mean().sqrt().item()


@pytest.mark.parametrize("dim", [16, 64])  # squares: the simulation's rotation is the pages' own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_format_is_what_the_page_codec_gives_back(dtype, dim):
    k, v = (x[..., :dim].to(dtype) for x in random_pages(outliers=2))
    v[0, 0, 3] = 0.25  # a group without a range
    fmt = PageFormat("int4", PAGE, dim)
    for_queries, for_keys = key_rotation(dim)
    stored, real_v = decode_pages(*encode_pages(k.float() @ for_keys, v, fmt), fmt)
    own_k, own_v = simulated(OWN, k, v)
    assert torch.equal(own_k, stored @ for_queries.T) and torch.equal(own_v, real_v)
    five = PageFormat("k5v3", PAGE, dim)
    stored = decode_pages(*encode_pages(k.float() @ for_keys, v.float() @ for_keys, five), five)
    for own, real in zip(simulated(FIVE, k, v), stored, strict=True):
        assert torch.equal(own, real @ for_queries.T)
    for own, real in zip(simulated(PLAIN, k, v), decode_pages(*encode_pages(k, v, fmt), fmt), strict=True):
        assert torch.equal(own, real)
    assert not torch.equal(simulated("sim:k4-token/v4", k, v)[0], simulated(PLAIN, k, v)[0])
    assert not torch.equal(own_k, simulated(PLAIN, k, v)[0])


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (5, 31), (4, 15), (3, 7), (2, 3)])
def test_the_error_is_that_of_a_uniform_grid(bits, levels):
    """Rounding to steps of s leaves s / sqrt(12); of n uniform numbers the range is (n - 1) / (n + 1)."""
    x = torch.rand(40, PAGE, DIM, generator=torch.Generator().manual_seed(1))
    expected = (PAGE - 1) / (PAGE + 1) / levels / math.sqrt(12)
    for keys in ("channel", "token"):
        # the two ends of every group are met exactly
        assert errors(f"sim:k{bits}-{keys}/v4", x, x)[0] == pytest.approx(expected, rel=0.05)
    if bits <= 4:
        assert errors(f"sim:k4-channel/v{bits}", x, x)[1] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("keys", ["channel", "token", "channel-rot", "token-rot"])
def test_fewer_bits_cost_more(keys):
    k, v = random_pages()
    found = [errors(f"sim:k{bits}-{keys}/v{bits}", k, v) for bits in (4, 3, 2)]
    for four, three, two in zip(*found, strict=True):  # steps grow by 15 / 7 and 7 / 3
        assert 1.8 < three / four < 2.5 and 1.8 < two / three < 2.7


def test_rotation_is_for_outlier_channels_and_tokens_of_one_scale():
    k, v = random_pages(outliers=2)
    plain, rotated = errors("sim:k4-token/v4", k, v)[0], errors("sim:k4-token-rot/v4", k, v)[0]
    assert rotated < 0.7 * plain
    assert errors(PLAIN, k, v)[0] < 0.5 * rotated  # a channel's own scale is better still
    normal, _ = random_pages()
    assert errors("sim:k4-token-rot/v4", normal, v)[0] > 0.9 * errors("sim:k4-token/v4", normal, v)[0]
    v[..., 9] *= 20
    assert errors("sim:k4-channel/v4-rot", k, v)[1] < 0.7 * errors(PLAIN, k, v)[1]
    assert errors("sim:k4-channel/v4-rot", k, v)[0] == errors(PLAIN, k, v)[0]  # keys are left alone


def test_undoing_the_rotation_equals_rotating_the_queries():
    """Scores from keys quantized in the rotated space, by hand, against those of the simulated keys."""
    k, v = random_pages(outliers=2)
    rotation = hadamard_rotation(DIM, 0)
    assert torch.allclose(rotation @ rotation.T, torch.eye(DIM), atol=1e-6)
    assert torch.equal(rotation.abs(), torch.full((DIM, DIM), DIM**-0.5))
    assert not torch.equal(rotation, hadamard_rotation(DIM, 1))
    q = torch.randn(2, 3, 7, DIM, generator=torch.Generator().manual_seed(4))
    in_rotated_space, _ = simulated("sim:k4-token/v4", k @ rotation, v)
    expected = (q @ rotation) @ in_rotated_space.transpose(-1, -2)
    found = q @ simulated("sim:k4-token-rot/v4", k, v)[0].transpose(-1, -2)
    assert torch.allclose(found, expected, atol=2e-3)
    assert not torch.allclose(found, q @ k.transpose(-1, -2), atol=0.1)


def test_bytes_by_hand():
    own = simulated_format(OWN)
    assert own.page_bytes(64, 128) == PageFormat("int4", 64, 128).page_bytes == 8960
    assert simulated_format("sim:k4-token/v4").page_bytes(64, 128) == 4096 + 4096 + 256 + 256
    assert simulated_format("sim:k3-channel-rot/v2-rot").page_bytes(64, 128) == 3072 + 2048 + 512 + 256
    equal = [simulated_format(f"sim:{name}").page_bytes(64, 128) for name in ("k4-channel/v4", "k5-channel-rot/v3-rot")]
    assert equal[0] == equal[1]
    described = simulated_format("sim:k4-channel/v2").described(64, 128, 256)
    assert described["bytes_per_token"] == 256 * (4096 + 2048 + 512 + 256) / 64
    assert "computed" in described["bytes_are"]


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ("sim:k4-chanel/v4", r"row a: simulated format 'sim:k4-chanel/v4' is unknown: .*\(nearest: sim:k4-channel/v4"),
        ("sim:k6-token/v4", "nearest: sim:k[85432]-token/v4"),
        ("sim:int4", "'sim:int4' is unknown"),
        ("int5", r"kv 'int5' is unknown: .*\(nearest: int4"),
        ("k4-channel/v4", "nearest: sim:k4-channel/v4"),
    ],
)
def test_unknown_formats_are_named(kv, said):
    with pytest.raises(InputError, match=said):
        Row("a", kv=kv)


def test_names_are_read_as_they_are_written():
    assert len(SIMULATED_FORMATS) == len(set(SIMULATED_FORMATS)) == 5 * 2 * 2 * 3 * 2
    assert all(simulated_format(name).name == name for name in SIMULATED_FORMATS)
    row = Row("a", kv="sim:k3-token-rot/v2")
    assert (row.stored_kv, row.method) == ("bf16", "full, sim:k3-token-rot/v2")
    fmt = row.simulates
    assert (fmt.key_bits, fmt.keys_per, fmt.rotate_keys, fmt.value_bits, fmt.rotate_values) == (3, "token", True, 2, 0)
    assert Row("a").simulates is None and Row("a").stored_kv == "k5v3"
    with pytest.raises(InputError, match="evicting caches hold exact tokens"):
        Row("a", kv=OWN, eviction="tova:5")


def test_the_shipped_rows_can_be_read():
    rows = {row.kv: row for row in read_rows(ROOT / "scripts" / "quality" / "compare_formats.toml")}
    assert {"int4", OWN, PLAIN, "sim:k4-token/v4", "sim:k4-token-rot/v4"} <= rows.keys()
    assert {"sim:k4-channel-rot/v3", "sim:k4-channel-rot/v2", "sim:k3-channel-rot/v4"} <= rows.keys()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "llama", head_dim=64)
    return folder


def load(folder, kv, head_map="full"):
    return longrun.load(folder, "cpu", head_map, kv, device="cpu", ctx=600, chunk_size=150, compiled_kernels=False)


IDS = torch.randint(0, 97, (420,), generator=torch.Generator().manual_seed(5)).tolist()


def test_sessions_answer_as_the_real_pages_do_and_count_their_bytes(tiny):
    """Prefill in chunks, single tokens and a rewind: the same pages, up to bf16, as the cache of INT4 pages."""
    logits, sessions = {}, {}
    runtimes = {name: load(tiny, name) for name in ("int4", "k5v3", "bf16")}
    runtimes |= dict.fromkeys((OWN, PLAIN, FIVE, "sim:k2-token/v2"), runtimes["bf16"])
    for name, runtime in runtimes.items():
        session = sessions[name] = open_session(runtime, Row("a", kv=name), 560)
        session.prefill(IDS[:330])
        mark = session.mark()
        session.prefill(IDS[::-1][:100])
        session.rewind(mark)
        for token in IDS[330:400]:
            session.prefill([token])
        logits[name] = session.score(IDS[400:])
    differences = {name: (found - logits["bf16"]).norm().item() for name, found in logits.items()}
    assert differences["sim:k2-token/v2"] > 2 * differences[OWN] > 0
    # a rounding of a key to bf16 that falls the other way is a nibble, and now and then it does
    assert (logits[OWN] - logits["int4"]).norm() < 0.5 * differences["int4"] < (logits[PLAIN] - logits["int4"]).norm()
    assert (logits[FIVE] - logits["k5v3"]).norm() < 0.5 * differences["k5v3"]
    for (real, _), (own, _) in zip(sessions["int4"].cache.layers, sessions[OWN].cache.layers, strict=True):
        assert own.num_pooled == real.num_pooled + 1 == 6
    # layer 0 sees the same inputs in both: its values are equal to the last bit of bf16, its keys but for rounding to
    # bf16 before the rotation or after it, the sink page exact
    real, own, exact = (sessions[name].cache.layers[0][0] for name in ("int4", OWN, "bf16"))
    k, v = decode_pages(real.places.read(slice(None), np.arange(5)), real.index[:, :5], real.fmt)
    back = key_rotation(real.fmt.head_dim)[0].T
    dk, dv = decode_pages(own.places.read(slice(None), np.arange(6)), None, own.fmt)
    plain, _ = decode_pages(exact.places.read(slice(None), np.arange(6)), None, own.fmt)
    assert (dk[:, 1:] - k @ back).norm() < 0.5 * (dk - plain).norm() and torch.equal(dv[:, 1:], v.bfloat16().float())
    assert torch.equal(dk[:, 0], plain[:, 0]) and torch.equal(dv[:, 0], real.sink_v.float())
    assert (dk[:, 0] - real.sink_k.float() @ back).norm() < 4e-3 * dk[:, 0].norm()
    found = cache_bytes(sessions[OWN].cache, simulated_format(OWN))
    assert (
        found["computed"] == cache_bytes(sessions["int4"].cache)["used"] == cache_bytes(sessions["k5v3"].cache)["used"]
    )
    assert found["used"] == cache_bytes(sessions["bf16"].cache)["used"] > 2 * found["computed"]
    with pytest.raises(SessionError, match=f"simulate {OWN}"):
        sessions[OWN].save("nowhere")


def test_streaming_heads_stay_exact(tiny):
    row = Row("a", "random:0", 0.5, kv=OWN, sink_size=8, recent_size=64)
    head_map = row.make_map(3, 3)
    sessions = []
    for kv in ("int4", "bf16"):
        runtime = longrun.load(
            tiny, "cpu", head_map, kv, device="cpu", ctx=600, retrieval_ratio=0.5, compiled_kernels=False
        )  # fmt: skip
        sessions.append(open_session(runtime, row if kv == "bf16" else Row("b"), 560))
        sessions[-1].prefill(IDS)
    real, own = (session.cache for session in sessions)
    assert cache_bytes(own, row.simulates)["computed"] == cache_bytes(real)["used"]
    rings = [(a, b) for (_, a), (_, b) in zip(real.layers, own.layers, strict=True) if a is not None]
    assert rings and torch.equal(rings[0][0].k, rings[0][1].k)


def test_what_cannot_be_simulated_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="loaded with kv_format int4: load it with kv_format bf16"):
        open_session(load(tiny, "int4"), Row("a", kv=OWN), 500)
    save_tiny(tmp_path, "llama", head_dim=48)
    runtime = load(tmp_path, "bf16")
    with pytest.raises(InputError, match=r"head_dim 48 has no Hadamard matrix .* without -rot"):
        open_session(runtime, Row("a", kv="sim:k4-token-rot/v4"), 500)
    assert open_session(runtime, Row("a", kv="sim:k4-token/v4"), 500).capacity > 500


def test_a_comparison_reports_simulated_formats_as_computed(tmp_path):
    planted = make_planted_model(tmp_path / "planted")
    rows = tmp_path / "rows.toml"
    kinds = {"real": "int4", "own": OWN, "small": "sim:k3-token-rot/v2"}
    rows.write_text("".join(f'[[row]]\nname = "{name}"\nkv = "{kv}"\n' for name, kv in kinds.items()))
    out = tmp_path / "out"
    options = ["--lengths", "900", "--depths", "1", "--items", "1", "--texts", "3", "--score-tokens", "128"]
    options += ["--tasks", "several,text", "--device", "cpu", "--model", str(planted.path)]
    assert compare.main([*options, "--settings", str(rows), "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    summary = {row["name"]: row for row in found["summary"]}
    assert summary["own"]["kv_computed"] == summary["real"]["kv_used"] < 0.6 * summary["own"]["kv_used"]
    assert summary["own"]["kv_used"] == summary["reference"]["kv_used"]
    assert summary["real"]["kv_computed"] is None
    assert 0 < summary["own"]["text"]["kl"]["value"] < summary["small"]["text"]["kl"]["value"]
    described = found["described"]
    assert described["real"]["simulated"] is None and described["real"]["kv_format"] == "int4"
    assert described["real"]["kv_page_bytes"] == described["own"]["simulated"]["page_bytes"] == 64 * 64 + 512
    assert described["small"]["kv_format"] == "bf16"
    assert described["small"]["simulated"]["page_bytes"] == 64 * 64 * 5 // 8 + 512
    assert described["small"]["simulated"]["bytes_per_token"] == 8 * (64 * 64 * 5 // 8 + 512) / 64
    report = (out / "report.md").read_text()
    assert "format's KV, computed" in report and "computed from its spec, not measured" in report
