"""Checkpoint and adapter as one model of transformers: what `longrun.load(adapter=)` runs, to be measured.

The adapter is added in float32 to the weights as the checkpoint holds them, and the sum is rounded once, to the model's
dtype. RoPE base and trained positions are the adapter's where it names them. Nothing of the adapter stays in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrun.config.config_file import read_config
from longrun.config.gguf_header import gguf_file
from longrun.config.model_config import ModelConfig
from longrun.model.adapter import Adapter
from longrun.model.checkpoint_tensors import find_tensors
from longrun.model.fingerprint import check_base
from longrun.model.rope import RopeParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_merged(
    model_dir: str | Path, adapter: Adapter | None, yarn: float | None = None, **options: Any
) -> PreTrainedModel:
    """transformers' causal language model of the checkpoint with the adapter merged, on the CPU.

    Args:
        model_dir: checkpoint folder, or a GGUF file.
        adapter: what is added; None loads the checkpoint as it is.
        yarn: as of `ModelConfig.stretched`.
        options: of `AutoModelForCausalLM.from_pretrained`, such as dtype and attn_implementation.

    Raises:
        CheckpointError: the adapter was made for another checkpoint, or a tensor of either cannot be read.
        OSError, ValueError, KeyError, ImportError, RuntimeError: as transformers raises them.
    """
    from transformers import AutoModelForCausalLM

    if gguf_file(model_dir) is not None:
        model = _of_gguf(model_dir, options)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False, **options
        )
    rope = RopeParameters.from_dir(model_dir, yarn)
    if adapter is not None:
        merge_weights(model, model_dir, adapter)
        rope = adapter.adapted_rope(rope)
    set_rope(model, rope)
    return model


def set_rope(model: PreTrainedModel, rope: RopeParameters) -> None:
    """Let a model of transformers, on the CPU, turn queries and keys by `rope`."""
    model.config.rope_parameters = dict(rope.values)
    model.config.max_position_embeddings = rope.max_position_embeddings
    rotary = type(model.model.rotary_emb)(model.config)
    if rope.factors is not None:
        rotary.inv_freq /= torch.tensor(rope.factors)
    model.model.rotary_emb = rotary


def _of_gguf(model_dir: str | Path, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a GGUF file without its RoPE: its tensors as our loader reads them, one at a time."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape = ModelConfig.from_dir(model_dir)
    config = CONFIG_MAPPING[shape.model_type].from_dict(read_config(model_dir).data)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    state = {}
    for name, stored in find_tensors(model_dir, shape).items():
        values = torch.empty(stored.shape, dtype=stored.torch_dtype)
        stored.read_into(values, 0)
        state[name] = values.to(model.dtype)
    model.load_state_dict(state, strict=False, assign=True)  # not strict: a tied lm_head is missing
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def merge_weights(model: PreTrainedModel, model_dir: str | Path, adapter: Adapter) -> None:
    """Set every adapted weight of `model` to `W + scale * B @ A`, W in float32 from the checkpoint's files.

    Args:
        model: of the checkpoint `model_dir`, on the CPU, in any floating dtype.

    Raises:
        CheckpointError: the adapter was made for another checkpoint, or a tensor of either cannot be read.
    """
    config = ModelConfig.from_dir(model_dir)
    tensors = find_tensors(model_dir, config)
    check_base(adapter, tensors, config, model_dir)
    cpu = torch.device("cpu")
    for name in adapter.pairs:
        stored = tensors[name]
        weight = torch.empty(stored.shape, dtype=stored.torch_dtype)
        stored.read_into(weight, 0)
        change = adapter.change_of(name, cpu)
        assert change is not None
        merged = change.add_to(weight.float(), slice(0, stored.shape[0]))
        with torch.no_grad():
            model.get_parameter(name).copy_(merged)
