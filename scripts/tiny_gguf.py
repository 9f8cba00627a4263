"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TYPE = gguf.GGMLQuantizationType
_ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
LETTERS = [chr(code) for code in range(33, 123)]


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as Llama files hold them: a head's first half and its second half by turns."""
    heads = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.stack((heads[:, 0], heads[:, 1]), axis=2).reshape(weight.shape)


def write_gguf(
    file: Path,
    model: transformers.PreTrainedModel,
    kind: str | TYPE = TYPE.F32,
    *,
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    tokenizer: str | None = None,
    tensors: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    drop: tuple[str, ...] = (),
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write `model` to `file`.

    Args:
        kind: type of the matrices, F16 where a row is no whole number of its blocks; vectors are F32.
        change: adds metadata.
        tokenizer: "gpt2" or "llama": a vocabulary of letters of the model's size.
        tensors: changes the tensors (float32, by their names in the file) before they are quantized.
        drop: metadata keys, without the architecture, that are left out.
    """
    kind = TYPE[kind] if isinstance(kind, str) else kind
    config = model.config
    arch = _ARCH[config.model_type]
    writer = gguf.GGUFWriter(file, arch, endianess=endianess)
    given: dict[str, Callable[[], Any]] = {
        "context_length": lambda: writer.add_context_length(config.max_position_embeddings),
        "embedding_length": lambda: writer.add_embedding_length(config.hidden_size),
        "block_count": lambda: writer.add_block_count(config.num_hidden_layers),
        "feed_forward_length": lambda: writer.add_feed_forward_length(config.intermediate_size),
        "head_count": lambda: writer.add_head_count(config.num_attention_heads),
        "head_count_kv": lambda: writer.add_head_count_kv(config.num_key_value_heads),
        "rms_eps": lambda: writer.add_layer_norm_rms_eps(config.rms_norm_eps),
        "freq_base": lambda: writer.add_rope_freq_base(config.rope_parameters["rope_theta"]),
        "vocab_size": lambda: writer.add_vocab_size(config.vocab_size),
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        given["key_length"] = lambda: (writer.add_key_length(head_dim), writer.add_value_length(head_dim))
    if arch == "llama":
        given["rope_dimension_count"] = lambda: writer.add_rope_dimension_count(head_dim)
        if getattr(config, "sliding_window", None):
            given["sliding_window"] = lambda: writer.add_sliding_window(config.sliding_window)
    for name, add in given.items():
        if name not in drop:
            add()
    _add_rope(writer, config)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    change(writer)
    found = named_tensors(model)
    tensors(found)
    for name, value in found.items():
        its_kind = TYPE.F32 if value.ndim == 1 else kind
        if value.shape[-1] % gguf.GGML_QUANT_SIZES[its_kind][0]:
            its_kind = TYPE.F16
        if its_kind == TYPE.F32:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
        else:
            stored = random_blocks(value.shape, its_kind) if its_kind in UNWRITTEN else gguf.quantize(value, its_kind)
            writer.add_tensor(name, stored, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def named_tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors by their names in a GGUF file, in float32."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCH[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        for part, num_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name and _ARCH[config.model_type] == "llama":
                array = interleaved(array, num_heads)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    if config.rope_parameters["rope_type"] == "llama3":
        head_dim, base = config.head_dim, config.rope_parameters["rope_theta"]
        frequencies = base ** -(torch.arange(0, head_dim, 2) / head_dim)
        found["rope_freqs.weight"] = (frequencies / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).numpy()
    return found


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])


UNWRITTEN = (TYPE.Q2_K, TYPE.Q3_K, TYPE.Q4_K, TYPE.Q5_K, TYPE.Q6_K)
"""Types that the package reads and does not write."""
_SCALES = {TYPE.Q2_K: (80, 82), TYPE.Q3_K: (108,), TYPE.Q4_K: (0, 2), TYPE.Q5_K: (0, 2), TYPE.Q6_K: (208,)}


def random_blocks(shape: tuple[int, ...], kind: TYPE, seed: int = 0) -> np.ndarray:
    """Random blocks of a type with scales that keep the values near 0.1: uint8 [rows, bytes]."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng([seed, *shape])
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // size, num_bytes), dtype=np.uint8)
    for at in _SCALES[kind]:
        scale = generator.uniform(1e-5, 2e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def add_tokenizer(writer: gguf.GGUFWriter, kind: str, vocab_size: int) -> None:
    """A vocabulary of three control tokens and letters, with a few merges."""
    blank = "\u0120" if kind == "gpt2" else "\u2581"
    pieces = [blank, *LETTERS, "th", "the", f"{blank}the"]
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    tokens += [f"[unused{number}]" for number in range(vocab_size - len(tokens))]
    kinds = [2 if kind == "llama" else 3, 3, 3] + [1] * len(pieces) + [5] * (vocab_size - 3 - len(pieces))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if kind == "gpt2":
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(["t h", "th e", f"{blank} the"])
    else:
        writer.add_token_scores([-float(number) for number in range(vocab_size)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[a]")
