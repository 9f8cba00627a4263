"""Which of torch's attention operators a GPU would be asked for, shape by shape: no GPU is needed.

A wrong answer here is a speed lost without an error: FlashAttention-2 gives the same numbers as cuDNN at two thirds of
its speed.
"""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from longrun.kernels.dense_attention import attention_with_lse, reference_attention_with_lse

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
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        out, lse = reference_attention_with_lse(q, k, v, args[4 if name == FLASH else 6], kwargs["scale"])
        cls.asked.append(name)
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
    ("q_len", "kv_len", "causal", "operator"),
    [
        (1024, 1024, True, CUDNN),  # the shortest chunk
        (1500, 100, False, CUDNN),
        (1024, 64, False, CUDNN),  # a chunk over one page of the past
        (1023, 100, False, FLASH),
        (40, 2048, False, FLASH),  # a question: the past's length decides nothing
        (1, 4096, False, FLASH),
    ],
)
@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [(torch.bfloat16, 4, 2), (torch.float16, 2, 2)])
def test_long_chunks_are_cudnns_on_hopper(monkeypatch, asked, q_len, kv_len, causal, operator, dtype, heads, kv_heads):
    card(monkeypatch, 9)
    attend(q_len, kv_len, dtype, causal, heads, kv_heads)
    assert asked == [operator]


def test_float32_has_one_operator(monkeypatch, asked):
    card(monkeypatch, 9)
    for q_len in (1, 1030):
        attend(q_len, 200, torch.float32, False)
    assert asked == [EFFICIENT] * 2


def test_without_cudnn_it_is_flash_attention(monkeypatch, asked):
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
