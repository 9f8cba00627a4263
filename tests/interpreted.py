"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there.

Triton decides when a kernel is decorated whether it is interpreted. A file's interpreted tests, which have the word in
their names, therefore run in a process of their own: it collects that file with TRITON_INTERPRET=1, and they are
defined there alone.
"""

import os
import re

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the kernels of this process are interpreted")

# Of `error`. The interpreter cuts bfloat16 off where everything else rounds: twice the error of one rounding.
LIMIT = {
    torch.float32: 1e-6 if INTERPRETED else 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
}


def interpreted_tests(warm_interpreter, file):
    """Run the interpreted tests of a file, in a process apart; how many passed. All must."""
    done = warm_interpreter.run("-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", file)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def same_bits(actual, expected):
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def error(actual, expected):
    """Norm of the difference over the norm of what is expected; NaN never passes a comparison."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def compiled(kernel, capability, pointers, constants, num_warps, aligned=()):
    """PTX of the kernel for a GPU that is not there; arguments that are no pointers as the launcher passes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {n: pointers.get(n, "fp32" if n == "eps" else "i64" if "stride" in n else "i32") for n in kernel.arg_names}
    names = list(types)
    types |= dict.fromkeys(constants, "constexpr")
    hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or n in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()}, hints)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    assert built.asm["cubin"] and f".target sm_{capability}" in built.asm["ptx"]
    return built.asm["ptx"]


def accesses(ptx):
    """A kernel's accesses to global memory in order: ("ld" or "st", bytes)."""
    found = re.findall(r"(ld|st)\.global(?:\.[a-z_:0-9A-Z]+)*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
    return [(kind, int(many or 1) * int(bits) // 8) for kind, many, bits in found]
