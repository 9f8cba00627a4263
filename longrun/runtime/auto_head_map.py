"""`--head-map auto`: a head map measured once a model (or model and adapter), without training, and kept in the user's
cache folder.

The map stands in `cache_dir()/head_maps/<model's name>-<fingerprint>/`, in the format of every other map, and appears
there complete or not at all. The method is "reconstruction" of `longrun.patterns.identify`; what an interrupted
measurement has done is kept next to the folder, and the next one resumes there. Where bytes shall decide how far heads
reach, it is "reach", and the folder's name ends with `-reach-<hash of its settings>`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrun.config.model_config import ModelConfig
from longrun.errors import HeadMapError, InputError, PlanError, shortened
from longrun.files.user_files import read_object
from longrun.hub.names import model_name
from longrun.machine.host_memory import available_bytes, still_needed
from longrun.model.adapter import Adapter
from longrun.model.fingerprint import model_fingerprint
from longrun.model.tokenizer import has_tokenizer
from longrun.paths import cache_dir
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_map_folder import CONFIG_FILE
from longrun.patterns.head_split import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE
from longrun.patterns.identify_settings import DEFAULTS, IdentifyProgress, IdentifySettings, rank_scores
from longrun.patterns.reach_losses import ReachLosses
from longrun.units import format_bytes

DEFAULT_RATIO = 0.5
"""Share of the heads that are kept with an auto map where neither the caller nor the budget says one."""

CONTEXT = {"cpu": 1024, "cuda": 8192}
"""Tokens read and repeated by "reconstruction", where the model was trained for as many; "reach" has its default."""

LEAST_CONTEXT = {"reconstruction": 448, "reach": 1200}
"""A shorter one has hardly a token outside sinks and window, or no room for repeats and four windows."""

_BASE_BYTES = {"cpu": 300 * 10**6, "cuda": 10**9}  # libraries' own, as roughly seen


@dataclass(frozen=True)
class AutoHeadMap:
    """Where the map is, and how far its measurement.

    Attributes:
        folder: the map, now (`kept`) or when it is measured.
        kept: whether the map was there already.
        done, total: forward passes; both 0 before the first.
    """

    folder: Path
    kept: bool
    done: int = 0
    total: int = 0


def auto_head_map(
    model_dir: str | Path,
    device_type: str,
    on_progress: Callable[[AutoHeadMap], None] | None = None,
    adapter: Adapter | None = None,
    method: str = "reconstruction",
) -> Path:
    """Folder of the model's own head map, measured where there is none yet.

    Measuring reads the model (float32 on a CPU, bf16 on a GPU; for "reconstruction" with transformers) and gives all
    of it back.

    Args:
        model_dir: checkpoint folder with a tokenizer.
        device_type: "cpu" or "cuda", where to measure.
        on_progress: called once for a kept map; otherwise at the start and after every forward pass.
        adapter: what the model runs with: it is measured with it, and has another map than without.
        method: "reconstruction", or "reach" for a map with reach losses.

    Raises:
        HeadMapError: the kept map is damaged.
        InputError: there is no tokenizer, or the model was trained for too few tokens.
        PlanError: the model does not fit into free memory.
        CheckpointError, ConfigError: the model cannot be read.
    """
    tell = on_progress or (lambda _: None)
    model_dir = Path(model_dir)
    folder = kept_folder(model_dir, adapter, method, device_type)
    config = ModelConfig.from_dir(model_dir)
    if adapter is not None:
        config = adapter.adapted_config(config)
    if folder.exists():
        _check_kept(folder, config, model_fingerprint(model_dir, adapter))
        tell(AutoHeadMap(folder, kept=True))
        return folder
    if not has_tokenizer(model_dir):
        raise InputError(
            f"head map auto reads a text, and {model_dir} has no tokenizer: add its files, or give a head map folder"
        )
    context = _context(config, device_type, method)
    _check_memory(config, context, device_type, method)
    tell(AutoHeadMap(folder, kept=False))
    _measure(model_dir, adapter, folder, context, device_type, method, tell)
    return folder


def kept_folder(
    model_dir: str | Path, adapter: Adapter | None = None, method: str = "reconstruction", device_type: str = "cpu"
) -> Path:
    """Where the map of this very model is kept, whether it is there or not: another model has another folder, and so
    has the same one with an adapter; of "reach" also other settings, which differ by device.

    Raises:
        CheckpointError, ConfigError: the model cannot be read.
    """
    name = model_name(Path(model_dir).resolve()).removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "model"
    if method == "reach":
        deciding = _settings(Path(model_dir), adapter, Path(), None, device_type, method).resolved(True).deciding()
        suffix = f"-reach-{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]}"
    else:
        suffix = ""
    return cache_dir() / "head_maps" / f"{name}-{model_fingerprint(model_dir, adapter)[:12]}{suffix}"


def assumed_losses(config: ModelConfig, device_type: str) -> HeadMap:
    """A map with reach losses that are the same for all heads: to plan with, before the model's own are measured.

    Raises:
        InputError: the model was trained for too few tokens to be measured.
    """
    from longrun.patterns.reach import finite_reaches

    context = _context(config, device_type, "reach")
    reaches = finite_reaches(DEFAULT_RECENT_SIZE, context)
    of_heads = (((1.0,) * len(reaches),) * config.num_kv_heads,) * config.num_layers
    losses = ReachLosses(DEFAULT_SINK_SIZE, context, reaches, of_heads)
    return replace(HeadMap.full(config.num_layers, config.num_kv_heads), reach_losses=losses)


def _settings(
    model_dir: Path, adapter: Adapter | None, folder: Path, context: int | None, device_type: str, method: str
) -> IdentifySettings:
    # `force` drops what another version of this program or of a library has half done.
    return IdentifySettings(
        str(model_dir), str(folder), method, context=context, steps=1, device=device_type, force=True,
        adapter=None if adapter is None else str(adapter.folder),
    )  # fmt: skip


def _measure(
    model_dir: Path, adapter: Adapter | None, folder: Path, context: int, device_type: str, method: str,
    tell: Callable[[AutoHeadMap], None],
) -> None:  # fmt: skip
    from longrun.patterns.identify import identify

    def on_pass(progress: IdentifyProgress) -> None:
        tell(AutoHeadMap(folder, False, progress.step, progress.num_steps))

    identify(_settings(model_dir, adapter, folder, context, device_type, method), on_pass)
    gc.collect()  # the model is gone before another one is loaded
    if device_type == "cuda":
        torch.cuda.empty_cache()


def _context(config: ModelConfig, device_type: str, method: str) -> int:
    """Tokens to read, so that they, and what is repeated of them, stay within what the model was trained for."""
    most = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    if method == "reach":
        context = min(DEFAULTS[method, device_type]["context"], most)
    else:
        from longrun.patterns.reconstruction import longest_context

        context = min(CONTEXT[device_type], longest_context(most))
    if context < LEAST_CONTEXT[method]:
        raise InputError(
            f"head map auto lets the model repeat parts of {LEAST_CONTEXT[method]:,} tokens or more, and {most:,} "
            f"positions are too few for that: give a head map folder, or take full attention"
        )
    return context


def _reading_bytes(config: ModelConfig, context: int, device_type: str, itemsize: int) -> int:
    """Keys, values and activations of method "reconstruction"."""
    from longrun.patterns.reconstruction import default_method

    method = default_method(device_type)
    tokens = context + min(context, method.part_size) + 128
    per_token = 2 * config.num_kv_heads * config.head_dim
    keys_and_values = tokens * per_token * (itemsize * config.num_layers + 4)  # one layer's in float32 as well
    widest = 3 * config.intermediate_size + 4 * config.num_qo_heads * config.head_dim + 4 * config.hidden_size
    return keys_and_values + min(method.chunk_size, tokens) * widest * itemsize + 3 * method.tile_bytes


def _check_memory(config: ModelConfig, context: int, device_type: str, method: str) -> None:
    """Weights, keys and values, and activations fit into what is free now, by arithmetic."""
    itemsize = 4 if device_type == "cpu" else 2
    weights = itemsize * sum(math.prod(spec.shape) for spec in config.weights())
    if method == "reach":
        from longrun.patterns.reach import reading_bytes

        reading, library = reading_bytes(config, context, device_type, itemsize), "longrun's own decoder"
    else:
        reading, library = _reading_bytes(config, context, device_type, itemsize), "transformers"
    needed = weights + reading + _BASE_BYTES[device_type]
    if device_type == "cpu":  # libraries are loaded by now
        places = [("main memory", *still_needed(needed, _BASE_BYTES["cpu"]))]
    else:
        places = [("main memory", weights, available_bytes())]
    if device_type == "cuda":
        places.append(("GPU memory", needed, torch.cuda.mem_get_info()[0]))
    for place, bytes_needed, free in places:
        if bytes_needed > free:
            raise PlanError(
                f"head map auto runs the whole model with {library}, which needs {format_bytes(bytes_needed)} of "
                f"{place}, and {format_bytes(free)} are free: free memory, or give a head map folder made elsewhere"
            )


def _check_kept(folder: Path, config: ModelConfig, fingerprint: str) -> None:
    """The kept map is whole, of this model, and holds what was measured."""
    try:
        head_map = HeadMap.load(folder)
        head_map.check_shape(config.num_layers, config.num_kv_heads)
        made: dict[str, Any] = read_object(folder / CONFIG_FILE, HeadMapError, "it is needed")["identification"]
        losses, fault = head_map.reach_losses, None
        if made["method"] == "reach":
            if losses is None:
                raise ValueError("its reach losses are gone")
            raw = [[of_head[0] for of_head in row] for row in losses.losses]
        else:
            raw = made["raw_scores"]
        ranked = tuple(map(tuple, rank_scores(raw)))
        if made["model_fingerprint"] != fingerprint:
            fault = "it names another model"
        elif ranked != head_map.scores:
            fault = "its scores are not those that were measured"
    except (HeadMapError, ValueError, KeyError, TypeError, AttributeError) as error:
        fault = shortened(f"{type(error).__name__}: {error}" if not isinstance(error, HeadMapError) else error, 200)
    if fault is not None:
        raise HeadMapError(
            f"the head map kept in {folder} is damaged ({fault}): delete that folder to have it measured again"
        )
