"""What the tests of both kernels of streaming heads need: rings, tolerances, and kernels compiled without a GPU."""

import re
import subprocess
from pathlib import Path

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of RMS ratios


def rms_ratio(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def random_ring(heads, sink_size, recent_size, head_dim, dtype, start, device="cpu", num_slots=None):
    """k, v of a ring before token `start`; what has not been written yet is NaN."""
    g = torch.Generator(device).manual_seed(start + 1)
    num_slots = sink_size + recent_size if num_slots is None else num_slots
    rings = torch.randn(2, heads, num_slots, head_dim, generator=g, device=device).to(dtype)
    rings[:, :, min(start, sink_size + recent_size) :] = float("nan")
    return rings


def compiled(kernel, item, constants, capability, **options):
    """The kernel as a launch with aligned tensors would have it, and its stack in bytes (spilled registers)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"partials": "*fp32", "lengths": "*i32", "counters": "*i32"}
    data = ("q", "k", "v", "ring_k", "ring_v", "out")
    types = {name: pointers.get(name, f"*{item}" if name in data else "i32") for name in kernel.arg_names}
    types |= {"scale_log2": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = list(types)
    even = [i for i, name in enumerate(names) if types[name][0] == "*" or "stride" in name]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, types, {(names.index(n),): x for n, x in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"] and f".target sm_{capability}" in built.asm["ptx"]
    return built


def stack_bytes(built, tmp_path):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout + done.stderr)[1])
