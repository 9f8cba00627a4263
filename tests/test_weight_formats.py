"""Weight formats: bytes by arithmetic and as held, error of the quantized ones, nothing dequantized left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError
from longrun.model.checkpoint import load_decoder
from longrun.quant import int4_weight
from longrun.quant import linear as linear_module
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import WEIGHT_FORMATS, compute_itemsize, is_quantized, linear_bytes
from longrun.specs.model_bytes import model_weight_bytes


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def make(weight_format: str, rows: int = 96, columns: int = 72, bias: bool = True) -> tuple[QuantLinear, torch.Tensor]:
    dtype = torch.bfloat16 if weight_format == "bf16" else torch.float32
    weight = random(rows, columns)
    return QuantLinear(weight.to(dtype), weight_format, random(rows, seed=1) if bias else None), weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(96, 72), (7, 13), (1, 64), (33, 100)])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_linear_bytes_are_what_is_held(weight_format, rows, columns, bias):
    layer, _ = make(weight_format, rows, columns, bias)
    itemsize = layer.compute_dtype.itemsize
    assert layer.num_bytes == linear_bytes(rows, columns, weight_format, itemsize, bias)
    layer(random(5, columns).to(layer.compute_dtype))
    held = {id(t): t for name in QuantLinear.__slots__ for t in _tensors_in(getattr(layer, name))}
    code = 0 if weight_format != "nf4" else layer._state.code.nbytes  # one table of 64 B a device, shared by all
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) == layer.num_bytes + code


def _tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [inner for inner in vars(value).values() if isinstance(inner, torch.Tensor)] if hasattr(value, "absmax") else []
    )


def test_bytes_by_hand():
    assert linear_bytes(10, 64, "fp32", 4, False) == 2560
    assert linear_bytes(10, 64, "bf16", 2, True) == 1280 + 20
    assert linear_bytes(10, 64, "int8", 4, False) == 640 + 40
    assert linear_bytes(10, 64, "nf4", 4, False) == 320 + 40
    assert linear_bytes(3, 43, "nf4", 2, False) == 65 + 3 * 4
    assert linear_bytes(10, 64, "int4", 4, False) == 320 + 2 * 20
    assert linear_bytes(3, 43, "int4", 2, True) == 3 * (6 * 4 + 2 * 2) + 6
    assert linear_bytes(4096, 14336, "int4", 2, False) == linear_bytes(4096, 14336, "nf4", 2, False)
    assert [compute_itemsize(f, "cpu") for f in WEIGHT_FORMATS] == [4, 2, 4, 4, 4]
    assert [compute_itemsize(f, "cuda") for f in WEIGHT_FORMATS] == [4, 2, 2, 2, 2]
    assert [is_quantized(f) for f in WEIGHT_FORMATS] == [False, False, True, True, True]


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"intermediate_size": 111}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_decoder_bytes_equal_the_plan(tmp_path, family, options, weight_format):
    save_tiny(tmp_path, family, **options)
    config = ModelConfig.from_dir(tmp_path)
    decoder = load_decoder(tmp_path, config, [[1, 2, 0]] * 3, weight_format, "cpu")
    assert decoder.weight_bytes == model_weight_bytes(config, weight_format, "cpu")


@pytest.mark.parametrize(("weight_format", "low", "high"), [("fp32", 0, 0), ("bf16", 1e-4, 3e-3), ("int8", 1e-3, 1e-2)])
def test_error_of_the_weight(weight_format, low, high):
    layer, weight = make(weight_format)
    assert low <= relative(layer.dense(), weight) <= high


def test_int8_is_the_nearest_step_of_each_row():
    weight = random(50, 40)
    weight[3] = 0
    weight[4] *= 1e-20
    layer = QuantLinear(weight, "int8")
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.dense() - weight).abs() <= step * 0.5001).all()
    assert torch.equal(layer.dense()[3], torch.zeros(40))


def test_nf4_is_that_of_bitsandbytes():
    import bitsandbytes.functional as functional

    layer, weight = make("nf4")
    want = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(layer.dense(), want)
    assert 0.02 < relative(want, weight) < 0.15


def test_int4_bytes_by_hand():
    """Row 1 of width 43: five words of 8 weights and one of 3, two steps; nibbles by arithmetic on the bytes."""
    layer = QuantLinear(random(3, 43), "int4")
    assert layer.data.shape == (3, 24) and layer.group_scale.shape == (3, 2) and layer.row_scale is None
    want = []
    for i in range(43):
        byte = int(layer.data[1, i // 8 * 4 + i % 4])
        nibble = byte % 16 if i % 8 < 4 else byte // 16
        want.append((nibble - 8) * float(layer.group_scale[1, i // 32]))
    assert layer.dense()[1].tolist() == want
    rest = layer.data[:, -4:]
    assert (rest[:, 3] == 0x88).all() and (rest[:, :3] >> 4 == 8).all()  # filled up with weights of 0


def test_int4_takes_the_nearest_multiple_of_each_step():
    weight = random(40, 96)
    weight[3] = 0
    weight[4] *= 1e-20
    weight[5] *= 1e20
    layer = QuantLinear(weight, "int4")
    step = layer.group_scale.float().abs().repeat_interleave(32, dim=1)
    inside = (weight / step).abs() < 7
    assert inside.float().mean() > 0.9
    assert ((layer.dense() - weight).abs() <= step * 0.5001)[inside].all()
    assert torch.equal(layer.dense()[3], torch.zeros(96))
    assert relative(layer.dense()[4] * 1e20, weight[4] * 1e20) < 0.12
    assert relative(layer.dense()[5] / 1e20, weight[5] / 1e20) < 0.12


@pytest.mark.parametrize(("rows", "columns"), [(24, 16), (3000, 96), (5, 50), (7, 13), (33, 272)])
def test_nf4_where_rows_end_within_groups(rows, columns):
    """Values and groups count through the whole matrix."""
    layer, weight = make("nf4", rows, columns)
    at = torch.arange(rows * columns)
    byte = layer.data.view(-1)[at // 2].int()
    expected = layer.code[torch.where(at % 2 == 0, byte >> 4, byte & 15)] * layer.absmax[at // 64]
    assert torch.equal(layer.dense(), expected.view(rows, columns))
    assert relative(layer.dense(), weight) < 0.13


def test_int4_step_is_better_than_the_largest_weight_and_than_nf4():
    weight = random(64, 2048)
    grouped = weight.view(-1, 32)
    largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)) / -8
    plain = ((grouped / largest).round().clamp(-8, 7) * largest).view_as(weight)
    error = relative(QuantLinear(weight, "int4").dense(), weight)
    assert error < 0.96 * relative(plain, weight)
    assert error < 0.92 * relative(QuantLinear(weight, "nf4").dense(), weight)


def test_int4_holds_a_lonely_weight_exactly_and_shows_what_is_not_finite():
    weight = torch.zeros(3, 64)
    weight[0, 5], weight[0, 40] = 0.8125, -3.25
    assert torch.equal(QuantLinear(weight, "int4").dense(), weight)
    weight[1, 7], weight[2, 9] = float("nan"), float("-inf")
    dense = QuantLinear(weight, "int4").dense()
    assert torch.equal(dense[0], weight[0]) and not dense[1:, :32].isfinite().any()
    assert torch.equal(dense[1:, 32:], weight[1:, 32:])


def test_int4_in_pieces_is_as_in_one(monkeypatch):
    weight = random(50, 100)
    whole = QuantLinear(weight, "int4")
    monkeypatch.setitem(int4_weight._PIECE, "cpu", 700)
    parts = QuantLinear(weight, "int4")
    assert torch.equal(whole.data, parts.data) and torch.equal(whole.group_scale, parts.group_scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_product(weight_format, tokens, bias):
    layer, _ = make(weight_format, bias=bias)
    wide = random(tokens, 100, seed=2).to(layer.compute_dtype)
    x = wide[:, :72]
    want = x.float() @ layer.dense().float().T + (layer.bias.float() if bias else 0)
    limit = 5e-3 if weight_format == "bf16" else 1e-6
    assert relative(layer(x), want) <= limit
    assert relative(layer(x, dense=layer.dense()), want) <= limit
    out = torch.full((tokens, 96), 7.0, dtype=layer.compute_dtype)
    assert layer(x, out=out) is out
    assert relative(out, want) <= limit
    out = torch.full((tokens, 96), 2.0, dtype=layer.compute_dtype)
    assert layer(x, out=out, accumulate=True) is out
    assert relative(out, want + 2) <= limit


def test_dense_formats_take_the_weight_over_without_a_copy():
    weight = random(8, 8)
    layer = QuantLinear(weight, "fp32")
    assert layer.dense().data_ptr() == weight.data_ptr()


def test_errors(monkeypatch):
    with pytest.raises(ConfigError, match=r"weight format 'int5'.*fp32, bf16, int8, nf4, int4"):
        QuantLinear(random(4, 4), "int5")
    with pytest.raises(ConfigError, match="device type 'mps'"):
        compute_itemsize("bf16", "mps")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    linear_module._bitsandbytes.cache_clear()
    try:
        with pytest.raises(ConfigError, match="nf4 needs the package bitsandbytes"):
            QuantLinear(random(4, 64), "nf4")
        QuantLinear(random(4, 64), "int8")
        QuantLinear(random(4, 64), "int4")
    finally:
        linear_module._bitsandbytes.cache_clear()


def test_bitsandbytes_is_imported_for_nf4_only():
    code = (
        "import sys, torch; from longrun.quant.linear import QuantLinear\n"
        "for name in ('fp32', 'int8', 'int4', 'nf4'):\n"
        "    QuantLinear(torch.ones(4, 64), name)(torch.ones(1, 64)); print('bitsandbytes' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split() == ["False", "False", "False", "True"]
