"""Plan = truth: cache bytes to the byte, and the peak memory of a whole process within 5% + 200 MB of the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longrun.lab.planted import make_planted_model

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import torch, longrun
from longrun.patterns.head_map import HeadMap
model, options, prompt, ratio = sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
if ratio < 1:
    from longrun.config.model_config import ModelConfig
    config = ModelConfig.from_dir(model)
    options |= {"head_map": HeadMap.uniform(config.num_layers, config.num_kv_heads, ratio), "retrieval_ratio": ratio}
runtime = longrun.load(model, device="cpu", **options)
session = runtime.new_session()
ids = torch.randint(5, runtime.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
session.prefill(ids)
for _ in session.generate(8, temperature=0.7, top_p=0.9, eos=False):
    pass
held = session.cache.nbytes()
# not ru_maxrss: a process that was forked starts with its parent's
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
print(json.dumps({
    "peak": peak,
    "plan": runtime.plan.total_bytes,
    "held": held,
    "planned": runtime.plan.cache.device_bytes() | runtime.plan.cache.host_bytes(),
    "cache_bytes": session.cache_bytes,
    "planned_cache_bytes": runtime.plan.cache_bytes,
    "compiler": "torch._dynamo" in sys.modules,
    "weights": [runtime.parts.decoder.weight_bytes, next(i.bytes for i in runtime.plan.items if i.name == "weights")],
}))
"""

CASES = [
    ("demo", {"kv_format": "int4", "ctx": 600}, 550, 1.0),
    ("demo", {"kv_format": "int4", "ctx": 400, "device_share": 0.5, "weight_format": "nf4"}, 350, 0.5),
    ("demo", {"kv_format": "bf16", "ctx": 750, "device_share": 0.25, "chunk_size": 333}, 700, 0.67),
    ("demo", {"kv_format": "int4", "ctx": 300_000}, 300, 1.0),  # everything is allocated and touched at the start
    ("planted", {"kv_format": "fp32", "ctx": 200_000, "device_share": 0.5}, 300, 1.0),
    ("planted", {"kv_format": "int4", "ctx": 6_000, "weight_format": "bf16"}, 5_500, 0.25),
    ("planted", {"kv_format": "k5v3", "ctx": 6_000, "prefill": "sparse", "prefill_dense": 0}, 5_500, 1.0),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return make_planted_model(tmp_path_factory.mktemp("planted") / "tiny").path


@pytest.mark.parametrize(("model", "options", "prompt", "ratio"), CASES)
def test_memory_is_as_planned(planted, demo_model, model, options, prompt, ratio):
    folder = {"planted": planted, "demo": demo_model}[model]
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(folder), json.dumps(options), str(prompt), str(ratio)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held"] == found["planned"]
    assert found["cache_bytes"] == found["planned_cache_bytes"]
    assert found["weights"][0] == found["weights"][1]
    if model == "demo" and options.get("weight_format") != "nf4":  # a GGUF file; bitsandbytes imports what it likes
        assert not found["compiler"], "something imports what only training uses: seconds and 150 MB at every start"
    slack = 0.05 * found["plan"] + 200e6
    print(f"{model} {options}: plan {found['plan'] / 1e6:.0f} MB, peak {found['peak'] / 1e6:.0f} MB")
    assert abs(found["peak"] - found["plan"]) <= slack, (found["peak"] / 1e6, found["plan"] / 1e6)
