"""The method "reach" of `identify`: how far each head needs to look, from one forward pass a text and no training.

A text is a stretch of the given one and, after it, requests to repeat parts of it, with the parts as they should be
repeated. Queries are sampled in the second half of the stretch and in all parts: the former ask for what running text
needs, the latter for what a fact from far back needs. A head's loss is measured at its output (`reach_measure`), and
brought to nats by what the losses of its layer cost together; both kinds of queries are added, repeats three times.
So a loss says about how much KL a reach adds. The model's own decoder is used, so that any model that longrun runs can
be measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.config.gguf_header import gguf_file
from longrun.config.model_config import ModelConfig
from longrun.errors import InputError
from longrun.kernels.cpu_gguf import gguf_dequantizer
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder
from longrun.model.decoder import Decoder
from longrun.model.folder import check_folder
from longrun.model.rope import RotaryTable
from longrun.patterns.identify_settings import (
    FIRST_PROMPT,
    NEXT_PROMPT,
    IdentifyProgress,
    IdentifySettings,
    MethodResult,
    OnProgress,
    rank_scores,
)
from longrun.patterns.reach_losses import MEASURED_SHARE, ReachLosses
from longrun.patterns.reach_measure import TILE_BYTES, layer_costs, measure_reaches
from longrun.specs.model_bytes import TOKEN_SLICES, activation_bytes
from longrun.text.encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS, PART_SIZE, QUOTE_SIZE = 8, 64, 8
TEXT_ROWS = 512
REPEAT_WEIGHT = 3.0
"""Of a nat lost where something is repeated, against one in running text (docs/reach.md)."""

_FACTOR = 4  # from one reach to the next
_WEIGHING_CONTEXT = {"cpu": 1536, "cuda": 8192}  # a forward pass a layer
_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class SampledText:
    """int64 token ids [T], and positions whose next tokens are sampled: in the stretch, and where parts of it are
    repeated; both ascending."""

    ids: Tensor
    text_rows: Tensor
    repeat_rows: Tensor

    @property
    def rows(self) -> Tensor:
        return torch.cat((self.text_rows, self.repeat_rows))


def sampled_text(
    token_ids: Sequence[int], encode: Callable[[str], list[int]], length: int, draw: random.Random
) -> SampledText:
    """The first tokens of `token_ids`, and parts of them repeated: `length` tokens in all.

    Raises:
        InputError: no room for a stretch between the parts.
    """
    first, following = encode(FIRST_PROMPT), encode(NEXT_PROMPT)
    stretch = length - len(first) - PARTS * (len(following) + QUOTE_SIZE + PART_SIZE)
    if stretch < 4 * (PART_SIZE + QUOTE_SIZE):
        raise InputError(
            f"a context of {length:,} tokens leaves {max(0, stretch):,} beside {PARTS} repeated parts of {PART_SIZE}: "
            f"give at least {length - stretch + 4 * (PART_SIZE + QUOTE_SIZE):,}"
        )
    ids, repeat_rows = [*token_ids[:stretch], *first], []
    for part in range(PARTS):
        start = (2 * part + 1) * (stretch - PART_SIZE - QUOTE_SIZE) // (2 * PARTS)
        ids += [*following, *token_ids[start : start + QUOTE_SIZE]]
        repeat_rows += range(len(ids) - 1, len(ids) - 1 + PART_SIZE)
        ids += token_ids[start + QUOTE_SIZE : start + QUOTE_SIZE + PART_SIZE]
    second_half = range(stretch // 2, stretch - 1)
    text_rows = sorted(draw.sample(second_half, min(TEXT_ROWS, len(second_half))))
    return SampledText(torch.tensor(ids), torch.tensor(text_rows), torch.tensor(repeat_rows))


def finite_reaches(shortest: int, length: int) -> tuple[int, ...]:
    """`shortest` and its multiples by powers of 4, up to a quarter of the text's length.

    Raises:
        InputError: the shortest is longer than that.
    """
    longest, reaches = length // MEASURED_SHARE, [shortest]
    if shortest > longest:
        raise InputError(
            f"a window of {shortest:,} tokens is measured on a text of at least {shortest * MEASURED_SHARE:,}, and the "
            f"context has {length:,}: give a longer --context, or a smaller recent_size"
        )
    while reaches[-1] * _FACTOR <= longest:
        reaches.append(reaches[-1] * _FACTOR)
    return tuple(reaches)


def context_of(config: ModelConfig, asked: int | None, default: int) -> int:
    """Tokens of a text: what is asked for, or the default and no more than the model was trained for.

    Raises:
        InputError: more are asked for than that.
    """
    trained = config.max_position_embeddings
    if asked is not None and asked > trained:
        raise InputError(
            f"a context of {asked:,} tokens is longer than the {trained:,} that the model was trained for: give a "
            f"shorter --context"
        )
    return min(trained, default) if asked is None else asked


def reading_bytes(config: ModelConfig, context: int, device_type: str, itemsize: int) -> int:
    """What measuring holds beside the weights, at most: a text of `context` tokens read in one chunk, tiles of the
    measure, and the distributions of the sampled tokens, which are compared with each other.

    Args:
        itemsize: bytes of an activation element.
    """
    layer = activation_bytes(config, context, itemsize, token_slice=TOKEN_SLICES[device_type])
    attended = 6 * context * (config.q_size + config.kv_size) * itemsize + 3 * TILE_BYTES[device_type]
    rows = TEXT_ROWS + PARTS * PART_SIZE
    return layer + attended + (rows + 4 * 64) * config.vocab_size * 4


def identify_reach(
    tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, settings: IdentifySettings, on_progress: OnProgress
) -> MethodResult:
    """Losses of all heads at reaches from `settings.recent_size` on; scores are ranks by the loss there.

    Args:
        text_ids, settings, on_progress: as `longrun.patterns.identify` says. `settings.steps` texts of
            `settings.context` tokens are read; a step of `on_progress` is one of them.

    Raises:
        InputError: the context is too short.
        CheckpointError, ConfigError: the model cannot be read.
    """
    config, adapter = ModelConfig.from_dir(settings.model_dir).stretched(settings.yarn), None
    if settings.adapter is not None:
        adapter = Adapter.open(settings.adapter, config)
        config = adapter.adapted_config(config)
    model = check_folder(settings.model_dir, config, adapter)
    context = settings.context
    assert context is not None and settings.steps is not None and settings.dtype is not None
    reaches = finite_reaches(settings.recent_size, context)
    texts = [_drawn(tokenizer, text_ids, settings, step) for step in range(settings.steps)]
    device = torch.device(str(settings.device))
    orders = [range(config.num_kv_heads)] * config.num_layers
    notices: list[str] = []
    gguf_kernel = None if gguf_file(model.path) is None else gguf_dequantizer(notices)
    decoder = load_decoder(
        model.path, config, orders, _FORMATS[settings.dtype], device, TOKEN_SLICES[device.type], adapter=adapter,
        dequantize_gguf=gguf_kernel and gguf_kernel.by_type,
    )  # fmt: skip
    rotary = model.rotary.to(device)
    total, passes = 0.0, settings.steps + config.num_layers + 1
    for step, text in enumerate(texts):
        total += mean_losses(decoder, rotary, text, reaches, settings.sink_size)
        on_progress(IdentifyProgress(step + 1, passes, tokens=context))
    short = _drawn(tokenizer, text_ids, settings, 0, min(context, _WEIGHING_CONTEXT[device.type]))
    window = _window_attention(device.type, config.head_dim)
    weights = []
    for weight in layer_weights(decoder, rotary, short, reaches[0], settings.sink_size, window):
        weights.append(weight)
        on_progress(IdentifyProgress(settings.steps + 1 + len(weights), passes, tokens=len(short.ids)))
    nats = (total / settings.steps * torch.stack(weights)[:, None, None]) @ torch.tensor(
        [1, REPEAT_WEIGHT], dtype=torch.float64
    )
    mean = [[[float(f"{x:.4g}") for x in head] for head in row] for row in nats.tolist()]
    losses = ReachLosses(
        settings.sink_size, context, reaches, tuple(tuple(tuple(head) for head in row) for row in mean)
    )
    scores = rank_scores([[head[0] for head in row] for row in mean])
    how = {
        "scores": f"rank of the loss at a reach of {reaches[0]}", "parts": PARTS, "part_size": PART_SIZE,
        "weighing_context": len(short.ids), "repeat_weight": REPEAT_WEIGHT,
    }  # fmt: skip
    return MethodResult(scores, how, losses, tuple(notices))


def mean_losses(
    decoder: Decoder, rotary: RotaryTable, text: SampledText, reaches: Sequence[int], sink_size: int
) -> Tensor:  # fmt: skip
    """float64 [num_layers, num_kv_heads, len(reaches), 2]: means over the queries of the stretch, and of the parts."""
    each = measure_reaches(decoder, rotary, text.ids, text.rows, reaches, sink_size).double()
    kinds = each.split([len(text.text_rows), len(text.repeat_rows)], dim=-1)
    return torch.stack([kind.mean(-1) for kind in kinds], dim=-1)


def layer_weights(
    decoder: Decoder, rotary: RotaryTable, text: SampledText, reach: int, sink_size: int,
    window_attention: Callable[..., None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """For each layer, float64 [2]: nats a unit of loss, for the queries of the stretch, and of the parts.

    Args:
        window_attention: see `WholeTextAttention`.
    """
    losses = mean_losses(decoder, rotary, text, (reach,), sink_size).sum((1, 2))
    kinds = (text.text_rows, text.repeat_rows)
    costs = layer_costs(decoder, rotary, text.ids, kinds, reach, sink_size, window_attention)
    for of_layer, cost in zip(losses, costs, strict=True):
        yield torch.where(of_layer > 0, torch.tensor(cost, dtype=torch.float64) / of_layer, 0.0)


def _window_attention(device_type: str, head_dim: int) -> Callable[..., None] | None:
    """The GPU's kernel, where there is one for these heads."""
    if device_type != "cuda" or head_dim not in (64, 128):
        return None
    from longrun.kernels.banded_prefill import banded_prefill

    return partial(banded_prefill, in_order=True)


def _drawn(
    tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, settings: IdentifySettings, step: int,
    length: int | None = None,
) -> SampledText:  # fmt: skip
    """The text of one step, drawn from (seed, step) alone; of another length than `settings.context` where given."""
    draw = random.Random(f"reach/{settings.seed}/{step}")
    length = length or settings.context
    assert length is not None
    start = draw.randint(0, len(text_ids) - length)
    ids = text_ids[start : start + length].tolist()
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer.encode("")[:1] == [begin]:
        ids = [begin, *ids]
    return sampled_text(ids, TextEncoder(tokenizer).ids, length, draw)
