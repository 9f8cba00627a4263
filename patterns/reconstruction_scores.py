"""Head scores from a few forward passes, without training: which tokens matter when the model repeats its context?

After KVzip (arXiv 2505.23416). The model reads the context once. Then it is made to repeat it part by part, each part
after a short prompt that quotes the last tokens of the part before. A context token's score in a KV head is the
largest attention probability that it gets from any query of the repeat, over all query heads of the group; a query
counts only for tokens outside its streaming window. A head's raw score is the mean of its tokens' scores: heads that
the repeat needs are looked through everywhere, others nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrun.errors import InputError
from longrun.patterns.head_split import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE
from longrun.patterns.identify_settings import FIRST_PROMPT, NEXT_PROMPT
from longrun.patterns.reconstruction_attention import TILE_BYTES, ReconstructionAttention, attention_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ReconstructionSettings:
    """How heads are scored.

    Attributes:
        sink_size, recent_size: the streaming window, tokens: what a head sees without being a retrieval head.
        part_size: context tokens repeated at once; part of the method, it changes the scores.
        quote_size: tokens of the part before that the prompt quotes.
        quantile: the quantile of a head's token scores that is its score; None takes their mean, which sets the heads
            of the planted and the demo model apart best: the largest (1) is near 1 for many heads that few tokens need.
        chunk_size: tokens of one forward pass; decides memory and nothing else.
        tile_bytes: the most memory for attention probabilities at a time.

    Raises:
        InputError: a size or the quantile is out of range.
    """

    sink_size: int = DEFAULT_SINK_SIZE
    recent_size: int = DEFAULT_RECENT_SIZE
    part_size: int = 2048
    quote_size: int = 8
    quantile: float | None = None
    chunk_size: int = 1024
    tile_bytes: int = TILE_BYTES

    def __post_init__(self) -> None:
        for name, least in (("sink_size", 0), ("recent_size", 1), ("part_size", 1), ("quote_size", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)} must be at least {least}")
        for name in ("chunk_size", "tile_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if self.quantile is not None and not 0.0 <= self.quantile <= 1.0:
            raise InputError(f"quantile {self.quantile} must be between 0 and 1")


def repeat_parts(
    context_ids: Sequence[int], encode: Callable[[str], list[int]], settings: ReconstructionSettings
) -> list[list[int]]:
    """What is fed after the context, one list a part: prompt, quoted tokens, the part's own tokens.

    Args:
        encode: token ids of a text, without special tokens.
    """
    parts = []
    for start in range(0, len(context_ids), settings.part_size):
        part = list(context_ids[start : start + settings.part_size])
        if start == 0:
            parts.append(encode(FIRST_PROMPT) + part)
        else:
            quoted = list(context_ids[max(0, start - settings.quote_size) : start])
            parts.append(encode(NEXT_PROMPT) + quoted + part)
    return parts


class Reconstruction:
    """Scores of one model over one context, part by part.

    Args:
        model: a transformers model of the Llama family, on the device and in the dtype to run in.
        context_ids: token ids of the context.
        parts: what is fed after it, one list at a time, from `repeat_parts`.

    Raises:
        InputError: a context with no token outside the streaming window, or one beyond the model's sliding window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context_ids: Sequence[int],
        parts: Sequence[Sequence[int]],
        settings: ReconstructionSettings | None = None,
    ) -> None:
        self.model, self.settings = model, settings or ReconstructionSettings()
        self.context_ids, self.parts = list(context_ids), [list(part) for part in parts]
        self.parts_done = 0
        num_tokens, longest = len(self.context_ids), max(map(len, self.parts), default=0)
        settings = self.settings
        self.counted = slice(settings.sink_size, min(num_tokens, num_tokens + longest - settings.recent_size))
        if self.counted.stop <= self.counted.start:
            raise InputError(
                f"a context of {num_tokens:,} tokens and repeats of {longest:,} leave none outside the streaming "
                f"window of {settings.sink_size} sinks and {settings.recent_size} recent tokens: give a longer context"
            )
        window = getattr(model.config, "sliding_window", None)
        if window is not None and num_tokens + longest > window:
            raise InputError(
                f"a context of {num_tokens:,} tokens with its repeat is longer than the model's sliding window of "
                f"{window:,}: give a shorter one"
            )
        config = model.config
        self.attention = ReconstructionAttention(
            config.num_hidden_layers,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            num_tokens,
            num_tokens + longest,
            settings.sink_size,
            settings.recent_size,
            model.dtype,
            model.device,
            settings.tile_bytes,
        )

    @property
    def num_passes(self) -> int:
        """Forward passes of a whole run."""
        return self._passes(0)

    @property
    def passes_left(self) -> int:
        """Forward passes until `run` is through; the context is read again after `resume`."""
        return self._passes(self.parts_done) if self.parts_done < len(self.parts) else 0

    def resume(self, parts_done: int, maxima: Tensor) -> None:
        """Continue from what `on_part` of an earlier run gave: float32 [num_layers, num_kv_heads, context]."""
        self.attention.maxima.copy_(maxima)
        self.parts_done = parts_done

    def run(
        self, on_pass: Callable[[int], None] | None = None, on_part: Callable[[int, Tensor], None] | None = None
    ) -> None:
        """Read the context, then every part that is not done yet.

        Args:
            on_pass: called with the number of tokens after every forward pass.
            on_part: called with (parts done, maxima) after every part.
        """
        if self.parts_done == len(self.parts):
            return
        with attention_of(self.model), torch.inference_mode():
            self.attention.length, self.attention.scoring = 0, False
            self._feed(self.context_ids, on_pass)
            self.attention.scoring = True
            while self.parts_done < len(self.parts):
                self.attention.length = len(self.context_ids)
                self._feed(self.parts[self.parts_done], on_pass)
                self.parts_done += 1
                if on_part is not None:
                    on_part(self.parts_done, self.attention.maxima)

    def raw_scores(self) -> Tensor:
        """float64 [num_layers, num_kv_heads] on the CPU: mean or quantile of each head's token scores, in [0, 1]."""
        tokens = self.attention.maxima[:, :, self.counted].double().cpu()
        if self.settings.quantile is None:
            return tokens.mean(dim=-1)
        kept = tokens.sort(dim=-1).values
        return kept[..., round(self.settings.quantile * (kept.shape[-1] - 1))]

    def _passes(self, parts_done: int) -> int:
        size = self.settings.chunk_size
        return sum(-(-len(ids) // size) for ids in (self.context_ids, *self.parts[parts_done:]))

    def _feed(self, ids: Sequence[int], on_pass: Callable[[int], None] | None) -> None:
        """Forward passes over `ids` at the positions after those already held."""
        device = self.model.device
        for start in range(0, len(ids), self.settings.chunk_size):
            piece = ids[start : start + self.settings.chunk_size]
            first = self.attention.length
            self.model.base_model(
                input_ids=torch.tensor([piece], device=device),
                position_ids=torch.arange(first, first + len(piece), device=device)[None],
                use_cache=False,
                reconstruction=self.attention,
            )
            self.attention.length += len(piece)
            if on_pass is not None:
                on_pass(len(piece))
