"""Key biases: what they cost in quantized pages, and what a plan says about them."""

import json
import math

import pytest
import torch
from planned_models import SMALL_JSON
from tiny_models import save_tiny, tiny_model

import longrun
from longrun.attention.interface import Step
from longrun.config.key_biases import KeyBiases, read_key_biases
from longrun.config.model_config import ModelConfig
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.plan.budget import Budget
from longrun.plan.command import plan_command
from longrun.plan.key_biases import MOTION_LIMITS, key_bias_warnings
from longrun.plan.plan import make_plan
from longrun.quant.kv_format import PageFormat
from scripts.quality.key_bias_probe import FORMATS, Layer, turned
from scripts.tiny_gguf import write_gguf

DIM, READ, TESTED = 32, 384, 8
IDS = torch.randint(0, 97, (READ + TESTED,), generator=torch.Generator().manual_seed(1)).tolist()


def biased(size, pair, queries_share=1.0):
    """A tiny Qwen2 model with this bias on both channels of one rotary pair of every KV head; queries of that pair are
    multiplied by `queries_share`."""
    model = tiny_model("qwen2", head_dim=DIM, hidden_size=96, num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(-1, DIM)[:, pair :: DIM // 2] = size
            for rows in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
                rows.unflatten(0, (-1, DIM))[:, pair :: DIM // 2] *= queries_share
    return model


def losses(folder):
    """KL to exact pages, mean over the tokens after a text, by page format."""
    runtime = longrun.load(folder, kv_format="fp32", weight_format="fp32", device="cpu", ctx=400, chunk_size=READ)
    found = {}
    for name in ("fp32", "bf16", "k5v3", "int4"):
        session = runtime.derive(kv_format=name).new_session()
        session.prefill(IDS[:READ])
        rows = [torch.log_softmax(session.prefill([token]).double().flatten(), -1) for token in IDS[READ:]]
        found[name] = torch.stack(rows)
    exact = found.pop("fp32")
    return {name: (exact.exp() * (exact - rows)).sum(-1).mean().item() for name, rows in found.items()}


def test_a_bias_that_turns_costs_quantized_pages_much_and_exact_ones_nothing(tmp_path):
    """On the fastest pair, whose queries are so small that the scores stay as they are; not on the slowest."""
    cases = {"small": (1, 0, 1.0), "fast": (100, 0, 0.01), "slow": (100, DIM // 2 - 1, 0.01)}
    kl = {}
    for name, case in cases.items():
        biased(*case).save_pretrained(tmp_path / name)
        kl[name] = losses(tmp_path / name)
    print(kl)
    assert kl["fast"]["int4"] > 8 * kl["small"]["int4"]
    assert kl["fast"]["k5v3"] > 3 * kl["small"]["k5v3"]
    for name in ("int4", "k5v3"):
        assert kl["slow"][name] < 3 * kl["small"][name]
    assert all(kl[name]["bf16"] < 0.01 * kl["small"]["k5v3"] for name in kl)


@pytest.mark.parametrize("kind", ["folder", "bf16", "shards", "gguf"])
def test_biases_are_read_from_every_kind_of_file(tmp_path, kind):
    """Against the definition: every bias turned to every position, its mean over the page taken off."""
    model = tiny_model("qwen2", head_dim=DIM, hidden_size=96)
    if kind == "bf16":
        model = model.bfloat16()
    place = tmp_path / "model"
    if kind == "gguf":
        place.mkdir()
        write_gguf(place / "model.gguf", model)
    else:
        model.save_pretrained(place, max_shard_size="100KB" if kind == "shards" else "1GB")
        assert (place / "model.safetensors").is_file() == (kind != "shards")
    biases = read_key_biases(place, ModelConfig.from_dir(place))
    assert biases is not None
    stored = torch.stack([layer.self_attn.k_proj.bias.double() for layer in model.model.layers]).view(-1, DIM)
    for size in (16, 64):
        cos, sin = RotaryTable(RopeParameters.from_dir(place), DIM).cos_sin(0, size, size)
        first, second = stored[:, None].chunk(2, dim=-1)
        cos, sin = cos[:, : DIM // 2].double(), sin[:, : DIM // 2].double()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        motion = (turned - turned.mean(1, keepdim=True)).square().mean().sqrt().item()
        assert biases.motion(size) == pytest.approx(motion, rel=1e-4)


def test_biases_of_llama_files_stand_side_by_side(tmp_path):
    model = tiny_model("llama", head_dim=DIM, hidden_size=96, attention_bias=True)
    model.save_pretrained(tmp_path / "folder")
    file = write_gguf(tmp_path / "model.gguf", model)
    found = [read_key_biases(path, ModelConfig.from_dir(path)) for path in (tmp_path / "folder", file)]
    assert found[0].squares == pytest.approx(found[1].squares, rel=1e-6)


def test_nothing_is_known_without_biases_or_weights(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    save_tiny(tmp_path / "qwen", "qwen2")
    configs = {name: ModelConfig.from_dir(tmp_path / name) for name in ("llama", "qwen")}
    assert read_key_biases(tmp_path / "llama", configs["llama"]) is None
    file = tmp_path / "qwen" / "model.safetensors"
    content = file.read_bytes()
    assert read_key_biases(tmp_path / "qwen", configs["qwen"]) is not None
    for damaged in (content[:5000], content[:8] + b"{" * 100, b""):
        file.write_bytes(damaged)
        assert read_key_biases(tmp_path / "qwen", configs["qwen"]) is None
    file.unlink()
    assert read_key_biases(tmp_path / "qwen", configs["qwen"]) is None


def moving(motion):
    """Biases that move by so much: one pair that turns halfway from token to token, so its mean over a page is 0."""
    return KeyBiases((motion**2 * 4, 0.0), (math.pi, 0.1))


def test_only_what_is_above_its_formats_limit_is_told():
    assert moving(3.0).motion(64) == pytest.approx(3.0)
    assert key_bias_warnings(None, PageFormat("k5v3", 64, 32)) == []
    for name in ("bf16", "fp32"):
        assert key_bias_warnings(moving(1e6), PageFormat(name, 64, 32)) == []
    for name, limit in MOTION_LIMITS.items():
        assert key_bias_warnings(moving(limit * 0.99), PageFormat(name, 64, 32)) == []
        (told,) = key_bias_warnings(moving(limit * 1.5), PageFormat(name, 64, 32))
        assert f"{limit * 1.5:.1f} a channel" in told and f"beyond {limit:g} {name}" in told and "--kv bf16" in told
    config, budget = ModelConfig.from_dict(SMALL_JSON, "config.json"), Budget.load("cpu")
    assert any("key biases" in text for text in make_plan(config, budget, 1000, key_biases=moving(100)).warnings)
    assert make_plan(config, budget, 1000).warnings == ()


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_the_plan_and_load_warn_of_large_biases(tmp_path, capsys, kind):
    for name, size in (("small", 1), ("large", 100)):
        model, place = biased(size, 0, 1 / size), tmp_path / name
        if kind == "gguf":
            place.mkdir()
            write_gguf(place / "model.gguf", model)
        else:
            model.save_pretrained(place)
        for kv_format in (None, "bf16"):
            told = size == 100 and kv_format is None
            options = [] if kv_format is None else ["--kv", kv_format]
            plan_command(["--model", str(place), "--ctx", "64", "--json", *options])
            warnings = json.loads(capsys.readouterr().out)["warnings"]
            assert sum("key biases" in text for text in warnings) == told
            runtime = longrun.load(place, kv_format=kv_format, device="cpu", ctx=64)
            assert sum("key biases" in text for text in runtime.notices) == told
            assert runtime.plan.kv_format == (kv_format or "k5v3")  # the default stays
            runtime.new_session()
            assert sum("key biases" in text for text in runtime.notices) == told


@pytest.mark.parametrize("name", ["k5v3", "int4"])
def test_what_survives_a_bias_that_turns(name):
    """The probe's ways on keys of random normal numbers; queries are so small in the biased pair that its share of the
    scores stays. Errors of scores, relative to those of the same keys without a bias."""
    dim, pair, size, tokens = 64, 2, 100.0, 448
    g = torch.Generator().manual_seed(3)
    plain, v, q = (torch.randn(2, tokens, dim, generator=g) for _ in range(3))
    own = torch.zeros(2, dim)
    own[:, pair :: dim // 2] = size
    rotary = RotaryTable(RopeParameters({"rope_type": "default", "rope_theta": 10_000.0}, 512), dim)
    bias = turned(own, Step(0, tokens, *rotary.cos_sin(0, tokens, tokens)))
    q[..., pair :: dim // 2] /= size
    outliers, scale = own[:, None] != 0, torch.where(own != 0, 2.0**-7, 1.0)[:, None]

    def error(way, k, bias):
        found, _ = FORMATS[way](Layer(k, v, bias, scale, outliers))
        return (q @ (found - k).transpose(1, 2)).square().mean().sqrt().item()

    usual = error(name, plain, torch.zeros_like(plain))
    assert error(name, plain + bias, bias) > 5 * usual
    for way in ("bias off", "pairs exact", "pairs scaled", "plain keys"):
        assert error(f"{name}, {way}", plain + bias, bias) < 1.6 * usual, way
