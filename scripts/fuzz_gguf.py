"""The GGUF file that fuzz.py damages, damage of its header, and an independent reading of it.

The reading is the `gguf` package's own reader and transformers' model, put together by llama.cpp's rules. It looks only
at what decides the logits: what longrun refuses beyond that is not its business.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scripts.tiny_gguf import write_gguf

FILE = "model.gguf"
_WHOLE = (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_REAL = (0.0, -1.0, 1.0, 0.5, 1e-38, 1e38, float("nan"), float("inf"), 500.0)


def make_gguf(folder: Path, model: Path) -> None:
    """The Llama of `model` in one file: Q8_0, RoPE factors, a SentencePiece tokenizer and a chat template."""
    folder.mkdir()
    source = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    write_gguf(folder / FILE, source, "Q8_0", tokenizer="llama")


def damage_gguf(rng: random.Random, file: Path) -> tuple[bytes, str]:
    """Another number or text in one entry of the header: a value, a length, a type, a dimension or a place."""
    content, reader = bytearray(file.read_bytes()), gguf.GGUFReader(file)
    entries = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    field = rng.choice([entry for entry in entries if len(entry.parts) < 50])
    number = rng.randrange(len(field.parts))
    at = field.offset + sum(int(part.nbytes) for part in field.parts[:number])
    size = int(field.parts[number].nbytes)
    if size == 8:
        new = struct.pack("<Q", rng.choice(_WHOLE))
    elif size == 4 and rng.random() < 0.7:
        new = struct.pack("<I", rng.choice(_WHOLE) % 2**32)
    elif size == 4:
        new = struct.pack("<f", rng.choice(_REAL))
    else:
        new = bytes(rng.choice((byte, 0, 255, byte ^ 1)) for byte in content[at : at + size])
    content[at : at + size] = new
    return bytes(content), f"header: {str(field.name)[:40]!r}, part {number} is {new[:16]!r}"


def model_by_package(folder: Path) -> LlamaForCausalLM:
    """transformers' model of the file. Raises what it likes where the file means none."""
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields.get("split.count", 1) < 2
    tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}

    def key(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        assert value is not None, name
        return value

    heads = key("attention.head_count")
    kv_heads = key("attention.head_count_kv", heads)
    head_dim = key("attention.key_length", key("embedding_length") // heads)
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]), hidden_size=key("embedding_length"), head_dim=head_dim,
        intermediate_size=key("feed_forward_length"), num_hidden_layers=key("block_count"), num_attention_heads=heads,
        num_key_value_heads=kv_heads, rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=key("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)},
    )  # fmt: skip
    assert config.num_hidden_layers < 100 and config.hidden_size * config.intermediate_size < 10**8
    model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {}
    for name in model.state_dict():
        value = tensors[names.get_name(name, try_suffixes=(".weight",))]
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if f".{part}." in name:
                pairs = value.unflatten(0, (count, head_dim // 2, 2))
                value = torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).flatten(0, 1)
        state[name] = value
    model.load_state_dict(state)
    if "rope_freqs.weight" in tensors:
        model.model.rotary_emb.inv_freq /= tensors["rope_freqs.weight"]
    return model.eval()
