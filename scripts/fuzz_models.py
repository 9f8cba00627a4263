"""The sound files that fuzz.py damages: a model of two tiny layers in shards, its tokenizer, an adapter, a session."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import longrun
from longrun.config.model_config import ModelConfig
from longrun.patterns.reach_losses import ReachLosses

TEXT = "The lighthouse keeper wrote 27 letters."
PROMPT = [5, 40, 41, 3, 17, 60, 61, 62, 9, 33, 12, 70, 71, 5, 90]
CAPACITY = 256
RANK, ALPHA = 2, 6


def make_model(folder: Path) -> None:
    """A random Llama of 2 layers, 4 query and 2 KV heads of 16, 97 token ids, in 2 or more shards with a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0,
        eos_token_id=1, rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="30KB")
    letters = [chr(code) for code in range(32, 126)]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[a]",
    ).save_pretrained(folder)  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))


def make_adapter(folder: Path, model: Path) -> None:
    """A random LoRA adapter of q, v and down in peft's format, with the section `longrun`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    targets, tensors = ("q_proj", "v_proj", "down_proj"), {}
    for spec in ModelConfig.from_dir(model).weights():
        name = spec.name.removesuffix(".weight")
        if name.rpartition(".")[2] in targets:
            for part, shape in (("lora_A", (RANK, spec.shape[1])), ("lora_B", (spec.shape[0], RANK))):
                tensors[f"base_model.model.{name}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none",
        "lora_dropout": 0.0, "use_rslora": False, "modules_to_save": None,
        "longrun": {"rope_theta": 9000.0, "max_position_embeddings": 1024},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def make_head_map(folder: Path) -> None:
    """A head map of the model, as `longrun.patterns.identify` would write it."""
    losses = ReachLosses(64, 1024, (64, 128), (((0.5, 0.25), (0.125, 0.0)), ((3.0, 1.5), (2.0, 1e-3))))
    head_map = longrun.HeadMap(((0.9, 0.125), (0.25, 1.0)), 64, 64, reach_losses=losses)
    head_map.save(folder, facts={"identification": {"model": "tiny"}})


def make_session(folder: Path, runtime: longrun.Runtime) -> None:
    """A session of pages, tail and sinks: 200 tokens."""
    session = runtime.new_session(CAPACITY)
    session.prefill([5 + number * 7 % 90 for number in range(200)])
    session.extra["note"] = "a session of fuzz.py"
    session.save(folder)
