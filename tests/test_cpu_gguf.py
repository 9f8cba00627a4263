"""The compiled dequantizing of GGUF tensors against the `gguf` package: the same bits."""

import gguf
import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from longrun.config.model_config import ModelConfig
from longrun.kernels.cpu_gguf import CpuGguf
from longrun.model.checkpoint_tensors import find_tensors
from longrun.paths import cache_dir
from scripts.tiny_gguf import TYPE, write_gguf

TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module", params=["", "-mno-avx512f", "-mno-avx"])
def kernel(request):
    return CpuGguf(cache_dir() / "kernels", (request.param,) if request.param else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TYPES)
def test_same_bits_as_the_package(kernel, name, dtype):
    """Of random bytes: every code, and scales of every kind, subnormal, infinite and NaN."""
    values, size = gguf.GGML_QUANT_SIZES[TYPE[name]]
    stored = np.random.default_rng(0).integers(0, 256, 3000 * size, dtype=np.uint8)
    scale = 208 if name == "Q6_K" else 0
    stored[scale : scale + 2], stored[size + scale : size + scale + 2] = (0, 0x7C), (3, 0)  # infinite, subnormal
    with np.errstate(all="ignore"):
        right = torch.from_numpy(gguf.dequantize(stored.reshape(1, -1), TYPE[name])).view(-1)
    found = torch.full((3000 * values + 1,), 77, dtype=dtype)
    kernel.by_type[name](stored, found[:-1])
    nan = right.isnan()
    assert 0 < nan.sum() < 0.1 * len(right) and right.isinf().any() and found[-1] == 77
    assert torch.equal(found[:-1].isnan(), nan)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[:-1][~nan].view(bits), right.to(dtype)[~nan].view(bits))


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_those_read_without_it(tmp_path, monkeypatch, name):
    """Of tensors that stand as they are and of those with turned heads: whole, and parts that cut heads."""
    monkeypatch.setattr("longrun.model.gguf_tensors._STEP_VALUES", 2**14)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", head_dim=64, **shape)
    file = write_gguf(tmp_path / "model.gguf", model, name)
    config, kernel = ModelConfig.from_dir(file), CpuGguf(cache_dir() / "kernels")
    reference, tensors = find_tensors(file, config), find_tensors(file, config, kernel.by_type)
    assert sum(tensor.dequantize is not None for tensor in tensors.values()) == 2 + 7 * config.num_layers
    for tensor_name, tensor in tensors.items():
        rows = tensor.shape[0]
        for first, stop in ((0, rows), (rows // 3, rows), (rows // 3, rows // 2 + 1)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                want = torch.empty((stop - first, *tensor.shape[1:]), dtype=dtype)
                found = torch.empty_like(want)
                reference[tensor_name].read_into(want, first)
                tensor.read_into(found, first)
                assert torch.equal(found, want)
        runs: dict[int, torch.Tensor] = {}
        tensor.read_runs(runs.__setitem__, rows // 3, rows)
        want = torch.empty(rows - rows // 3, *tensor.shape[1:], dtype=tensor.torch_dtype)
        reference[tensor_name].read_into(want, rows // 3)
        assert torch.equal(torch.cat([runs[at] for at in sorted(runs)]), want)
