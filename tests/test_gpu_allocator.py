"""What torch's CUDA allocator reserves for weights against the arithmetic: `pytest -m gpu`. In a process of its own."""

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu
SEGMENT = 20 * 2**20

# The tensors alone, all kept, are exact; loading also allocates and frees pieces between them.
PROGRAM = """
import gc, json, sys
import torch
from longrun.config.model_config import ModelConfig
from longrun.model.checkpoint import load_decoder
from longrun.specs.device_allocator import rounding_bytes
from longrun.specs.model_bytes import model_weight_tensors

def settled():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()

config = ModelConfig.from_dir(sys.argv[1])
torch.zeros(1, device="cuda")
found = {}
for weight_format in ("bf16", "int4"):
    before = settled()
    sizes = list(model_weight_tensors(config, weight_format, "cuda"))
    kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    alone = torch.cuda.memory_reserved() - before
    del kept
    found[weight_format] = {"held": sum(sizes), "planned": sum(sizes) + rounding_bytes(sizes), "alone": alone}
before = settled()
order = [range(config.num_kv_heads)] * config.num_layers
decoder = load_decoder(sys.argv[1], config, order, "bf16", "cuda")
assert decoder.weight_bytes == found["bf16"]["held"]
found["bf16"]["loaded"] = settled() - before
print(json.dumps(found))
"""


def test_weights_of_odd_sizes_take_what_is_planned(tmp_path):
    tiny_model(
        "qwen2", head_dim=64, hidden_size=768, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8224,
        num_hidden_layers=8, vocab_size=9000,
    ).save_pretrained(tmp_path)  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bf16"]["planned"] - found["bf16"]["held"] > SEGMENT, found
    for row in found.values():
        assert row["alone"] == row["planned"], found
    assert abs(found["bf16"]["loaded"] - found["bf16"]["planned"]) <= SEGMENT, found
