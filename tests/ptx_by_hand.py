"""A few PTX instructions, executed by numpy: Triton's interpreter has no inline PTX."""

import re

import numpy as np


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
            "mad": lambda a, b, c: a * b + c,
            "or": lambda a, b: a | b,
            "shr": lambda a, b: a >> b,
            "shl": lambda a, b: a << b,
            "prmt": prmt,
            "dp4a": lambda *v, kinds=kinds: dp4a(kinds, *v),
        }[operation](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def words(*values):
    return [np.array([v & 0xFFFFFFFF], dtype=np.uint32) for v in values]
