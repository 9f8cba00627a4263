"""Checkpoint and adapter as one model of transformers: what `longrun.load(adapter=)` runs, to be measured.

The adapter is added in float32 to the weights as the checkpoint holds them, and the sum is rounded once, to the model's
dtype. RoPE base and trained positions are the adapter's where it names them. Nothing of the adapter stays in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrun.config.model_config import ModelConfig
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import check_base, find_tensors
from longrun.model.rope import RopeParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_merged(model_dir: str | Path, adapter: Adapter | None, **options: Any) -> PreTrainedModel:
    """transformers' causal language model of the checkpoint with the adapter merged, on the CPU.

    Args:
        model_dir: checkpoint folder.
        adapter: what is added; None loads the checkpoint as it is.
        options: of `AutoModelForCausalLM.from_pretrained`, such as dtype and attn_implementation.

    Raises:
        CheckpointError: the adapter was made for another checkpoint, or a tensor of either cannot be read.
        OSError, ValueError, KeyError, ImportError, RuntimeError: as transformers raises them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    if adapter is not None:
        rope = adapter.adapted_rope(RopeParameters.from_dir(model_dir))
        config.rope_parameters = dict(rope.values)
        config.max_position_embeddings = rope.max_position_embeddings
    model = AutoModelForCausalLM.from_pretrained(
        str(model_dir), config=config, local_files_only=True, trust_remote_code=False, **options
    )
    if adapter is not None:
        merge_weights(model, model_dir, adapter)
    return model


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
