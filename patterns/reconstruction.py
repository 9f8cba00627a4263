"""The method "reconstruction" of `identify`: texts that the model reads and repeats, no training.

How heads are scored is in `reconstruction_scores.py`. Here texts are drawn, their raw scores averaged and turned into
ranks, and progress is kept after every repeated part.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrun.errors import InputError
from longrun.patterns.identify_checkpoint import Checkpoint
from longrun.patterns.identify_settings import (
    FIRST_PROMPT,
    NEXT_PROMPT,
    IdentifyProgress,
    IdentifySettings,
    MethodResult,
    OnProgress,
    rank_scores,
)
from longrun.patterns.reconstruction_attention import GPU_TILE_BYTES, TILE_BYTES
from longrun.patterns.reconstruction_scores import Reconstruction, ReconstructionSettings, repeat_parts
from longrun.text.encoder import TextEncoder

ATTN_IMPLEMENTATION = "sdpa"  # what the model is loaded with; `Reconstruction` brings its own while it runs


def identify_reconstruction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: Tensor,
    settings: IdentifySettings,
    checkpoint: Checkpoint,
    on_progress: OnProgress,
    method: ReconstructionSettings | None = None,
) -> MethodResult:
    """Scores of the KV heads by rank: 1 for the head that repeating needs most, 0 for the least, evenly spaced.

    `settings.steps` texts of `settings.context` tokens are drawn from `text_ids`; raw scores are averaged over them.
    A step of `on_progress` is one forward pass.

    Args:
        model, tokenizer, text_ids, settings, checkpoint, on_progress: as `longrun.patterns.identify` says.
        method: how to score (default: `default_method`); its window is replaced by that of `settings`.

    Returns:
        The scores; facts: `raw_scores` ([num_layers][num_kv_heads], 6 digits, what the ranks are made of) and how.

    Raises:
        InputError: the context is too short for the window, or with its repeat too long for the model.
    """
    method = method or default_method(model.device.type)
    method = replace(method, sink_size=settings.sink_size, recent_size=settings.recent_size)
    tensors, facts = checkpoint.load() or ({}, {"steps": 0, "parts": 0})
    raw = list(tensors["raw"]) if facts["steps"] else []
    passes = 0
    for step in range(facts["steps"], settings.steps):
        run = _prepare(model, tokenizer, text_ids, settings, method, step)
        if step == facts["steps"]:
            if facts["parts"]:
                run.resume(facts["parts"], tensors["maxima"])
            passes = (step + 1) * run.num_passes - run.passes_left
        total = settings.steps * run.num_passes

        def on_pass(num_tokens: int, total: int = total) -> None:
            nonlocal passes
            passes += 1
            on_progress(IdentifyProgress(passes, total, tokens=num_tokens))

        def on_part(parts_done: int, maxima: Tensor, step: int = step) -> None:
            state = {"raw": torch.stack(raw)} if raw else {}
            checkpoint.save({**state, "maxima": maxima}, {"steps": step, "parts": parts_done})

        run.run(on_pass, on_part)
        raw.append(run.raw_scores())
        checkpoint.save({"raw": torch.stack(raw)}, {"steps": step + 1, "parts": 0})
    mean = torch.stack(raw).mean(dim=0).tolist()
    rounded = [[float(f"{score:.6g}") for score in row] for row in mean]
    how = {
        "raw_scores": rounded,
        "scores": "rank of raw_scores",
        "part_size": method.part_size,
        "quote_size": method.quote_size,
        "quantile": method.quantile,
    }
    return MethodResult(rank_scores(rounded), how)


def default_method(device_type: str) -> ReconstructionSettings:
    """How heads are scored on "cpu" or "cuda": the same, in larger tiles on a GPU."""
    return ReconstructionSettings(tile_bytes=GPU_TILE_BYTES if device_type == "cuda" else TILE_BYTES)


def longest_context(max_positions: int, method: ReconstructionSettings | None = None) -> int:
    """The most context tokens that fit with the longest repeated part into `max_positions`; may be below 1.

    A prompt is taken to have as many tokens as characters, which no tokenizer exceeds.
    """
    method = method or ReconstructionSettings()
    room = max_positions - max(len(FIRST_PROMPT), len(NEXT_PROMPT)) - method.quote_size
    return max(room // 2, room - method.part_size)


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, settings: IdentifySettings,
    method: ReconstructionSettings, step: int,
) -> Reconstruction:  # fmt: skip
    """The text of one step, drawn from (seed, step) alone, ready to be read."""
    context, most = settings.context, model.config.max_position_embeddings
    if context > longest_context(most, method):
        raise InputError(
            f"a context of {context:,} tokens and the repeat of {min(context, method.part_size):,} of them are more "
            f"than the {most:,} positions the model was trained for: give a context of at most "
            f"{longest_context(most, method):,}"
        )
    start = random.Random(f"reconstruction/{settings.seed}/{step}").randint(0, len(text_ids) - context)
    ids = text_ids[start : start + context].tolist()
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer.encode("")[:1] == [begin]:
        ids = [begin, *ids[:-1]]
    parts = repeat_parts(ids, TextEncoder(tokenizer).ids, method)
    return Reconstruction(model, ids, parts, method)
