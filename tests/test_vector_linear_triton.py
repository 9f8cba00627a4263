"""The one-token linear kernels: through the interpreter, compiled for sm_80 and sm_90, and (`-m gpu`) on a GPU.

How the interpreted tests run: interpreted.py. Triton's
interpreter has no inline PTX, so `run_ptx` here executes the kernels' own text, instruction by instruction.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from ptx_by_hand import run_ptx

from longrun.errors import ConfigError
from longrun.quant.linear import QuantLinear

pytest.importorskip("triton", reason="Triton is optional without a GPU")

import triton

from longrun.kernels.vector_linear import (
    Tuning,
    check_shapes,
    default_tuning,
    vector_linear,
    vector_linear_reference,
)
from longrun.kernels.vector_linear_dense import dense_kernel
from longrun.kernels.vector_linear_packed import code_planes, packed_kernel

# RMS of the difference over RMS of the reference. The reference rounds a quantized weight to the compute dtype, and
# both round their result, up to 2^-9 and 2^-12, relative, each time; the product of gate and up has both errors.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
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
    SHAPES = [(123, 64), (123, 192), (128, 448), (123, 576)]
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
    @pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "nf4", "int4"])
    def test_interpreted_dense(weight_format, case):
        """float32 activations; bf16 weights take bfloat16 ones, which the interpreter cuts off where GPUs round."""
        tolerance = 2e-2 if weight_format == "bf16" else None
        for rows, width in SHAPES[CASES.index(case) % 2 :: 2]:
            tuning = Tuning(32, 128, 4, 1)
            run(weight_format, rows, width, torch.float32, case, packed=False, tuning=tuning, tolerance=tolerance)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("weight_format", ["int8", "nf4", "int4"])
    def test_interpreted_packed(weight_format, case, ptx_in_the_interpreter):
        for rows, width in SHAPES[CASES.index(case) % 2 :: 2]:
            run(weight_format, rows, width, torch.float16, case, tuning=Tuning(64, 256, 4, 1))

    @pytest.mark.parametrize("weight_format", ["int8", "nf4", "int4"])
    def test_interpreted_packed_keeps_what_is_not_finite(weight_format, ptx_in_the_interpreter):
        linear, x, _ = make(weight_format, 64, 128, torch.float16)
        for bad in (float("nan"), float("inf")):
            x[0, 70] = bad
            assert not torch.isfinite(vector_linear(x, linear, tuning=Tuning(64, 128, 4, 1))).any()
        assert (vector_linear(torch.zeros_like(x), linear, tuning=Tuning(64, 128, 4, 1)) == 0).all()

    @pytest.mark.parametrize("weight_format", ["int8", "nf4", "int4"])
    def test_interpreted_packed_is_near_exact(weight_format, ptx_in_the_interpreter):
        """Against float64 products of what is stored, before any rounding to 16 bits: a result in float32."""
        linear, x, _ = make(weight_format, 128, 448, torch.float32)
        x = x.half()
        if weight_format == "nf4":
            nibbles = torch.stack((linear.data >> 4, linear.data & 15), dim=-1).view(-1, 64).long()
            weight = (linear.code.double()[nibbles] * linear.absmax.double()[:, None]).view(128, 448)
        else:
            weight = linear.dense().double()  # of a float32 layer: exact, but for int8's one rounding
        out = torch.full((1, 128), float("nan"))
        wide = triton.next_power_of_2(448)
        scale = {"int8": linear.row_scale, "nf4": linear.absmax, "int4": linear.group_scale}[weight_format]
        data = linear.data.view(-1).view(torch.int32)
        table = code_planes(linear.code) if weight_format == "nf4" else data
        packed_kernel[(2,)](
            x, x, data, scale, table, x, out, 128, 0.0, K=448, WIDE=wide, BLOCK_ROWS=64, CHUNKS=8, STAGES=1,
            FORMAT=weight_format, NORM=False, GATED=False, BIAS=False, ADD=False,
        )  # fmt: skip
        assert error(out.double(), x.double() @ weight.T) <= {"int8": 4e-5, "nf4": 2e-4, "int4": 6e-5}[weight_format]


@not_interpreted
def test_kernels_through_the_interpreter(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) >= 40


@not_interpreted
def test_what_no_kernel_serves_is_refused():
    linear, x, _ = make("bf16", 7, 64, torch.bfloat16)
    with pytest.raises(ConfigError, match="2 tokens"):
        vector_linear(x.expand(2, -1), linear)
    with pytest.raises(ConfigError, match="7 rows"):
        vector_linear(x, linear, gated=True)
    for width in (32, 96, 65600):
        linear, x, _ = make("bf16", 2, width, torch.bfloat16)
        with pytest.raises(ConfigError, match=f"in_features {width}.*multiples of 64"):
            vector_linear(x, linear)
    with pytest.raises(AssertionError):
        check_shapes(x.float(), make("bf16", 2, 64, torch.bfloat16)[0], None, False, False, None)


def build(packed, weight_format, item, width, outputs, capability, **flags):
    """The kernel as `vector_linear` launches it by default, built without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tuning = default_tuning(weight_format, packed, outputs, width, flags.get("GATED", False), flags.get("PDL", False))
    wide = triton.next_power_of_2(width)
    block_k = min(tuning.block_k, wide)
    constants = {"K": width, "WIDE": wide, "BLOCK_ROWS": tuning.block_rows, "STAGES": tuning.num_stages}
    constants |= {"NORM": False, "GATED": False, "BIAS": False, "ADD": False, "PDL": False} | flags
    stored = {"bf16": "bf16", "fp32": "fp32", "int8": "i8", "nf4": "u8", "int4": "u8"}[weight_format]
    scale = "*bf16" if weight_format == "int4" else "*fp32"
    types = {"scale_ptr": scale, "code_ptr": "*fp32", "table_ptr": "*i32", "rows": "i32", "eps": "fp32"}
    if packed:
        kernel, types["w_ptr"] = packed_kernel, "*i32"
        constants |= {"CHUNKS": block_k // (16 if weight_format == "int8" else 32), "FORMAT": weight_format}
    else:
        kernel, types["w_ptr"] = dense_kernel, f"*{stored}"
        vector = {"fp32": 4, "bf16": 8}.get(weight_format, 16)
        constants |= {"BLOCK_K": block_k, "VECTOR": vector, "FORMAT": weight_format}
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else types.get(n, f"*{item}") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or n == "rows"}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": tuning.num_warps, "launch_pdl": constants["PDL"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@not_interpreted
@pytest.mark.parametrize(("packed", "weight_format"), [(True, "nf4"), (True, "int4"), (True, "int8"), (False, "bf16")])
def test_weights_are_under_way_before_the_kernel_waits_for_the_one_before(packed, weight_format):
    """On sm_90 every program lets the next kernel begin, and waits before it reads x; packed weights of one step, which
    depend on nothing, are asked for before that."""
    build(packed, weight_format, "bf16", 14336, 4096, 90, ADD=True, PDL=True)
    ptx = build(packed, weight_format, "bf16", 2048, 2048, 90, NORM=True, PDL=True).asm["ptx"]
    begin, wait = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
    assert begin < wait and ptx.count("griddepcontrol.wait") == 1
    before = len(re.findall(r"ld\.global[.\w]*\.v4", ptx[:wait]))
    assert (before > 0) == packed
    assert "griddepcontrol" not in build(packed, weight_format, "bf16", 2048, 2048, 80, NORM=True).asm["ptx"]


@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("packed", "weight_format", "item"),
    [(True, "nf4", "bf16"), (True, "int8", "bf16"), (False, "bf16", "bf16"), (False, "fp32", "fp32"),
     (False, "nf4", "fp32"), (False, "int8", "fp32"), (True, "nf4", "fp16"), (True, "int4", "bf16"),
     (True, "int4", "fp16"), (False, "int4", "fp32")],
)  # fmt: skip
def test_compiles_without_a_gpu(packed, weight_format, item, capability):
    """Llama-3-8B's gate/up with norm and its down projection; a model of width 576."""
    for width, outputs, flags in (
        (4096, 14336, {"NORM": True, "GATED": True}),
        (14336, 4096, {"ADD": True}),
        (576, 960, {"NORM": True, "BIAS": True}),
    ):
        ptx = build(packed, weight_format, item, width, outputs, capability, **flags)
        assert ptx.asm["cubin"] and f".target sm_{capability}" in ptx.asm["ptx"]
        if width > 576 and (packed or weight_format not in ("nf4", "int4")):
            assert re.search(r"ld\.global[.\w]*\.v4", ptx.asm["ptx"])  # 16 bytes an access
        assert ".local" not in ptx.asm["ptx"]
        if packed:
            assert "cvt.rn.f32.s" not in ptx.asm["ptx"] and "dp4a" in ptx.asm["ptx"]


# ---- on a GPU ----

# rows and columns of qkv, o, gate_up, down
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
LLAMA_1B = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)]
SMOLLM = [(960, 576), (576, 576), (3072, 576), (576, 1536)]


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_1B, SMOLLM])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4", "int4"])
def test_model_shapes_on_the_gpu(weight_format, model):
    for i, ((rows, width), case) in enumerate(
        zip(model, ["norm", "accumulate", "norm gated", "accumulate"], strict=True)
    ):
        linear, x, norm = make(weight_format, rows, width, torch.bfloat16, bias=i == 0, device="cuda", seed=i)
        flags = {key: key in case for key in ("gated", "accumulate")}
        norm = norm if "norm" in case else None
        first = check(linear, x, norm, **flags)
        assert torch.equal(check(linear, x, norm, **flags), first)  # bit for bit, call after call
        if weight_format != "bf16":
            check(linear, x, norm, packed=False, **flags)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize(("rows", "width"), [*LLAMA_8B, *SMOLLM])
def test_nf4_bytes_on_the_gpu(rows, width):
    """The layout by hand, without bitsandbytes: random bytes, the first weight of a byte in its high nibble."""
    g = torch.Generator("cuda").manual_seed(rows)
    data = torch.randint(0, 256, (rows * width // 2, 1), generator=g, dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * width // 64, generator=g, device="cuda") + 0.5
    code = torch.linspace(-1, 1, 16, device="cuda") ** 3
    state = SimpleNamespace(absmax=absmax, code=code)
    linear = QuantLinear.of_stored(data, "nf4", state, (rows, width), torch.bfloat16)
    x = torch.randn(1, width, generator=g, device="cuda").bfloat16()
    nibbles = torch.stack((linear.data >> 4, linear.data & 15), dim=-1).view(-1, 64).int()
    weight = (code[nibbles] * absmax[:, None]).view(rows, width)
    expected = x.double() @ weight.double().T
    for packed in (True, False):
        out = torch.full((1, rows), float("nan"), dtype=torch.bfloat16, device="cuda")
        assert error(vector_linear(x, linear, out, packed=packed), expected.bfloat16()) <= 3e-3


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4", "int4"])
def test_odd_shapes_on_the_gpu(weight_format, dtype):
    for rows, width in ((9, 64), (123, 192), (122, 448), (2050, 576), (77, 65536)):
        linear, x, norm = make(weight_format, rows, width, dtype, bias=True, device="cuda")
        x, norm = x.to(linear.compute_dtype), norm.to(linear.compute_dtype)
        # a third of the bound in float32 is for torch's own order of summation
        tolerance = 1e-5 if x.dtype == torch.float32 else None
        check(linear, x, norm, tolerance=tolerance, accumulate=True)
        if rows % 2 == 0:
            check(linear, x, norm, tolerance=tolerance, gated=True)


@pytest.mark.gpu
@not_interpreted
def test_every_tuning_gives_the_same_result():
    for weight_format in ("bf16", "int8", "nf4", "int4"):
        linear, x, norm = make(weight_format, 512, 4096, torch.bfloat16, device="cuda")
        for shape in ((2, 1024, 1, 1), (4, 2048, 2, 2), (8, 4096, 4, 1), (4, 4096, 8, 3), (16, 1024, 4, 1)):
            check(linear, x, norm, gated=True, tuning=Tuning(*shape))


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("weight_format", ["int8", "nf4", "int4"])
def test_offsets_beyond_two_gib(weight_format):
    """More than 2^31 stored bytes of int8, and 4-bit ones of more than 2^32 weights: the last rows are as the first."""
    need_bitsandbytes(weight_format)
    width = 16384
    rows = (2**31 if weight_format == "int8" else 2**32) // width + 256
    few, x, _ = make(weight_format, 256, width, torch.bfloat16, device="cuda")
    repeat = rows // 256
    if weight_format == "nf4":
        scale = SimpleNamespace(absmax=few.absmax.repeat(repeat), code=few.code)
    else:
        scale = (few.row_scale if weight_format == "int8" else few.group_scale).repeat(repeat, 1)
    many = QuantLinear.of_stored(few.data.repeat(repeat, 1), weight_format, scale, (rows, width), torch.bfloat16)
    assert many.data.numel() > 2**31
    expected = vector_linear(x, few)
    assert error(expected, vector_linear_reference(x, few)) <= TOLERANCE[torch.bfloat16]
    out = torch.full((1, rows), float("nan"), dtype=torch.bfloat16, device="cuda")
    vector_linear(x, many, out)
    assert torch.equal(out.view(repeat, 256), expected.expand(repeat, -1))
    vector_linear(x, many, out.fill_(float("nan")), packed=False)
    assert error(out[:, -256:], expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4", "int4"])
def test_a_captured_call_reads_x_again_and_allocates_nothing(weight_format):
    linear, x, norm = make(weight_format, 4096, 4096, torch.bfloat16, device="cuda")
    out = torch.empty(1, 4096, dtype=torch.bfloat16, device="cuda")
    vector_linear(x, linear, out, norm_weight=norm, eps=1e-5)
    torch.cuda.synchronize()
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    vector_linear(x, linear, out, norm_weight=norm, eps=1e-5)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vector_linear(x, linear, out, norm_weight=norm, eps=1e-5)
    x.copy_(x.flip(1))
    out.fill_(float("nan"))
    graph.replay()
    expected = vector_linear_reference(x, linear, norm_weight=norm, eps=1e-5)
    assert error(out, expected) <= TOLERANCE[torch.bfloat16]
