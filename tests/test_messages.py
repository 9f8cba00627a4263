"""Every message cuts a bad value short and says what to do, wherever the value comes in."""

from __future__ import annotations

import json
import time

import pytest
from planned_models import LLAMA_JSON, SMALL

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import MESSAGE_LIMIT, LongrunError
from longrun.lab.quality.settings import read_rows
from longrun.model.adapter import Adapter
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify_settings import IdentifySettings
from longrun.plan.budget import Budget
from longrun.plan.plan import choose_split, make_plan
from longrun.quant.kv_format import PageFormat
from longrun.quant.weight_format import linear_bytes
from longrun.units import parse_bytes, parse_tokens

LONG = "x" * 300_000
VALUES = {
    "text": LONG,
    "escapes": "\x1b[2J\n\0" * 50_000,
    "list": [[LONG[:99]]] * 3_000,
    "object": {LONG: {LONG: LONG[:99]}},
    "number": 10**5000,
}


def folder_with(tmp_path, name: str, text: str):
    (tmp_path / name).write_text(text)
    return tmp_path


def head_map(tmp_path, value):
    folder_with(tmp_path, "full_attention_heads.tsv", "1\t0\n" if not isinstance(value, str) else f"1\t{value}\n")
    folder_with(tmp_path, "config.json", json.dumps({"sink_size": value}))
    return HeadMap.load(tmp_path)


def adapter(tmp_path, key, value):
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], key: value}
    folder_with(tmp_path, "adapter_model.safetensors", "")
    return Adapter.open(folder_with(tmp_path, "adapter_config.json", json.dumps(settings)), SMALL)


def model(tmp_path, data):
    return ModelConfig.from_dir(folder_with(tmp_path, "config.json", json.dumps(data)))


PLACES = {
    **{f"config {key}": (lambda p, v, key=key: ModelConfig.from_dict({**LLAMA_JSON, key: v}, "config.json"))
       for key in ("architectures", "model_type", "auto_map", "hidden_act", "hidden_size", "rms_norm_eps", "rope_theta",
                   "rope_scaling", "layer_types", "tie_word_embeddings", "attention_chunk_size")},
    "config source": lambda p, v: ModelConfig.from_dict({}, str(v)[:9000] if isinstance(v, str) else LONG),
    "config of one name": lambda p, v: ModelConfig.from_dict({**LLAMA_JSON, "architectures": [v]}, "config.json"),
    "config rope factor": lambda p, v: ModelConfig.from_dict(
        {**LLAMA_JSON, "rope_scaling": {"type": "linear", "factor": v}}, "config.json"
    ),
    **{f"adapter {key}": (lambda p, v, key=key: adapter(p, key, v))
       for key in ("peft_type", "r", "lora_alpha", "target_modules", "bias", "longrun", "made_up")},
    "head map": head_map,
    **{f"budget {key}": (lambda p, v, key=key: Budget(**{"device_bytes": 10**9, key: v}))
       for key in ("device_bytes", "host_bytes", "kv_format", "weight_format", "retrieval_ratio", "sink_size",
                   "page_size", "chunk_size")},
    "budget name": lambda p, v: Budget.load(v),
    "budget key": lambda p, v: Budget.parse(f"[memory]\n{LONG} = 1"),
    "budget section": lambda p, v: Budget.parse(f"[{LONG}]\na = 1"),
    "head map name": lambda p, v: choose_split(SMALL, Budget(device_bytes=10**9), v),
    "tokens": lambda p, v: parse_tokens(v, "--ctx"),
    "bytes": lambda p, v: parse_bytes(v),
    "page format": lambda p, v: PageFormat(v, 64, 64),
    "weight format": lambda p, v: linear_bytes(16, 16, v, 4, False),
    "identify method": lambda p, v: IdentifySettings(str(p), str(p), v).resolved(False),
    "model folder": lambda p, v: longrun.load(v, device="cpu"),
    "load device": lambda p, v: longrun.load(p, device=v),
    "load context": lambda p, v: longrun.load(p, device="cpu", ctx=v),
    "settings file": lambda p, v: read_rows(folder_with(p, "a.toml", f"[[row]]\nname = 'a'\nkv = '{LONG}'") / "a.toml"),
    "plan": lambda p, v: make_plan(SMALL, Budget.parse("[memory]\ngpu = 1", LONG), 100),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_long_value_is_cut(tmp_path, place):
    began = time.process_time()
    for name, value in VALUES.items():
        if place.startswith(("adapter", "head map")) and name == "number":
            value = 10**99  # the file's own limit comes first
        if place == "head map" and name == "escapes":
            continue  # cells of a table
        with pytest.raises(LongrunError) as caught:
            PLACES[place](tmp_path, value)
        message = str(caught.value)
        assert message.isprintable() and 30 <= len(message) <= MESSAGE_LIMIT, (name, len(message))
        assert LONG[:165] not in message
    assert time.process_time() - began < 2
