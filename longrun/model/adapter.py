"""Low-rank adapters (LoRA, arXiv 2106.09685) in peft's format, added to the weights while they are loaded.

A folder holds adapter_config.json and adapter_model.safetensors; a linear's weight W becomes
`W + (lora_alpha / r) * B @ A`, computed in float32 before anything is permuted or quantized. Nothing of the adapter
stays in memory. An optional section `longrun` of adapter_config.json says what else the adapter was trained with:
`rope_theta`, `max_position_embeddings`, and `base_weights`, the `weights_fingerprint` of the checkpoint it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrun.config.model_config import ModelConfig
from longrun.config.values import is_number
from longrun.errors import CheckpointError, quoted, short_path, shortened
from longrun.files.user_files import read_object
from longrun.model.rope import RopeParameters
from longrun.model.safetensors_file import read_header
from longrun.model.stored_tensor import StoredTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 256

_PREFIX = "base_model.model."
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "longrun"}
# What only training looks at, or a note for people.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Variants by the key that asks for them: another arithmetic, or more tensors, than W + scale * B @ A.
_VARIANTS = {
    "use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "bias": "trained biases", "lora_bias": "biases of LoRA layers", "modules_to_save": "whole trained modules",
    "rank_pattern": "ranks by layer", "alpha_pattern": "scales by layer", "layers_to_transform": "a choice of layers",
    "layers_pattern": "a choice of layers", "layer_replication": "replicated layers",
    "exclude_modules": "excluded modules", "target_parameters": "adapted parameters",
    "trainable_token_indices": "trained tokens", "fan_in_fan_out": "transposed weights",
    "megatron_config": "Megatron layers", "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow routing",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter's headers and settings; its tensors are read when they are needed.

    Attributes:
        folder: where it stands.
        rank, scale: r, and lora_alpha / r.
        targets: short names of the adapted linears, the same in every layer.
        pairs: name of an adapted weight in the checkpoint -> (A [r, in_features], B [out_features, r]).
        rope_theta, max_position_embeddings: what replaces the checkpoint's own, or None.
        base_weights: `weights_fingerprint` of the checkpoint it was made for, or None where it does not say.
    """

    folder: Path
    rank: int
    scale: float
    targets: tuple[str, ...]
    pairs: dict[str, tuple[StoredTensor, StoredTensor]]
    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    base_weights: str | None = None

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig) -> Adapter:
        """Read settings and headers from a folder (or from its adapter_model.safetensors) and check them.

        Args:
            config: shape of the model it will be added to.

        Raises:
            CheckpointError: no adapter there, a variant or key that is not supported, a rank or scale that is
                impossible, a missing, left-over or misshapen tensor.
        """
        path = Path(path)
        folder = path.parent if path.name == WEIGHTS_FILE else path
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not os.path.isfile(folder / name):
                raise CheckpointError(
                    f"adapter folder {short_path(folder)} holds no {name}: give a folder that peft (or train_long.py) "
                    f"wrote"
                )
        settings = read_object(folder / CONFIG_FILE, CheckpointError, "fetch the adapter again")
        source = short_path(folder / CONFIG_FILE)
        _refuse_variants(settings, source)
        rank = _number(settings, "r", source, whole=True)
        if rank > MAX_RANK:
            raise CheckpointError(f"{source}: r {rank} is above {MAX_RANK}, the most that loading plans for")
        scale = _number(settings, "lora_alpha", source) / rank
        targets = _targets(settings, source)
        own = settings.get("longrun") or {}
        if not isinstance(own, dict):
            raise CheckpointError(f"{source}: longrun is {quoted(own)}, and must be an object")
        unknown = set(own) - {"rope_theta", "max_position_embeddings", "base_weights", "notes"}
        if unknown:
            raise CheckpointError(f"{source}: longrun holds the unknown key {shortened(sorted(unknown)[0])}: remove it")
        base_weights = own.get("base_weights")
        if base_weights is not None and not isinstance(base_weights, str):
            raise CheckpointError(
                f"{source}: base_weights is {quoted(base_weights)}, and must be a fingerprint or null"
            )
        return cls(
            folder=folder,
            rank=rank,
            scale=scale,
            targets=targets,
            pairs=_find_pairs(folder / WEIGHTS_FILE, config, targets, rank),
            rope_theta=None if own.get("rope_theta") is None else float(_number(own, "rope_theta", source, most=1e38)),
            max_position_embeddings=(
                None
                if own.get("max_position_embeddings") is None
                else _number(own, "max_position_embeddings", source, whole=True)
            ),
            base_weights=base_weights,
        )

    def adapted_config(self, config: ModelConfig) -> ModelConfig:
        """`config` with what the adapter overrides.

        Raises:
            CheckpointError: the adapter was trained with a RoPE of its own, and `config` is stretched by YaRN.
        """
        if config.yarn is not None and (self.rope_theta or self.max_position_embeddings):
            raise CheckpointError(
                f"yarn {config.yarn:g} and adapter {short_path(self.folder)}, which sets RoPE itself, contradict each "
                f"other: leave one of them out (--adapter none)"
            )
        if self.max_position_embeddings is None:
            return config
        return replace(config, max_position_embeddings=self.max_position_embeddings)

    def adapted_rope(self, rope: RopeParameters) -> RopeParameters:
        """`rope` with what the adapter overrides."""
        values = rope.values if self.rope_theta is None else {**rope.values, "rope_theta": self.rope_theta}
        window = self.max_position_embeddings or rope.max_position_embeddings
        return replace(rope, values=values, max_position_embeddings=window)

    def change_of(self, name: str, device: torch.device) -> WeightChange | None:
        """What is added to the stored weight `name`; None where the adapter leaves it alone."""
        if name not in self.pairs:
            return None
        down, up = self.pairs[name]
        return WeightChange(_read(down, slice(0, self.rank), device), up, self.scale, device)

    def digest(self) -> str:
        """sha256 (hex) of everything that changes the model: scale, overrides and every byte of every tensor."""
        settings = [self.scale, self.rope_theta, self.max_position_embeddings]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, pair in sorted(self.pairs.items()):
            for tensor in pair:
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                digest.update(tensor.read_bytes(0, tensor.num_bytes))
        return digest.hexdigest()


@dataclass(frozen=True)
class WeightChange:
    """`scale * B @ A` of one weight: A in float32 on the device, B still in its file."""

    down: Tensor
    up: StoredTensor
    scale: float
    device: torch.device

    def add_to(self, piece: Tensor, rows: slice) -> Tensor:
        """Add the change to rows `rows` of the weight: `piece` [rows, in_features] float32 on the device, in place."""
        assert piece.dtype == torch.float32
        return piece.addmm_(_read(self.up, rows, self.device), self.down, alpha=self.scale)


def _read(stored: StoredTensor, rows: slice, device: torch.device) -> Tensor:
    """Rows of a stored tensor as float32 on the device."""
    target = torch.empty((rows.stop - rows.start, *stored.shape[1:]), dtype=stored.torch_dtype)
    stored.read_into(target, rows.start)
    return target.to(device, torch.float32)


def _number(data: dict[str, Any], key: str, source: str, whole: bool = False, most: float = 1e9) -> Any:
    value = data.get(key)
    if not is_number(value) or (whole and not isinstance(value, int)) or not 0 < value <= most:
        raise CheckpointError(
            f"{source}: {key} is {quoted(value)}, and must be a {'whole ' if whole else ''}number above 0, of at most "
            f"{most:g}"
        )
    return value


def _targets(settings: dict[str, Any], source: str) -> tuple[str, ...]:
    names = settings.get("target_modules")
    if names == "all-linear":
        return TARGETS
    if not isinstance(names, list) or not names or any(name not in TARGETS for name in names):
        raise CheckpointError(
            f"{source}: target_modules is {quoted(names)}, and must be a list of names out of {', '.join(TARGETS)}"
        )
    return tuple(name for name in TARGETS if name in names)


def _refuse_variants(settings: dict[str, Any], source: str) -> None:
    """Everything but plain LoRA, and every key that is not known and not empty, is refused by name."""
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{source}: peft_type is {quoted(settings.get('peft_type'))}: only LORA adapters are supported"
        )
    for key, value in settings.items():
        if not value or (key == "bias" and value == "none"):
            continue
        if key in _VARIANTS:
            raise CheckpointError(
                f"{source}: {key} {quoted(value)} ({_VARIANTS[key]}) is not supported: merge the adapter with peft "
                f"and load the merged checkpoint"
            )
        if key == "init_lora_weights" and value not in (True, "gaussian"):
            raise CheckpointError(
                f"{source}: init_lora_weights {quoted(value)} changes the base weights, which is not supported: merge "
                f"the adapter with peft and load the merged checkpoint"
            )
        if key not in _READ and key not in _NEUTRAL:
            raise CheckpointError(
                f"{source}: key {shortened(key)} ({quoted(value)}) is not known here, so its effect would be lost"
            )


def _find_pairs(
    file: Path, config: ModelConfig, targets: tuple[str, ...], rank: int
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B of every adapted weight, after checking that the file holds exactly these."""
    tensors, where = read_header(file), short_path(file)
    pairs = {}
    for spec in config.weights():
        module = spec.name.removesuffix(".weight")
        if spec.kind != "linear" or module.rpartition(".")[2] not in targets:
            continue
        rows, columns = spec.shape
        pair = []
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            name = f"{_PREFIX}{module}.{part}.weight"
            tensor = tensors.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"{where} lacks tensor {name}, which {CONFIG_FILE} calls for: fetch it again")
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{where}: tensor {name} has shape {quoted(list(tensor.shape))} where model and {CONFIG_FILE} "
                    f"call for {list(shape)}: this adapter belongs to another model"
                )
            _ = tensor.torch_dtype  # refuses what no weight comes in
            pair.append(tensor)
        pairs[spec.name] = (pair[0], pair[1])
    if tensors:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        raise CheckpointError(
            f"{where} holds tensor {shortened(min(tensors))}{more}, which model and {CONFIG_FILE} have no place for: "
            f"this adapter belongs to another model"
        )
    return pairs
