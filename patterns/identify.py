"""Measure which heads of a model are retrieval heads, and write the head map.

`identify` does what all methods share: it loads model, tokenizer and text, keeps the progress of an unfinished run in
`OUT.partial/`, and writes the map with all that decided it. Method "reach" (patterns/reach.py) reads with the model's
own decoder and has no progress to keep. Any other is a module of two names:

    ATTN_IMPLEMENTATION: str
        what the model is loaded with: "sdpa", or a name registered with `transformers.AttentionInterface` at import
    identify_METHOD(model, tokenizer, text_ids, settings, checkpoint, on_progress) -> MethodResult
        model: AutoModelForCausalLM in `settings.dtype` on `settings.device`, eval(), no parameter requires a gradient;
            an adapter is merged, its RoPE base and trained positions are the model's
        tokenizer: the model's own
        text_ids: int64 [num_tokens] on the CPU, without special tokens, num_tokens >= settings.context
        settings: IdentifySettings, resolved (nothing is None)
        checkpoint: Checkpoint; `load()` at the start, `save(tensors, facts)` after a step for which `due(step)`.
            The result of a resumed run must equal an uninterrupted one's bit for bit: draw all that is random from
            (settings.seed, step).
        on_progress: called after each step with an `IdentifyProgress`
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longrun.config.model_config import ModelConfig
from longrun.documents.document import read_document
from longrun.errors import CheckpointError, HeadMapError, InputError, LongrunError, short_path, shortened
from longrun.files.user_files import read_object
from longrun.hub.names import model_name
from longrun.model.adapter import Adapter
from longrun.model.adapter_merge import load_merged
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import generate_sentences
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_map_folder import CONFIG_FILE, IDENTIFICATION, SCORES_FILE
from longrun.patterns.identify_checkpoint import Checkpoint
from longrun.patterns.identify_settings import IdentifyProgress, IdentifySettings, MethodResult, OnProgress
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Checkpoint", "IdentifyProgress", "IdentifySettings", "MethodResult", "OnProgress", "identify"]

_GENERATED_SENTENCES = 2000


def identify(settings: IdentifySettings, on_progress: OnProgress | None = None) -> HeadMap:
    """Measure a model's retrieval heads and write the map to `settings.out`.

    A run that was interrupted resumes where its progress was saved last. Where `settings.out` already holds the map
    of exactly these settings, model and text, it is returned and nothing is computed.

    Raises:
        InputError: settings out of range, a text shorter than the context, progress of other settings.
        CheckpointError, ConfigError: model, adapter or tokenizer cannot be loaded.
        HeadMapError: `settings.out` holds another map (or something else) and `settings.force` is false, or another
            process makes that map now.
    """
    began = time.perf_counter()
    chosen, settings = settings.context, settings.resolved(torch.cuda.is_available())
    out = Path(settings.out)
    if (
        out.exists()
        and not settings.force
        and not (out / SCORES_FILE).is_file()
        and (not out.is_dir() or (out / CONFIG_FILE).exists())
    ):
        raise HeadMapError(f"{out} is not a head map: give a new folder with --out")
    config = ModelConfig.from_dir(settings.model_dir).stretched(settings.yarn)
    adapter = _open_adapter(settings)
    if adapter is not None:
        config = adapter.adapted_config(config)
    if settings.method == "reach":
        from longrun.patterns.reach import context_of, identify_reach

        assert settings.context is not None
        settings = replace(settings, context=context_of(config, chosen, settings.context))
    tokenizer = load_tokenizer(settings.model_dir)
    text_ids, text_facts = read_text(tokenizer, settings)
    deciding = {
        **settings.deciding(),
        "model_fingerprint": model_fingerprint(settings.model_dir, adapter),
        **({} if adapter is None else {"adapter_sha256": adapter.digest()}),
        "text": text_facts,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    finished = _finished(out, deciding, settings.force)
    if finished is not None:
        return finished
    checkpoint = Checkpoint(out.with_name(out.name + ".partial"), deciding, settings.save_every, settings.force)
    tell = on_progress or (lambda _: None)
    try:
        if settings.method == "reach":
            result = identify_reach(tokenizer, text_ids, settings, tell)
        else:
            if settings.method == "gates":
                from longrun.patterns.gates import ATTN_IMPLEMENTATION
                from longrun.patterns.gates import identify_gates as run
            else:
                from longrun.patterns.reconstruction import ATTN_IMPLEMENTATION
                from longrun.patterns.reconstruction import identify_reconstruction as run
            result = run(load_model(settings, ATTN_IMPLEMENTATION), tokenizer, text_ids, settings, checkpoint, tell)
    except BaseException:
        checkpoint.release()
        raise
    head_map = HeadMap.from_scores(result.scores, settings.sink_size, settings.recent_size)
    head_map = replace(head_map, reach_losses=result.reach_losses)
    head_map.check_shape(config.num_layers, config.num_kv_heads, f"what {settings.method} measured")
    facts = {
        **deciding,
        "weights_fingerprint": weights_fingerprint(settings.model_dir),
        "model": model_name(Path(settings.model_dir).resolve()),
        **({} if adapter is None else {"adapter": adapter.folder.resolve().name}),
        "text_files": [Path(name).name for name in settings.text_files],
        "seconds": round(time.perf_counter() - began, 1),
        **result.facts,
    }
    head_map.save(out, settings.force, {IDENTIFICATION: facts})
    checkpoint.remove()
    return replace(head_map, notes=head_map.notes + result.notices)


def load_model(settings: IdentifySettings, attn_implementation: str) -> PreTrainedModel:
    """The model, its adapter merged, in `settings.dtype` on `settings.device`, frozen and in eval mode.

    Raises:
        CheckpointError: transformers cannot load it; the adapter cannot be read or belongs to another checkpoint.
    """
    adapter = _open_adapter(settings)
    try:
        with _quiet_loading():
            model = load_merged(
                settings.model_dir,
                adapter,
                settings.yarn,
                dtype=getattr(torch, settings.dtype),
                attn_implementation=attn_implementation,
            )
    except LongrunError:
        raise
    except Exception as error:  # the library raises what it likes
        raise CheckpointError(
            f"transformers cannot load {short_path(settings.model_dir)} ({shortened(error, 200)}): check the folder"
        ) from error
    return model.to(settings.device).eval().requires_grad_(False)


def _open_adapter(settings: IdentifySettings) -> Adapter | None:
    if settings.adapter is None:
        return None
    return Adapter.open(settings.adapter, ModelConfig.from_dir(settings.model_dir))


def read_text(tokenizer: PreTrainedTokenizerBase, settings: IdentifySettings) -> tuple[Tensor, dict[str, Any]]:
    """The text to hide things in or to repeat, as (int64 [num_tokens] without special tokens, facts that identify it).

    Without files it is `pydoc_data.topics` of the running Python (PSF licence), paragraph by paragraph between as many
    sentences generated from the seed (longrun.needles.needles), and as many more sentences as the context needs.

    Raises:
        InputError: a file cannot be read, or the text is shorter than `settings.context`.
    """
    if settings.text_files:
        text = "\n\n".join(read_document(name).text for name in settings.text_files)
        what = f"the text of {len(settings.text_files)} file(s)"
    else:
        text = "".join(_default_text(settings))
        what = "the default text"
    token_ids = torch.tensor(TextEncoder(tokenizer).ids(text), dtype=torch.int64)
    if len(token_ids) < settings.context:
        raise InputError(
            f"{what} has {len(token_ids):,} tokens and a context of {settings.context:,} needs at least as many: add "
            f"files, or give a shorter --context"
        )
    facts = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "num_tokens": len(token_ids)}
    return token_ids, facts


def _default_text(settings: IdentifySettings) -> Iterator[str]:
    topics = pydoc_data.topics.topics
    sentences = generate_sentences(f"identify/{settings.seed}")
    written = 0
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip():
                paragraph = " ".join(paragraph.split()) + "\n\n"
                filler = ""
                while len(filler) < len(paragraph):
                    filler += next(sentences) + " "
                written += len(paragraph) + len(filler)
                yield paragraph + filler.rstrip() + "\n\n"
    # No tokenizer of these families makes tokens of more than 12 characters on average.
    while written < 12 * settings.context:
        stretch = " ".join(islice(sentences, _GENERATED_SENTENCES)) + "\n\n"
        written += len(stretch)
        yield stretch


def _finished(out: Path, deciding: Mapping[str, Any], force: bool) -> HeadMap | None:
    """The map in `out` where it is the one asked for; None where there is none or it will be overwritten."""
    if force or not (out / SCORES_FILE).is_file():
        return None
    try:
        saved = read_object(out / CONFIG_FILE, HeadMapError, "give a new folder with --out")[IDENTIFICATION]
        same = all(saved.get(key) == value for key, value in json.loads(json.dumps(deciding)).items())
    except (HeadMapError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise HeadMapError(f"{out} holds another head map: give a new folder with --out, or overwrite with --force")
    return HeadMap.load(out)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar of transformers while it reads weights; as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
