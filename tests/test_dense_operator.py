"""Which of torch's attention operators a GPU would be asked for, shape by shape: no GPU is needed.

A wrong answer here is a speed lost without an error: FlashAttention-2 gives the same numbers as cuDNN at two thirds of
its speed.
"""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from longrun.kernels import dense_attention
from longrun.kernels.dense_attention import attention_with_lse, padded_rows, reference_attention_with_lse
from longrun.specs.attention_spec import AttentionSpec

CUDNN, FLASH, EFFICIENT = (f"_scaled_dot_product_{name}_attention" for name in ("cudnn", "flash", "efficient"))
SHAPED = {  # log-sum-exp [1, heads, q_len] as each operator returns it
    CUDNN: lambda lse: lse[..., None],
    FLASH: lambda lse: lse,
    EFFICIENT: lambda lse: torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)),
}


class OnGpu(torch.Tensor):
    """A tensor in main memory that says it is on a GPU, and computes what a GPU's operators would, in plain torch."""

    asked: ClassVar[list[str]] = []

    @property
    def device(self):
        return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in SHAPED:
            return super().__torch_function__(func, types, args, kwargs)
        q, k, v = (x[0].as_subclass(torch.Tensor) for x in args[:3])
        cls.asked.append(name)
        if q.stride(0) == 0:  # a shape without content
            shaped = SHAPED[name](torch.zeros(()).expand(1, *q.shape[:2]))
            return q[None].as_subclass(cls), shaped.as_subclass(cls)
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        out, lse = reference_attention_with_lse(q, k, v, args[4 if name == FLASH else 6], kwargs["scale"])
        return out[None].as_subclass(cls), SHAPED[name](lse[None]).as_subclass(cls)


@pytest.fixture
def asked(monkeypatch):
    """Names of the operators that were called."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(OnGpu, "asked", [])
    return OnGpu.asked


def card(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))


def attend(q_len, kv_len, dtype, causal, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(heads, q_len, 8, generator=g).to(dtype)
    k, v = torch.randn(2, kv_heads, kv_len, 8, generator=g).to(dtype)
    out, lse = attention_with_lse(*(x.as_subclass(OnGpu) for x in (q, k, v)), causal, 0.3)
    repeated = [x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v)]
    expected, expected_lse = reference_attention_with_lse(q, *repeated, causal, 0.3)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)
    torch.testing.assert_close(lse.as_subclass(torch.Tensor), expected_lse)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal", "heads", "operator"),
    [
        (32_768, 32_768, True, 16, CUDNN),  # a chunk of Llama-3-8B, half of whose heads are kept
        (32_768, 65_536, False, 16, CUDNN),  # over a piece of the past
        (32_768, 32_768, True, 32, CUDNN),  # every head
        (16_384, 65_536, False, 8, CUDNN),
        (8_192, 65_536, False, 16, CUDNN),
        (1_024, 1_024, True, 16, FLASH),  # planning takes longer than attending
        (2_000, 65_536, False, 16, FLASH),  # a long question
        (40, 65_536, False, 16, FLASH),
        (1, 4_096, False, 16, FLASH),
        (1_023, 10_000_000, False, 32, FLASH),
    ],
)
def test_which_operator_is_called_for_which_shape(monkeypatch, asked, q_len, kv_len, causal, heads, operator):
    card(monkeypatch, 9)
    shapes = (heads, q_len, 128), (heads // 4, kv_len, 128), (heads // 4, kv_len, 128)
    q, k, v = (torch.zeros((), dtype=torch.bfloat16).expand(shape).as_subclass(OnGpu) for shape in shapes)
    attention_with_lse(q, k, v, causal, 0.1)
    assert asked == [operator]


def test_a_small_model_read_in_one_chunk_has_cudnn(monkeypatch, asked):
    """Qwen2.5-1.5B's 28 equal layers at 30K tokens: 16 calls would not pay for a plan, 28 do."""
    card(monkeypatch, 9)
    shapes = (12, 30_000, 128), (2, 30_000, 128), (2, 30_000, 128)
    q, k, v = (torch.zeros((), dtype=torch.bfloat16).expand(shape).as_subclass(OnGpu) for shape in shapes)
    spec = AttentionSpec(65_536, 2, 12, 2, 128, 2, 30_256, 64, 256, fused=True, num_layers=28)
    for uses in (dense_attention.PLAN_USES, spec.layers_alike):
        attention_with_lse(q, k, v, True, 0.1, plan_uses=uses)
    assert asked == [FLASH, CUDNN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q_len", "kv_len", "causal"), [(1024, 1024, True), (1030, 100, False), (1023, 64, False)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_operators_are_given_what_they_take(monkeypatch, asked, dtype, q_len, kv_len, causal, heads, kv_heads):
    card(monkeypatch, 9)
    monkeypatch.setattr(dense_attention, "_PLAN_SECONDS", 0)
    attend(q_len, kv_len, dtype, causal, heads, kv_heads)
    assert asked == [CUDNN if q_len >= 1024 else FLASH]


def test_float32_has_one_operator(monkeypatch, asked):
    card(monkeypatch, 9)
    for q_len in (1, 1030):
        attend(q_len, 200, torch.float32, False)
    assert asked == [EFFICIENT] * 2


def test_without_cudnn_it_is_flash_attention(monkeypatch, asked):
    monkeypatch.setattr(dense_attention, "_PLAN_SECONDS", 0)
    card(monkeypatch, 8)  # an A100: cuDNN's kernels for it are no faster
    attend(2048, 64, torch.bfloat16, False)
    card(monkeypatch, 9)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    attend(2048, 64, torch.bfloat16, False)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    attend(2048, 64, torch.bfloat16, False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    attend(2048, 64, torch.bfloat16, False)
    assert asked == [FLASH, FLASH, CUDNN, FLASH]


@pytest.mark.parametrize(
    ("q_len", "start", "rows"),
    [
        (29_696, 98_304, 32_768),  # the last chunk of 128K tokens
        (20_000, 98_304, 32_768),
        (10_000, 98_304, 10_000),  # FlashAttention costs less than the padding
        (29_696, 983_040, 29_696),  # a long past: plans cost less than the padding
        (32_000, 983_040, 32_768),
        (32_768, 98_304, 32_768),
        (29_696, 0, 29_696),  # no full chunk came before
        (600, 98_304, 600),
    ],
)
def test_a_last_chunk_takes_a_full_ones_shape_where_that_is_cheaper(q_len, start, rows):
    assert padded_rows(16, q_len, 128, start, 32_768) == rows
