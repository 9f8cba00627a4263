"""Checkpoints that retrieve by construction, at any shape and for any context, in plain Llama form.

A planted model continues whatever followed the last four tokens earlier in the text. It tests machinery (cache,
quantization, paging, offload, selection, kernels), never model quality. No training and no download is needed, and a
wrong byte in the retrieval cache shows as a wrong answer.

How it works. The residual stream holds a token code A, hashes B and Q, an output C and a constant.

- Layer 0: five query heads attend to the offsets 0..4 by RoPE phase alone: q and k come from the constant, q's pairs
  are turned back by offset * frequency, so a score is sum_i w_i * cos(f_i * (distance - offset)). They copy A through
  fixed maps: offsets 1..4 into the slots of B (the four tokens before), offsets 0..3 into the slots of Q (the latest).
- Layer 1: one query head matches Q against B in the still rotary pairs (rope_theta is so large that they turn by less
  than 0.05 rad over the whole context) and copies A of the matching position into C, which the LM head reads.
- All else is random with a vanishing output (1e-5 of the stream), so all work is done on random data.

Token codes consist of four parts of norm 1, so every hash has the same norm, RMSNorm has a known gain and a match of
n tokens scores exactly n plus the random products of the others.

Margins, computed (nats of the softmax, tiny shape / 8B shape; `tests/test_planted.py` recomputes them):

- offset heads, nearest wrong distance over the whole context (1,048,576 / 10,000,000): 72 / 79;
- retrieval head, the best of N random positions (deviation 0.60 / 0.41 tokens) against the match of 4 x 64 nats:
  tiny 85 at 128K and 68 at 1M, 8B shape 123 at 3.3M and 118 at 10M;
- retrieval head, another needle that shares three of the four tokens: at least 24 / 37, where the error of INT4 keys
  is about 3 nats a score.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from longrun.errors import CheckpointError, ConfigError, quoted
from longrun.files.user_files import read_object
from longrun.lab.planted_tokenizer import BOS_ID, EOS_ID, UNK_ID, build_vocabulary, cue_words, write_tokenizer
from longrun.lab.planted_weights import NUM_OFFSETS, NUM_SLOTS, RMS_NORM_EPS, PlantedHeads, PlantedShape, PlantedWeights
from longrun.lab.shard_writer import write_shards
from longrun.patterns.head_map import HeadMap

NOTE = "planted model: retrieves by construction, tests machinery, never model quality"
HEAD_MAP_FOLDER = "head_map"
SHARD_BYTES = 4 * 10**9

SHAPES: dict[str, PlantedShape] = {
    "tiny": PlantedShape(
        num_layers=2, hidden_size=256, intermediate_size=512, num_qo_heads=8, num_kv_heads=4, head_dim=64,
        vocab_size=4096, max_position_embeddings=2**20, moving_pairs=10, dtype="float32", retrieval_ratio=0.25,
    ),
    "llama-3-8b": PlantedShape(
        num_layers=32, hidden_size=4096, intermediate_size=14336, num_qo_heads=32, num_kv_heads=8, head_dim=128,
        vocab_size=128_256, max_position_embeddings=10_000_000, moving_pairs=16, dtype="bfloat16", retrieval_ratio=0.5,
    ),
}  # fmt: skip
"""Named shapes; `retrieval_ratio` is the share of KV heads that the head map scores above 0.5."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PlantedModel:
    """What was written.

    `retrieval_head` is (layer, KV head); `offset_heads` are the KV heads (layer 0) that look back 0..4 tokens.
    """

    path: Path
    shape: PlantedShape
    heads: PlantedHeads
    weight_bytes: int
    num_retrieval: int

    @property
    def head_map(self) -> Path:
        return self.path / HEAD_MAP_FOLDER

    @property
    def retrieval_head(self) -> tuple[int, int]:
        return (1, self.heads.retrieval_kv_head)

    @property
    def offset_heads(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, head) for head in self.heads.offset_kv_heads)


def make_planted_model(
    out: str | Path,
    shape: str | PlantedShape = "tiny",
    layers: int | None = None,
    retrieval_ratio: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    sink_size: int = 64,
    recent_size: int = 256,
    shard_bytes: int = SHARD_BYTES,
) -> PlantedModel:
    """Write a planted checkpoint: config.json, safetensors, tokenizer, generation_config.json and `head_map/`.

    Weights are made on `device` one slab at a time; the token codes and the planted entries are the same on every
    device, the random rest is not. config.json comes last, so that an interrupted folder is never taken for a model.

    Args:
        out: the folder; created where it is missing.
        shape: a name in `SHAPES` or a shape of one's own.
        layers: number of layers, at least 2; None takes the shape's.
        retrieval_ratio: share of KV heads that the map scores above 0.5, the true one always among them.
        seed: decides codes, random weights, decoy scores and which heads are planted.
        dtype: "float32" or "bfloat16"; None takes the shape's.
        force: write into a folder that holds other files (files of a checkpoint are replaced, others are kept).
        sink_size, recent_size: the streaming window in tokens, written into the head map.
        shard_bytes: largest safetensors file.

    Raises:
        ConfigError: an unknown shape or dtype, fewer than 2 layers, a ratio outside (0, 1], or a shape too narrow.
        CheckpointError: the folder is not empty and `force` is false, or it cannot be written.
    """
    shape = _resolve_shape(shape, layers, retrieval_ratio, dtype)
    if recent_size <= NUM_SLOTS:
        raise ConfigError(f"recent_size {recent_size} is too short: the offset heads look back {NUM_SLOTS} tokens")
    out = Path(out)
    _prepare_folder(out, force)
    vocabulary = build_vocabulary(shape.vocab_size)
    first_cue = vocabulary.index(cue_words()[0])
    heads = PlantedHeads.choose(shape, seed)
    weights = PlantedWeights(
        shape, shape.num_layers, heads, range(first_cue, first_cue + len(cue_words())), seed, torch.device(device)
    )
    weight_bytes = write_shards(out, weights.plans(), _DTYPES[shape.dtype], shard_bytes)
    head_map = plan_head_map(shape, heads, seed, sink_size, recent_size)
    head_map.save(out / HEAD_MAP_FOLDER, force=True)
    write_tokenizer(out, vocabulary, shape.max_position_embeddings)
    _write_json(out / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    _write_json(out / "config.json", _config(shape))
    num_retrieval = sum(score > 0.5 for row in head_map.scores for score in row)
    return PlantedModel(out, shape, heads, weight_bytes, num_retrieval)


def is_planted(model_dir: str | Path) -> bool:
    """Whether a checkpoint folder says in its config.json that it was planted."""
    try:
        config = read_object(Path(model_dir) / "config.json", CheckpointError, "fetch it again")
    except CheckpointError:
        return False
    return config.get("longrun_planted") is True


def plan_head_map(shape: PlantedShape, heads: PlantedHeads, seed: int, sink_size: int, recent_size: int) -> HeadMap:
    """Scores [num_layers][num_kv_heads]: 1.0 for the true head, below 0.01 for the offset heads, decoys between.

    round(retrieval_ratio * heads) of them lie above 0.5 (at least the true one, never an offset head).
    """
    rng = random.Random(f"planted-map/{seed}")
    total = shape.num_layers * shape.num_kv_heads
    true_head = (1, heads.retrieval_kv_head)
    offsets = [(0, head) for head in heads.offset_kv_heads]
    decoys = [
        (layer, head)
        for layer in range(shape.num_layers)
        for head in range(shape.num_kv_heads)
        if (layer, head) != true_head and (layer, head) not in offsets
    ]
    rng.shuffle(decoys)
    num_high = min(max(0, round(shape.retrieval_ratio * total) - 1), len(decoys))
    scores = {true_head: 1.0}
    for number, head in enumerate(decoys):
        low, high = (0.55, 0.95) if number < num_high else (0.05, 0.45)
        scores[head] = round(rng.uniform(low, high), 6)
    for number, head in enumerate(offsets):
        scores[head] = 0.001 * number
    rows = [[scores[layer, head] for head in range(shape.num_kv_heads)] for layer in range(shape.num_layers)]
    return HeadMap.from_scores(rows, sink_size, recent_size)


def _resolve_shape(
    shape: str | PlantedShape, layers: int | None, retrieval_ratio: float | None, dtype: str | None
) -> PlantedShape:
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ConfigError(f"shape {quoted(shape)} is unknown: choose one of {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    changes = {"num_layers": layers, "retrieval_ratio": retrieval_ratio, "dtype": dtype}
    shape = replace(shape, **{key: value for key, value in changes.items() if value is not None})
    if shape.num_layers < 2:
        raise ConfigError(f"{shape.num_layers} layer(s) cannot retrieve: give at least 2")
    if not 0.0 < shape.retrieval_ratio <= 1.0:
        raise ConfigError(f"retrieval ratio {shape.retrieval_ratio} is outside (0, 1]: give a share of the KV heads")
    if shape.dtype not in _DTYPES:
        raise ConfigError(f"dtype {quoted(shape.dtype)} is unknown: choose float32 or bfloat16")
    if shape.code_size < 2 * NUM_SLOTS or shape.code_size % NUM_SLOTS or shape.moving_pairs < 2:
        raise ConfigError(
            f"{shape.moving_pairs} moving pairs of head_dim {shape.head_dim} leave {shape.code_size} still dims: "
            f"they must be a multiple of {NUM_SLOTS} and at least {2 * NUM_SLOTS}, with at least 2 moving pairs"
        )
    if 4 * shape.code_size + 2 > shape.hidden_size:
        raise ConfigError(
            f"hidden_size {shape.hidden_size} is too narrow: four codes of {shape.code_size} need "
            f"{4 * shape.code_size + 2}"
        )
    if shape.num_qo_heads % shape.num_kv_heads or shape.num_qo_heads < NUM_OFFSETS:
        raise ConfigError(
            f"{shape.num_qo_heads} query heads cannot share {shape.num_kv_heads} KV heads evenly with at least "
            f"{NUM_OFFSETS} of them: change the head counts"
        )
    if shape.rope_theta > 1e38:
        raise ConfigError(
            f"{shape.moving_pairs} moving pairs need rope_theta {shape.rope_theta:.1e}, above what float32 holds: "
            "take more moving pairs or a shorter context"
        )
    return shape


def _prepare_folder(out: Path, force: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not force:
            raise CheckpointError(f"folder {out} is not empty: name another, or overwrite with --force (force=True)")
        if not os.access(out, os.W_OK):
            raise CheckpointError(f"folder {out} is not writable: name another")
        (out / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"folder {out} cannot be made ({error.strerror or error}): name another") from error


def _config(shape: PlantedShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_qo_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        "pad_token_id": UNK_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": shape.dtype,
        # without it, transformers suspects an old Mistral tokenizer in every folder with more than 100,000 tokens
        "transformers_version": version("transformers"),
        "longrun_planted": True,
    }


def _write_json(path: Path, data: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}): free the disk") from error
