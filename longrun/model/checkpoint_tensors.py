"""The tensors of a checkpoint, whatever it comes in, compared with its config before one of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longrun.config.gguf_header import gguf_file
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError, quoted, short_path, shortened
from longrun.model.gguf_tensors import Dequantize, find_gguf_tensors
from longrun.model.safetensors_folder import and_more, read_folder
from longrun.model.stored_tensor import StoredTensor


def find_tensors(
    model_dir: str | Path, config: ModelConfig, dequantize_gguf: Mapping[str, Dequantize] | None = None
) -> Mapping[str, StoredTensor]:
    """Every tensor of the checkpoint by our name, after checking that it is the one `config` describes.

    Left-over tensors are errors, except `*.rotary_emb.inv_freq` (buffers in old Llama checkpoints) and
    `lm_head.weight` next to tied embeddings (checked for equality when it is loaded); in GGUF files see
    `longrun.model.gguf_tensors`.

    Raises:
        CheckpointError: no weights there, or a missing, left-over or misshapen tensor, a damaged or truncated file.
    """
    file = gguf_file(model_dir)
    if file is not None:
        return find_gguf_tensors(file, config, dequantize_gguf)
    folder = Path(model_dir)
    tensors = read_folder(folder)
    wanted = {spec.name: spec.shape for spec in config.weights()}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"checkpoint {short_path(folder)} lacks tensor {missing[0]}{and_more(missing)}, which config.json calls "
            f"for: fetch it again or correct config.json"
        )
    allowed = dict(wanted)
    if config.tie_word_embeddings:
        allowed["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    extra = [name for name in tensors if name not in allowed and not name.endswith(".rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(
            f"{short_path(tensors[extra[0]].file)} holds tensor {shortened(extra[0])}{and_more(extra)}, which a "
            f"{config.architecture} of this config.json does not have: correct config.json or use another checkpoint"
        )
    for name, shape in allowed.items():
        if name not in tensors:
            continue
        _ = tensors[name].torch_dtype  # refuses what no weight comes in
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{short_path(tensors[name].file)}: tensor {name} has shape {quoted(list(tensors[name].shape))} where "
                f"config.json calls for {list(shape)}: correct config.json or fetch the checkpoint again"
            )
    return tensors
