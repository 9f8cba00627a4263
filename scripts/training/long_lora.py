"""LoRA layers for train_long.py: put into a transformers model, switched off when asked, saved in peft's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from longrun.errors import InputError
from longrun.files.user_files import read_object
from longrun.files.whole_file import write_whole
from longrun.model.adapter import CONFIG_FILE, TARGETS, WEIGHTS_FILE
from longrun.model.adapter_merge import load_merged, set_rope
from longrun.model.rope import RopeParameters


class LoraLinear(nn.Module):
    """`x @ W.T + scale * (x @ A.T) @ B.T`: W frozen, A and B in float32, multiplied in x's dtype."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.enabled = alpha / rank, True
        # Both factors as peft starts them: A uniform with Kaiming's bound for a slope of sqrt(5), B zero.
        bound = base.in_features**-0.5
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class LoraModel:
    """A transformers Llama with LoRA on every linear of its layers, and the means to be the original again.

    Attributes:
        model: the causal language model; only `parameters()` are trained.
        settings: r, lora_alpha, rope_theta, max_position_embeddings, base_weights.
    """

    def __init__(self, model_dir: Path, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Load the checkpoint with the RoPE base and window of `settings`, and attach fresh LoRA layers."""
        self.settings = settings
        self.model = load_merged(model_dir, None, dtype=dtype, attn_implementation="sdpa")
        self._original_frequencies = self.model.model.rotary_emb.inv_freq.to(device)
        rope = RopeParameters.from_dir(model_dir)
        values = {**rope.values, "rope_theta": float(settings["rope_theta"])}
        set_rope(self.model, replace(rope, values=values, max_position_embeddings=settings["max_position_embeddings"]))
        self.model.to(device).requires_grad_(False)
        rotary = self.model.model.rotary_emb
        self._frequencies = rotary.inv_freq
        assert self._frequencies.dtype == torch.float32
        self._positions: Tensor | None = None
        rotary.register_forward_pre_hook(self._place, with_kwargs=True)
        self.layers: dict[str, LoraLinear] = {}
        generator = torch.Generator().manual_seed(settings.get("seed", 0))
        for name, module in list(self.model.named_modules()):
            parent, _, short = name.rpartition(".")
            if short in TARGETS and isinstance(module, nn.Linear):
                layer = LoraLinear(module, settings["r"], settings["lora_alpha"], generator)
                setattr(self.model.get_submodule(parent), short, layer)
                self.layers[name] = layer

    @classmethod
    def from_adapter(
        cls, model_dir: Path, folder: Path, dtype: torch.dtype, device: torch.device, rope_theta: float | None = None
    ) -> LoraModel:
        """The checkpoint with an adapter that train_long.py wrote, and with its RoPE base unless another is given.

        Raises:
            InputError: the adapter cannot be read, or lacks what train_long.py writes.
        """
        config, tensors = _read_adapter(folder)
        settings = {"r": config["r"], "lora_alpha": config["lora_alpha"], **config["longrun"]}
        lora = cls(model_dir, settings if rope_theta is None else {**settings, "rope_theta": rope_theta}, dtype, device)
        lora.load_state(tensors, str(folder))
        return lora

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in the model's order."""
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Within it the model is the checkpoint as it came: no LoRA, its own RoPE base."""
        rotary = self.model.model.rotary_emb
        self._switch(False)
        rotary.inv_freq = self._original_frequencies
        try:
            yield
        finally:
            self._switch(True)
            rotary.inv_freq = self._frequencies

    @contextmanager
    def at_positions(self, positions: Tensor | None) -> Iterator[None]:
        """Within it RoPE turns by these positions, int64 [batch, T]; with None by 0, 1, 2 ... as always.

        They are given to the rotary embedding alone: as `position_ids` of the model, positions that jump would be taken
        for several packed texts, and a mask of T x T be made of them. Angles are computed in float32.
        """
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _place(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._positions is None:
            return None
        x = args[0] if args else kwargs["x"]
        if self._positions.shape != x.shape[:2]:
            raise ValueError(f"positions are {tuple(self._positions.shape)}, and the batch is {tuple(x.shape[:2])}")
        return (x,), {"position_ids": self._positions}

    def _switch(self, enabled: bool) -> None:
        for layer in self.layers.values():
            layer.enabled = enabled

    def state(self) -> dict[str, Tensor]:
        """A and B under peft's names, as they are."""
        found = {}
        for name, layer in self.layers.items():
            found[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
            found[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
        return found

    def load_state(self, tensors: dict[str, Tensor], source: str) -> None:
        """Load A and B of the same names and shapes. Raises `InputError` where they are others."""
        own = self.state()
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise InputError(f"{source} holds LoRA layers of another model or rank: start in another folder")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def load_adapter(self, folder: Path) -> float:
        """Load a saved adapter of the same rank; its RoPE base may be another, and is returned.

        Raises:
            InputError: it cannot be read or has another rank.
        """
        config, tensors = _read_adapter(folder)
        for key in ("r", "lora_alpha"):
            if config[key] != self.settings[key]:
                raise InputError(f"adapter {folder} has {key} {config[key]}, and the recipe {self.settings[key]}")
        self.load_state(tensors, str(folder))
        return config["longrun"]["rope_theta"]

    def save_adapter(self, folder: Path, notes: str = "") -> int:
        """Write peft's two files, tensors in bf16; returns their bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in self.state().items()}
        write_whole(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        own = {key: self.settings[key] for key in ("rope_theta", "max_position_embeddings", "base_weights")}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.settings["r"],
            "lora_alpha": self.settings["lora_alpha"],
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": list(TARGETS),
            "longrun": {**own, "notes": notes},
        }
        write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
        return sum((folder / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter. Raises `InputError` where it is none of train_long.py's."""
    try:
        config = read_object(folder / CONFIG_FILE, InputError, "give a folder that train_long.py wrote")
        lacking = [key for key in ("r", "lora_alpha", "longrun") if key not in config]
        lacking += [key for key in ("rope_theta", "max_position_embeddings") if key not in config.get("longrun", {})]
        if lacking:
            raise ValueError(f"{CONFIG_FILE} has no {lacking[0]}")
        return config, load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"adapter {folder} cannot be read ({error}): give a folder that train_long.py wrote") from None
