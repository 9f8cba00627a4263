"""`--head-map auto`: a head map measured once a model (or model and adapter), without training, and kept in the user's
cache folder.

The map stands in `cache_dir()/head_maps/<model's name>-<fingerprint>/`, in the format of every other map, and appears
there complete or not at all. The method is "reconstruction" of `longrun.patterns.identify`; what an interrupted
measurement has done is kept next to the folder, and the next one resumes there.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from longrun.units import format_bytes

if TYPE_CHECKING:
    from longrun.patterns.identify_settings import IdentifyProgress

DEFAULT_RATIO = 0.5
"""Share of the heads that are kept with an auto map where neither the caller nor the budget says one."""

CONTEXT = {"cpu": 1024, "cuda": 8192}
"""Tokens read and repeated, where the model was trained for as many."""

LEAST_CONTEXT = 448
"""A shorter one has hardly a token outside sinks and window."""

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
) -> Path:
    """Folder of the model's own head map, measured where there is none yet.

    Measuring reads the model with transformers (float32 on a CPU, bf16 on a GPU) and gives all of it back.

    Args:
        model_dir: checkpoint folder with a tokenizer.
        device_type: "cpu" or "cuda", where to measure.
        on_progress: called once for a kept map; otherwise at the start and after every forward pass.
        adapter: what the model runs with: it is measured with it, and has another map than without.

    Raises:
        HeadMapError: the kept map is damaged.
        InputError: there is no tokenizer, or the model was trained for too few tokens.
        PlanError: the model does not fit into free memory.
        CheckpointError, ConfigError: the model cannot be read.
    """
    tell = on_progress or (lambda _: None)
    model_dir = Path(model_dir)
    folder = kept_folder(model_dir, adapter)
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
    context = _context(config, device_type)
    _check_memory(config, context, device_type)
    tell(AutoHeadMap(folder, kept=False))
    _measure(model_dir, adapter, folder, context, device_type, tell)
    return folder


def kept_folder(model_dir: str | Path, adapter: Adapter | None = None) -> Path:
    """Where the map of this very model is kept, whether it is there or not: another model has another folder, and so
    has the same one with an adapter.

    Raises:
        CheckpointError, ConfigError: the model cannot be read.
    """
    name = model_name(Path(model_dir).resolve()).removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "model"
    return cache_dir() / "head_maps" / f"{name}-{model_fingerprint(model_dir, adapter)[:12]}"


def _measure(
    model_dir: Path, adapter: Adapter | None, folder: Path, context: int, device_type: str,
    tell: Callable[[AutoHeadMap], None],
) -> None:  # fmt: skip
    from longrun.patterns.identify import identify
    from longrun.patterns.identify_settings import IdentifySettings

    def on_pass(progress: IdentifyProgress) -> None:
        tell(AutoHeadMap(folder, False, progress.step, progress.num_steps))

    # `force` drops what another version of this program or of a library has half done.
    settings = IdentifySettings(
        str(model_dir), str(folder), "reconstruction", context=context, steps=1, device=device_type, force=True,
        adapter=None if adapter is None else str(adapter.folder),
    )  # fmt: skip
    identify(settings, on_pass)
    gc.collect()  # the model is gone before another one is loaded
    if device_type == "cuda":
        torch.cuda.empty_cache()


def _context(config: ModelConfig, device_type: str) -> int:
    """Tokens to read, so that they and their repeat stay within what the model was trained for."""
    from longrun.patterns.reconstruction import longest_context

    most = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    context = min(CONTEXT[device_type], longest_context(most))
    if context < LEAST_CONTEXT:
        raise InputError(
            f"head map auto lets the model repeat {LEAST_CONTEXT} tokens or more, and {most:,} positions are too few "
            f"for that: give a head map folder, or take full attention"
        )
    return context


def _check_memory(config: ModelConfig, context: int, device_type: str) -> None:
    """Weights, keys and values, and activations fit into what is free now, by arithmetic."""
    from longrun.patterns.reconstruction import default_method

    method = default_method(device_type)
    itemsize = 4 if device_type == "cpu" else 2
    weights = itemsize * sum(math.prod(spec.shape) for spec in config.weights())
    tokens = context + min(context, method.part_size) + 128
    per_token = 2 * config.num_kv_heads * config.head_dim
    keys_and_values = tokens * per_token * (itemsize * config.num_layers + 4)  # one layer's in float32 as well
    widest = 3 * config.intermediate_size + 4 * config.num_qo_heads * config.head_dim + 4 * config.hidden_size
    activations = min(method.chunk_size, tokens) * widest * itemsize + 3 * method.tile_bytes
    needed = weights + keys_and_values + activations + _BASE_BYTES[device_type]
    if device_type == "cpu":  # libraries are loaded by now
        places = [("main memory", *still_needed(needed, _BASE_BYTES["cpu"]))]
    else:
        places = [("main memory", weights, available_bytes())]
    if device_type == "cuda":
        places.append(("GPU memory", needed, torch.cuda.mem_get_info()[0]))
    for place, bytes_needed, free in places:
        if bytes_needed > free:
            raise PlanError(
                f"head map auto runs the whole model with transformers, which needs {format_bytes(bytes_needed)} of "
                f"{place}, and {format_bytes(free)} are free: free memory, or give a head map folder made elsewhere"
            )


def _check_kept(folder: Path, config: ModelConfig, fingerprint: str) -> None:
    """The kept map is whole, of this model, and holds the scores that were measured."""
    from longrun.patterns.reconstruction_scores import rank_scores

    try:
        head_map = HeadMap.load(folder)
        head_map.check_shape(config.num_layers, config.num_kv_heads)
        made: dict[str, Any] = read_object(folder / CONFIG_FILE, HeadMapError, "it is needed")["identification"]
        ranked = tuple(map(tuple, rank_scores(made["raw_scores"])))
        fault = None
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
