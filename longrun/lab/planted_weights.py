"""Weights that retrieve by construction: see `longrun.lab.planted` for the idea and the margins.

Every planted value is one signed entry in an otherwise vanishing row, so that int8 and NF4 hold it exactly; every row
without a part in the construction is random.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrun.lab.shard_writer import TensorPlan

NUM_SLOTS = 4  # tokens of the cue
NUM_OFFSETS = NUM_SLOTS + 1
OFFSET_NATS = 100.0  # softmax logit per unit of pair weight in the offset heads
MATCH_NATS = 64.0  # softmax logit per matching token in the retrieval head
ANSWER_LOGIT = 64.0  # language-model logit of the copied token
VANISHING = 1e-5  # size of what the random parts add to the residual stream
STILL_ANGLE = 0.05  # radians that the fastest still pair turns over the whole context
RMS_NORM_EPS = 1e-5
_SLAB_ROWS = 8192

# The residual stream's squared norm before layer 0, before layer 1 and before the last norm: A and C carry four unit
# parts, B and Q one per token of the cue, the constant and the random rest one each.
_NORM_START = NUM_SLOTS + 2
_NORM_MATCH = _NORM_START + 2 * NUM_SLOTS
_NORM_END = _NORM_MATCH + NUM_SLOTS


@dataclass(frozen=True)
class PlantedShape:
    """Shape of a planted checkpoint. `moving_pairs`: rotary pairs used for offsets; the others stay still.

    The code width is 2 * (head_dim / 2 - moving_pairs); four code widths and a constant must fit into hidden_size.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    moving_pairs: int
    dtype: str
    retrieval_ratio: float

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def code_size(self) -> int:
        return self.head_dim - 2 * self.moving_pairs

    @property
    def slot_size(self) -> int:
        return self.code_size // NUM_SLOTS

    @property
    def frequencies(self) -> list[float]:
        """Radians per token of the moving pairs: a geometric ladder that starts at 1."""
        return [self.rope_theta ** (-2 * pair / self.head_dim) for pair in range(self.moving_pairs)]

    @property
    def rope_theta(self) -> float:
        """Base for which the first still pair turns by `STILL_ANGLE` over the whole context."""
        return (self.max_position_embeddings / STILL_ANGLE) ** (self.head_dim / (2 * self.moving_pairs))

    @property
    def pair_weights(self) -> list[float]:
        """Weight of each moving pair in an offset score: more on the two fastest, which tell neighbours apart."""
        return [1.6, 1.3, *[1.0] * (self.moving_pairs - 2)]


@dataclass(frozen=True)
class PlantedHeads:
    """Where the construction sits: KV heads of layer 0 that look back, and the KV head of layer 1 that retrieves."""

    offset_kv_heads: tuple[int, ...]
    retrieval_kv_head: int
    retrieval_member: int  # which query head of its group does the matching

    @classmethod
    def choose(cls, shape: PlantedShape, seed: int) -> PlantedHeads:
        rng = random.Random(f"planted-heads/{seed}")
        needed = -(-NUM_OFFSETS // shape.group_size)
        offset_heads = rng.sample(range(shape.num_kv_heads), needed)
        return cls(tuple(offset_heads), rng.randrange(shape.num_kv_heads), rng.randrange(shape.group_size))


def make_codes(vocab_size: int, num_slots: int, slot_size: int, apart: range, seed: int) -> Tensor:
    """Token codes float32 [vocab_size, num_slots, slot_size] on the CPU, every slot a random unit vector.

    Tokens in `apart` differ from each other as far as a greedy choice among 512 candidates per slot gets them.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"codes/{seed}".encode()))
    codes = torch.nn.functional.normalize(torch.randn(vocab_size, num_slots, slot_size, generator=generator), dim=-1)
    for number, token in enumerate(apart):
        if number == 0:
            continue
        candidates = torch.nn.functional.normalize(torch.randn(num_slots, 512, slot_size, generator=generator), dim=-1)
        placed = codes[apart.start : token].permute(1, 2, 0)  # [num_slots, slot_size, number]
        nearest = torch.bmm(candidates, placed).amax(dim=-1)  # [num_slots, 512]
        best = nearest.argmin(dim=-1)
        codes[token] = candidates[torch.arange(num_slots), best]
    return codes


class PlantedWeights:
    """Plans of all tensors of a planted checkpoint; each is made on `device` when it is written."""

    def __init__(
        self, shape: PlantedShape, num_layers: int, heads: PlantedHeads, apart: range, seed: int, device: torch.device
    ) -> None:
        self.shape, self.num_layers, self.heads = shape, num_layers, heads
        self._seed, self._device = seed, device
        size = shape.code_size
        self._token, self._keys, self._query, self._output = (slice(i * size, (i + 1) * size) for i in range(4))
        self._constant, self._rest = 4 * size, slice(4 * size + 1, shape.hidden_size)
        codes = make_codes(shape.vocab_size, NUM_SLOTS, shape.slot_size, apart, seed)
        self._codes = codes.reshape(shape.vocab_size, size).to(device)
        self._gain_start, self._gain_match, self._gain_end = (
            1 / math.sqrt(norm / shape.hidden_size + RMS_NORM_EPS) for norm in (_NORM_START, _NORM_MATCH, _NORM_END)
        )
        half = shape.head_dim // 2
        self._still = [*range(shape.moving_pairs, half), *range(half + shape.moving_pairs, shape.head_dim)]
        rng = random.Random(f"planted-maps/{seed}")
        # Map M_{j+1} takes slot j of a code to slot j of a hash: a signed permutation, so that norms stay exactly 1.
        self._maps = [
            (rng.sample(range(shape.slot_size), shape.slot_size), rng.choices((-1.0, 1.0), k=shape.slot_size))
            for _ in range(NUM_SLOTS)
        ]

    def plans(self) -> list[TensorPlan]:
        """Every tensor of the checkpoint in file order."""
        shape = self.shape
        hidden, wide = shape.hidden_size, shape.intermediate_size
        qo_rows, kv_rows = shape.num_qo_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        plans = [TensorPlan("model.embed_tokens.weight", (shape.vocab_size, hidden), self._embedding)]
        for layer in range(self.num_layers):
            for part, rows, columns in (
                ("self_attn.q_proj", qo_rows, hidden),
                ("self_attn.k_proj", kv_rows, hidden),
                ("self_attn.v_proj", kv_rows, hidden),
                ("self_attn.o_proj", hidden, qo_rows),
                ("mlp.gate_proj", wide, hidden),
                ("mlp.up_proj", wide, hidden),
                ("mlp.down_proj", hidden, wide),
            ):
                plans.append(self._linear(layer, part, rows, columns))
            for part in ("input_layernorm", "post_attention_layernorm"):
                plans.append(self._norm(layer, part))
        plans.append(TensorPlan("model.norm.weight", (hidden,), lambda: iter([torch.ones(hidden)])))
        plans.append(TensorPlan("lm_head.weight", (shape.vocab_size, hidden), self._lm_head))
        return plans

    def _randn(self, name: str, *size: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(*size, generator=generator, device=self._device)

    def _embedding(self) -> Iterator[Tensor]:
        for start in range(0, self.shape.vocab_size, _SLAB_ROWS):
            codes = self._codes[start : start + _SLAB_ROWS]
            rows = torch.zeros(len(codes), self.shape.hidden_size, device=self._device)
            rows[:, self._token] = codes
            rows[:, self._constant] = 1.0
            rest = self._randn(f"embed/{start}", len(codes), self._rest.stop - self._rest.start)
            rows[:, self._rest] = torch.nn.functional.normalize(rest, dim=-1)
            yield rows

    def _lm_head(self) -> Iterator[Tensor]:
        for start in range(0, self.shape.vocab_size, _SLAB_ROWS):
            codes = self._codes[start : start + _SLAB_ROWS]
            rows = torch.zeros(len(codes), self.shape.hidden_size, device=self._device)
            rows[:, self._output] = codes * (ANSWER_LOGIT / (NUM_SLOTS * self._gain_end))
            yield rows

    def _norm(self, layer: int, part: str) -> TensorPlan:
        name, hidden = f"model.layers.{layer}.{part}.weight", self.shape.hidden_size
        planted = layer < 2 and part == "input_layernorm"

        def make() -> Iterator[Tensor]:
            yield torch.ones(hidden) if planted else 1 + 0.1 * self._randn(name, hidden)

        return TensorPlan(name, (hidden,), make)

    def _linear(self, layer: int, part: str, rows: int, columns: int) -> TensorPlan:
        name = f"model.layers.{layer}.{part}.weight"

        def make() -> Iterator[Tensor]:
            scale = VANISHING if part in ("self_attn.o_proj", "mlp.down_proj") else 1.0
            weight = self._randn(name, rows, columns).mul_(scale / math.sqrt(columns))
            if layer == 0:
                self._plant_offsets(part, weight)
            elif layer == 1:
                self._plant_retrieval(part, weight)
            yield weight

        return TensorPlan(name, (rows, columns), make)

    def _head_rows(self, head: int) -> slice:
        return slice(head * self.shape.head_dim, (head + 1) * self.shape.head_dim)

    def _plant_offsets(self, part: str, weight: Tensor) -> None:
        """Layer 0: query head number `offset` of the planted groups attends to the token `offset` positions back."""
        shape, half = self.shape, self.shape.head_dim // 2
        amplitudes = [
            math.sqrt(pair_weight * OFFSET_NATS * math.sqrt(shape.head_dim)) / self._gain_start
            for pair_weight in shape.pair_weights
        ]
        ladder = list(enumerate(zip(shape.frequencies, amplitudes, strict=True)))
        for number, kv_head in enumerate(self.heads.offset_kv_heads):
            kv_rows = self._head_rows(kv_head)
            if part == "self_attn.k_proj":
                head = weight[kv_rows]
                for pair, (_, amplitude) in ladder:
                    head[pair], head[half + pair] = 0.0, 0.0
                    head[pair, self._constant] = amplitude
            elif part == "self_attn.v_proj":
                self._read_token(weight[kv_rows], self._gain_start)
            for member in range(shape.group_size):
                offset = number * shape.group_size + member
                if offset >= NUM_OFFSETS:
                    break
                qo_rows = self._head_rows(kv_head * shape.group_size + member)
                if part == "self_attn.q_proj":
                    head = weight[qo_rows]
                    head.zero_()
                    for pair, (frequency, amplitude) in ladder:
                        head[pair, self._constant] = amplitude * math.cos(offset * frequency)
                        head[half + pair, self._constant] = -amplitude * math.sin(offset * frequency)
                elif part == "self_attn.o_proj":
                    self._write_hash(weight[:, qo_rows], offset)

    def _read_token(self, head: Tensor, gain: float) -> None:
        """Value rows [head_dim, hidden]: the token code at its own size in the first dims, random in the others."""
        size = self.shape.code_size
        head[:size] = 0.0
        index = torch.arange(size, device=head.device)
        head[index, self._token.start + index] = 1 / gain

    def _write_hash(self, columns: Tensor, offset: int) -> None:
        """Output columns [hidden, head_dim]: the token `offset` back goes to slot offset-1 of B and offset of Q."""
        size = self.shape.slot_size
        for target, slot in ((self._keys, offset - 1), (self._query, offset)):
            if 0 <= slot < NUM_SLOTS:
                for row, (column, sign) in enumerate(zip(*self._maps[slot], strict=True)):
                    columns[target.start + slot * size + row, slot * size + column] = sign

    def _plant_retrieval(self, part: str, weight: Tensor) -> None:
        """Layer 1: one query head matches Q against B in the still dims and copies the matching token to C."""
        shape, heads = self.shape, self.heads
        gain = math.sqrt(MATCH_NATS * math.sqrt(shape.head_dim)) / self._gain_match
        qo_rows = self._head_rows(heads.retrieval_kv_head * shape.group_size + heads.retrieval_member)
        kv_rows = self._head_rows(heads.retrieval_kv_head)
        still = torch.tensor(self._still, device=weight.device)
        index = torch.arange(shape.code_size, device=weight.device)
        if part == "self_attn.q_proj":
            weight[qo_rows] = 0.0
            weight[qo_rows][still, self._query.start + index] = gain
        elif part == "self_attn.k_proj":
            head = weight[kv_rows]
            head[still] = 0.0
            head[still, self._keys.start + index] = gain
        elif part == "self_attn.v_proj":
            self._read_token(weight[kv_rows], self._gain_match)
        elif part == "self_attn.o_proj":
            weight[:, qo_rows][self._output.start + index, index] = 1.0
