"""GPU memory that sessions take and give back: `pytest -m gpu`. In a process of its own, where cuBLAS is still new."""

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu

PROGRAM = """
import gc, json, sys
import torch
import longrun

def settled():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()

runtime = longrun.load(
    sys.argv[1], budget="rtx4090-24g", head_map="full", kv_format="int4", weight_format="int4", device="cuda",
    ctx=40_000, chunk_size=16_384,
)
before = settled()
taken = []
for _ in range(2):
    session = runtime.new_session()
    session.prefill(list(range(90)) * 200)
    taken.append(torch.cuda.memory_reserved() - before)
    del session
    taken.append(settled() - before)
planned = {item.name: item.bytes for item in runtime.plan.items}
print(json.dumps({"taken": taken, "activations": planned["activations"]}))
"""


def test_a_session_gives_its_memory_back_and_the_next_takes_no_more(tmp_path):
    tiny_model("llama", head_dim=64, hidden_size=192, intermediate_size=4096).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["activations"] > 2**27
    first, kept, second, kept_again = found["taken"]
    assert kept < 2**26 and kept_again < 2**26, found  # cuBLAS's workspace and small tensors
    assert second < first + 2**24, found
