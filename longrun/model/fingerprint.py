"""What tells one model from another: checksums of settings and of samples of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model.adapter import Adapter
from longrun.model.checkpoint_tensors import find_tensors
from longrun.model.rope import RopeParameters
from longrun.model.stored_tensor import StoredTensor

_SAMPLE_BYTES = 4096


def model_fingerprint(model_dir: str | Path, adapter: Adapter | str | None = None) -> str:
    """sha256 (hex) that tells one model from another in a moment, however large: the translated config, RoPE
    parameters, of every tensor its name, dtype, shape and the first and last 4 KiB of its data, and the adapter
    (or its `digest`).

    Names of files and folders and the sharding do not enter, and a quantized tensor of a GGUF file counts with its
    values as float32: such a file has the fingerprint of its conversion to a float32 checkpoint. Raises as
    `find_tensors` and `ModelConfig.from_dir`.
    """
    config = ModelConfig.from_dir(model_dir)
    tensors = find_tensors(model_dir, config)
    rope = RopeParameters.from_dir(model_dir)
    digest = hashlib.sha256(json.dumps([config.arithmetic(), *rope.parts()], sort_keys=True).encode())
    _digest_tensors(digest, tensors, config)
    if adapter is not None:
        digest.update((adapter if isinstance(adapter, str) else adapter.digest()).encode())
    return digest.hexdigest()


def weights_fingerprint(model_dir: str | Path) -> str:
    """sha256 (hex) of the tensors alone, as in `model_fingerprint`: what an adapter names as its base."""
    config = ModelConfig.from_dir(model_dir)
    return _weights_digest(find_tensors(model_dir, config), config)


def _weights_digest(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> str:
    digest = hashlib.sha256()
    _digest_tensors(digest, tensors, config)
    return digest.hexdigest()


def check_base(
    adapter: Adapter, tensors: Mapping[str, StoredTensor], config: ModelConfig, model_dir: str | Path
) -> None:
    """Raise CheckpointError where the adapter names another base than the checkpoint's tensors (`find_tensors`)."""
    if adapter.base_weights is not None and adapter.base_weights != _weights_digest(tensors, config):
        raise CheckpointError(
            f"adapter {adapter.folder} was made for another checkpoint than {model_dir} (the weights' fingerprints "
            f"differ): use it with its own base model"
        )


def _digest_tensors(digest: hashlib._Hash, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Take name, dtype, shape, first and last bytes of every tensor of the model into `digest`."""
    for spec in sorted(config.weights()):
        tensor = tensors[spec.name]
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        head = min(_SAMPLE_BYTES, tensor.num_bytes)
        tail = min(_SAMPLE_BYTES, tensor.num_bytes - head)
        digest.update(tensor.read_bytes(0, head))
        digest.update(tensor.read_bytes(tensor.num_bytes - tail, tail))
