"""The one-token linear kernels: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

The interpreted tests run in a process of their own with TRITON_INTERPRET=1, as those of the page kernels do. Triton's
interpreter has no inline PTX, so `run_ptx` here executes the kernels' own text, instruction by instruction.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longrun.errors import ConfigError
from longrun.quant.linear import QuantLinear

triton = pytest.importorskip("triton", reason="Triton is optional without a GPU")

from longrun.kernels import vector_linear_packed
from longrun.kernels.vector_linear import (
    Tuning,
    check_shapes,
    default_tuning,
    vector_linear,
    vector_linear_reference,
)
from longrun.kernels.vector_linear_dense import dense_kernel
from longrun.kernels.vector_linear_packed import code_planes, packed_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the kernels of this process are interpreted")
# RMS of the difference over RMS of the reference. The reference rounds a quantized weight to the compute dtype, and
# both round their result: 2^-9 and 2^-12, relative, each.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def need_bitsandbytes(weight_format):
    if weight_format == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 weights are made by bitsandbytes, which cannot be imported")


def make(weight_format, rows, width, dtype, *, bias=False, device="cpu", seed=0):
    """A layer, one row of x with channels of unlike size and an outlier, and norm weights."""
    need_bitsandbytes(weight_format)
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=g) / width**0.5
    weight *= 0.5 + torch.rand(rows, 1, generator=g)
    x = torch.randn(1, width, generator=g) * (0.1 + torch.rand(1, width, generator=g))
    x[0, width // 3] = 30.0
    b = torch.randn(rows, generator=g) if bias else None
    dtype = STORED.get(weight_format, dtype)
    linear = QuantLinear(weight, weight_format, b, dtype, device)
    norm = (1 + 0.3 * torch.randn(width, generator=g)).to(device, dtype)
    return linear, x.to(device, dtype), norm


def error(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def check(linear, x, norm=None, *, gated=False, accumulate=False, tolerance=None, **options):
    """Kernel and reference into a part of a poisoned buffer, whose rest must stay as it is."""
    outputs = linear.out_features // (2 if gated else 1)
    room = torch.full((3, outputs), float("nan"), dtype=x.dtype, device=x.device)
    if accumulate:
        g = torch.Generator().manual_seed(9)
        room[1] = torch.randn(outputs, generator=g).to(room)
    keywords = {"norm_weight": norm, "eps": 1e-5, "gated": gated, "accumulate": accumulate}
    expected = vector_linear_reference(x, linear, room[1:2].clone(), **keywords)
    actual = vector_linear(x, linear, room[1:2], **keywords, **options)
    assert actual.data_ptr() == room[1].data_ptr()
    assert torch.isfinite(expected).all() and room[[0, 2]].isnan().all()
    assert error(actual, expected) <= (tolerance or TOLERANCE[x.dtype])
    return actual.clone()


# ---- the kernels' PTX, executed by numpy ----


def signed(word):
    return word.astype(np.uint32).view(np.int32).astype(np.int64)


def prmt(low, high, selector):
    table = (high.astype(np.uint64) << np.uint64(32)) | low
    result = np.zeros_like(low)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = ((table >> ((nibble & 7) * 8).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & 8 != 0, (byte >> 7) * 255, byte)
        result |= (byte << np.uint32(8 * i)).astype(np.uint32)
    return result


def dp4a(kinds, left, right, added):
    total = signed(added)
    for i in range(4):
        factors = [(word >> np.uint32(8 * i)) & 255 for word in (left, right)]
        a, b = (f.astype(np.int64) - 256 * ((f > 127) & (k == "s32")) for f, k in zip(factors, kinds, strict=True))
        total = total + a * b
    assert (np.abs(total) < 2**31).all()
    return (total & 0xFFFFFFFF).astype(np.uint32)


def run_ptx(text, inputs, outputs):
    """Registers $0 to $(outputs - 1) after the text; `inputs` are uint32 arrays of one shape, from $outputs on."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    registers |= {"%lanemask_lt": np.uint32(1), "%lanemask_ge": np.uint32(0xFFFFFFFE)}
    shape = inputs[0].shape

    def read(name):
        value = registers[name] if name in registers else np.uint32(int(name, 0))
        return np.broadcast_to(value, shape).astype(np.uint32)

    for statement in re.sub(r"\.reg[^;]*;|[{}]", "", text).split(";"):
        if not statement.strip():
            continue
        name, arguments = statement.split(None, 1)
        to, *args = (a.strip() for a in arguments.split(","))
        operation, *kinds = name.split(".")
        values = [read(a) for a in args]
        registers[to] = {
            "mov": lambda a: a,
            "xor": lambda a, b: a ^ b,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "shr": lambda a, b: a >> b,
            "prmt": prmt,
            "dp4a": lambda *v, kinds=kinds: dp4a(kinds, *v),
        }[operation](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def words(*values):
    return [np.array([v & 0xFFFFFFFF], dtype=np.uint32) for v in values]


@pytest.fixture
def ptx_in_the_interpreter(monkeypatch):
    from triton.runtime import interpreter

    class Results:
        def __init__(self, handles):
            self.get_result = handles.__getitem__

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        assert pack == 1 and len(constraints.split(",")) == len(types) + len(values)
        data = np.broadcast_arrays(*[v.data for v in values])
        found = run_ptx(asm, [d.astype(np.int32).view(np.uint32) for d in data], len(types))
        scalar = triton.language.int32
        return Results([interpreter.TensorHandle(f.view(np.int32).reshape(data[0].shape), scalar) for f in found])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)


if INTERPRETED:
    SHAPES = [(123, 64), (128, 192), (123, 448), (128, 576)]
    CASES = [
        {},
        {"norm": True, "bias": True},
        {"gated": True},
        {"norm": True, "gated": True, "bias": True},
        {"accumulate": True},
        {"norm": True, "gated": True, "bias": True, "accumulate": True},
    ]

    def run(weight_format, rows, width, dtype, case, **options):
        linear, x, norm = make(weight_format, rows + (rows % 2 if case.get("gated") else 0), width, dtype,
                               bias=case.get("bias", False))  # fmt: skip
        flags = {key: case.get(key, False) for key in ("gated", "accumulate")}
        return check(linear, x, norm if case.get("norm") else None, **flags, **options)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "nf4"])
    def test_interpreted_dense(weight_format, case):
        """float32 activations; bf16 weights take bfloat16 ones, which the interpreter cuts off where GPUs round."""
        tolerance = 1.2e-2 if weight_format == "bf16" else None
        for rows, width in SHAPES:
            tuning = Tuning(32, 128, 4, 1)
            run(weight_format, rows, width, torch.float32, case, packed=False, tuning=tuning, tolerance=tolerance)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("weight_format", ["int8", "nf4"])
    def test_interpreted_packed(weight_format, case, ptx_in_the_interpreter):
        for rows, width in SHAPES:
            run(weight_format, rows, width, torch.float16, case, tuning=Tuning(64, 256, 4, 1))

    @pytest.mark.parametrize("weight_format", ["int8", "nf4"])
    def test_interpreted_packed_keeps_what_is_not_finite(weight_format, ptx_in_the_interpreter):
        linear, x, _ = make(weight_format, 64, 128, torch.float16)
        for bad in (float("nan"), float("inf")):
            x[0, 70] = bad
            assert not torch.isfinite(vector_linear(x, linear, tuning=Tuning(64, 128, 4, 1))).any()
        assert (vector_linear(torch.zeros_like(x), linear, tuning=Tuning(64, 128, 4, 1)) == 0).all()

    @pytest.mark.parametrize("weight_format", ["int8", "nf4"])
    def test_interpreted_packed_is_near_exact(weight_format, ptx_in_the_interpreter):
        """Against float64 products of what is stored, before any rounding to 16 bits: a result in float32."""
        linear, x, _ = make(weight_format, 128, 448, torch.float16)
        if weight_format == "int8":
            weight = linear.data.double() * linear.row_scale.double()
        else:
            nibbles = torch.stack((linear.data >> 4, linear.data & 15), dim=-1).view(-1, 64).long()
            weight = (linear.code.double()[nibbles] * linear.absmax.double()[:, None]).view(128, 448)
        out = torch.full((1, 128), float("nan"))
        wide = triton.next_power_of_2(448)
        scale = linear.row_scale if weight_format == "int8" else linear.absmax
        data = linear.data.view(-1).view(torch.int32)
        table = code_planes(linear.code) if weight_format == "nf4" else data
        packed_kernel[(2,)](
            x, x, data, scale, table, x, out, 128, 0.0, K=448, WIDE=wide, BLOCK_ROWS=64, CHUNKS=8, STAGES=1,
            NF4=weight_format == "nf4", NORM=False, GATED=False, BIAS=False, ADD=False,
        )  # fmt: skip
        assert error(out.double(), x.double() @ weight.T) <= (4e-5 if weight_format == "int8" else 2e-4)


@not_interpreted
def test_kernels_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 42
