"""RoPE in float64, cast last: right at 3.3M positions, where float32 angles are not."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from tiny_models import FAMILIES, ROPES, tiny_model

from longrun.errors import ConfigError
from longrun.model.rope import RopeParameters, RotaryTable, apply_rope_, signed_sin

POSITION = 3_300_000
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def plain_frequencies(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3_frequency(frequency: float) -> float:
    """By wavelength, as the rule is stated: short ones stay, long ones are divided, between them a blend."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4.0:
        return frequency
    if wavelength > 8192 / 1.0:
        return frequency / 8.0
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * frequency / 8.0 + smooth * frequency


def angle_error(cos: torch.Tensor, sin: torch.Tensor, frequencies: list[float]) -> float:
    """Largest difference between the angle that cos and sin stand for and the true one, in exact multiples of 2 pi."""
    worst = 0.0
    two_pi = Fraction(2 * math.pi) + Fraction("2.4492935982947064e-16")  # double 2 pi and what it lacks
    for c, s, frequency in zip(cos.tolist(), sin.tolist(), frequencies, strict=False):
        angle = Fraction(frequency) * POSITION
        true = float(angle - round(angle / two_pi) * two_pi)
        difference = math.atan2(s, c) - true
        worst = max(worst, abs(math.remainder(difference, 2 * math.pi)))
    return worst


@pytest.mark.parametrize(
    ("values", "frequencies"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, plain_frequencies(10000.0, 128)),
        ({"rope_type": "default", "rope_theta": 500000.0}, plain_frequencies(500000.0, 128)),
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            [f / 4.0 for f in plain_frequencies(10000.0, 128)],
        ),
        (LLAMA3, [llama3_frequency(f) for f in plain_frequencies(500000.0, 128)]),
    ],
    ids=["default", "default-500k", "linear", "llama3"],
)
def test_angles_at_3_3_million(values, frequencies):
    table = RotaryTable(RopeParameters(values, 8192), 128)
    cos, sin = table.cos_sin(POSITION, 2, POSITION + 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (2, 128)
    assert angle_error(cos[0], sin[0], frequencies) <= 1e-6
    torch.testing.assert_close(cos[:, 64:], cos[:, :64], rtol=0, atol=0)
    torch.testing.assert_close(sin[:, 64:], sin[:, :64], rtol=0, atol=0)


def test_float32_angles_would_fail():
    frequencies = plain_frequencies(500000.0, 128)
    inv_freq = 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    angles = torch.tensor(float(POSITION)) * inv_freq
    assert angle_error(angles.cos(), angles.sin(), frequencies) > 1e-2


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_tables_equal_transformers_where_float32_suffices(rope, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=64,
        rope_parameters=dict(ROPES[rope]),
    )
    for total in (64, 200):
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(total)[None])
        ours = RotaryTable(RopeParameters(config.rope_parameters, 64), head_dim).cos_sin(0, total, total)
        for mine, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, their[0], rtol=0, atol=5e-5)


def test_dynamic_base_follows_the_length_of_the_call():
    table = RotaryTable(RopeParameters(ROPES["dynamic"], 64), 16)
    short, trained, longer = (table.cos_sin(0, 10, length)[0] for length in (10, 64, 200))
    assert torch.equal(short, trained)
    assert (longer - trained).abs().max() > 1e-2


def test_yarn_scales_attention():
    cos, _ = RotaryTable(RopeParameters(ROPES["yarn"], 64), 16).cos_sin(0, 1, 1)
    assert cos[0, 0].item() == pytest.approx(0.1 * math.log(4.0) + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_turns_each_pair(dtype):
    table = RotaryTable(RopeParameters({"rope_type": "default", "rope_theta": 100.0}, 64), 8)
    cos, sin = table.cos_sin(5, 3, 8)
    buffer = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = buffer.clone()
    apply_rope_(buffer[:, :4], cos[:, None], signed_sin(sin)[:, None])
    first, second = before[:, :4, :4].double(), before[:, :4, 4:].double()
    c, s = cos[:, None, :4].double(), sin[:, None, :4].double()
    want = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(buffer[:, :4].double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(buffer[:, 4:], before[:, 4:])


def test_unsupported_type_and_missing_parameter():
    with pytest.raises(ConfigError, match=r"longrope.*default, linear, dynamic, llama3, yarn"):
        RopeParameters({"rope_type": "longrope", "rope_theta": 1e4}, 64)
    with pytest.raises(ConfigError, match="factor"):
        RotaryTable(RopeParameters({"rope_type": "linear", "rope_theta": 1e4}, 64), 16)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_familys_class(tmp_path, family, rope):
    """In the new spelling and two old ones."""
    from transformers import CONFIG_MAPPING

    model = tiny_model(family, rope)
    data = model.config.to_dict()
    data["architectures"], new = [type(model).__name__], data.pop("rope_parameters")
    old = {name: value for name, value in new.items() if name != "rope_theta"}
    oldest = {"type" if name == "rope_type" else name: value for name, value in old.items()}
    for given in (
        {"rope_parameters": new},
        {"rope_scaling": old, "rope_theta": new["rope_theta"]},
        {"rope_scaling": oldest, "original_max_position_embeddings": 32},
    ):
        (tmp_path / "config.json").write_text(json.dumps(data | given))
        right = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(data | given)))
        ours = RopeParameters.from_dir(tmp_path)
        assert ours == RopeParameters(right.rope_parameters, right.max_position_embeddings)


def test_another_reading_by_the_library_is_an_error(monkeypatch):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = ROPE_INIT_FUNCTIONS["linear"]

    def changed(*args, **kwargs):
        inv_freq, scaling = original(*args, **kwargs)
        return inv_freq * 1.001, scaling

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "linear", changed)
    with pytest.raises(ConfigError, match="differ from the installed transformers"):
        RotaryTable(RopeParameters(ROPES["linear"], 64), 16)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("position", [0, 5, 70, 3_300_000])
def test_a_single_position_is_a_row_of_the_table(tmp_path, rope, position):
    tiny_model("llama", rope).save_pretrained(tmp_path)
    table = RotaryTable(RopeParameters.from_dir(tmp_path), 16)
    rows = table.cos_sin(position, 1, position + 1)
    single = table.cos_sin_of(position, position + 1)
    for row, found in zip(rows, single, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), row[0], rtol=0, atol=1e-7)
