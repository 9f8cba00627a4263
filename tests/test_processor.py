"""What a bf16 product holds in memory on processors of every kind: the rule, and the one that is here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longrun import processor
from longrun.processor import bf16_product_copy_bytes

TESTS = Path(__file__).resolve().parent
AVX2 = "fpu avx avx2 fma"
AVX512 = AVX2 + " avx512f avx512bw avx512dq avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("flags", "limit", "copied"),
    [
        (AVX512 + " avx512_bf16", None, 0),
        (AVX512 + " amx_bf16 amx_tile", None, 0),
        (AVX512, None, 4),
        (AVX2, None, 0),
        (AVX2 + " avx512f", None, 0),
        (AVX2 + " avx_ne_convert", None, 4),
        (AVX512 + " avx512_bf16", "AVX512_CORE", 4),
        (AVX512 + " avx512_bf16", "avx512_core_vnni", 4),
        (AVX512 + " avx512_bf16", "AVX512_CORE_BF16", 0),
        (AVX512 + " avx512_bf16", "AVX2", 0),
        (AVX512 + " avx512_bf16", "AVX2_VNNI_2", 0),
        (AVX512 + " avx512_bf16", "nonsense", 0),
        (AVX512, "ALL", 4),
        ("", None, 4),
    ],
)
def test_the_rule(tmp_path, flags, limit, copied):
    file = tmp_path / "cpuinfo"
    one = f"processor\t: 0\nflags\t\t: {flags}\n\n"
    file.write_text(one * 2 if flags else "x: y\n")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        assert bf16_product_copy_bytes(file, {name: limit} if limit else {}) == copied


def test_an_unknown_machine_gets_the_larger_plan(tmp_path):
    assert bf16_product_copy_bytes(tmp_path / "none", {}) == 4


@pytest.mark.skipif(not processor._flags(processor._CPUINFO) >= processor._AVX512_CORE, reason="needs AVX-512")
def test_activations_are_as_planned_without_bf16_instructions():
    """The measurement of test_decoder.py, with oneDNN told that the processor has none."""
    name = "test_decoder.py::test_activation_bytes_are_the_measured_peak[shape2-700-bf16]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / name)],
        capture_output=True, text=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
