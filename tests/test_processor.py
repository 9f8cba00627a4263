"""What a bf16 product holds in memory on processors of every kind: the rule, and the one that is here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

from longrun.machine import processor
from longrun.machine.processor import bf16_product_copy_bytes

ROOT = Path(__file__).resolve().parents[1]
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


MEASURE = """
import json, sys
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.model.checkpoint import load_decoder
from longrun.specs.model_bytes import activation_bytes
from longrun.machine.processor import bf16_product_copy_bytes

class Copy:
    def run(self, layer_idx, q, k, v, step):
        return q.clone(memory_format=torch.contiguous_format)

torch.set_num_threads(1)
folder, tokens = Path(sys.argv[1]), 700
config = ModelConfig.from_dir(folder)
decoder = load_decoder(folder, config, [list(range(config.num_kv_heads))] * config.num_layers, "bf16", "cpu")

def one_step():
    step = Step(0, tokens, torch.ones(tokens, config.head_dim), torch.ones(tokens, config.head_dim))
    decoder.logits(decoder.forward(torch.zeros(tokens, dtype=torch.int64), step, Copy()))

one_step()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
    one_step()
trace = folder / "trace.json"
profiler.export_chrome_trace(str(trace))
events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
live = peak = 0
for event in sorted(events, key=lambda event: event["ts"]):
    live += event["args"]["Bytes"]
    peak = max(peak, live)
copied = bf16_product_copy_bytes()
print(json.dumps([copied, peak, activation_bytes(config, tokens, 2, "bf16", product_copy=copied)]))
"""


@pytest.mark.skipif(not processor._flags(processor._CPUINFO) >= processor._AVX512_CORE, reason="needs AVX-512")
def test_activations_are_as_planned_without_bf16_instructions(tmp_path):
    """The measurement of test_decoder.py in a process whose oneDNN is set to see none in the processor."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    save_tiny(tmp_path, "llama", **sizes, intermediate_size=768, num_hidden_layers=2)
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    copied, peak, promised = json.loads(done.stdout.splitlines()[-1])
    assert copied == 4
    assert 0.75 * promised <= peak <= 1.02 * promised
