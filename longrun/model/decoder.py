"""The decoder of the whole Llama family in one file: config-driven, plain torch, inference only.

Attention and its cache are behind `longrun.attention.interface`; here are embedding, norms, projections, RoPE, MLP and
lm_head. Everything that is independent from token to token runs on `token_slice` tokens at a time, so that a chunk
costs the residual stream, one q/k/v buffer and attention's output, and the rest stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longrun.attention.interface import Attention, Step
from longrun.config.model_config import ModelConfig
from longrun.model.rope import apply_rope_, signed_sin
from longrun.quant.linear import QuantLinear
from longrun.specs.model_bytes import HEAD_PIECE, TOKEN_SLICE


@dataclass
class DecoderLayer:
    """Weights of one layer, heads in permuted order.

    Attributes:
        input_norm, post_norm: [hidden_size].
        q_norm, k_norm: [head_dim], or None where the family has none.
        qkv: rows of q (num_qo_heads x head_dim), then k, then v (num_kv_heads x head_dim each).
        out: attention output projection.
        gate_up: rows of gate, then of up (intermediate_size each).
        down: MLP output projection.
    """

    input_norm: Tensor
    qkv: QuantLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: QuantLinear
    post_norm: Tensor
    gate_up: QuantLinear
    down: QuantLinear

    def tensors(self) -> Iterator[Tensor]:
        for norm in (self.input_norm, self.q_norm, self.k_norm, self.post_norm):
            if norm is not None:
                yield norm
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            yield from linear.tensors()


class DecoderKernels(Protocol):
    """GPU kernels in place of torch's operations; see the files of these names in `longrun.kernels`."""

    rotary_: Callable[..., Tensor]
    silu_mul_: Callable[..., Tensor]
    vector_linear: Callable[..., Tensor]


class FewTokenLinear(Protocol):
    """The CPU's kernel for linears of a few tokens; see `longrun.kernels.cpu_linear`."""

    max_tokens: int
    vector_linear: Callable[..., Tensor]
    prepare: Callable[..., Callable[[], object]]


class Decoder:
    """One model, its KV heads reordered per layer.

    Attributes:
        config: shape of the model.
        permutation: per layer, the old index of each KV head in its new place (retrieval heads first).
        compute_dtype, device: of activations and norms.
        token_slice: tokens worked on at a time where tokens are independent.
    """

    def __init__(
        self,
        config: ModelConfig,
        permutation: Sequence[Sequence[int]],
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        lm_head: Tensor,
        token_slice: int = TOKEN_SLICE,
        kernels: DecoderKernels | None = None,
        few_tokens: FewTokenLinear | None = None,
    ) -> None:
        """Use loaded weights as they are; see `longrun.model.checkpoint.load_decoder`.

        Args:
            embedding, lm_head: [vocab_size, hidden_size], compute dtype or bf16; the same tensor where they are tied.
            final_norm: [hidden_size], compute dtype.
            kernels: fused GPU kernels for RoPE, MLP and the linears of a single token; plain torch without them.
            few_tokens: compiled CPU kernel for the linears of a few tokens; without it torch multiplies, by a
                dequantized copy where weights are quantized.
        """
        assert len(layers) == len(permutation) == config.num_layers
        assert all(sorted(order) == list(range(config.num_kv_heads)) for order in permutation)
        self.config = config
        self.permutation = tuple(tuple(order) for order in permutation)
        self.token_slice = token_slice
        self._embedding = embedding
        self._layers = list(layers)
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._kernels, self._few_tokens = kernels, few_tokens
        self._head_linear = QuantLinear(lm_head, "fp32" if lm_head.dtype == torch.float32 else "bf16")

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._final_norm.dtype

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        return tuple(self._layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters; equal to `longrun.specs.model_bytes.model_weight_bytes`."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter once."""
        yield from (self._embedding, self._final_norm)
        if self._lm_head is not self._embedding:
            yield self._lm_head
        for layer in self._layers:
            yield from layer.tensors()

    def with_layers(
        self, permutation: Sequence[Sequence[int]], layers: Sequence[DecoderLayer], kernels: DecoderKernels | None
    ) -> Decoder:
        """Another decoder of other layers, heads and kernels; embedding, final norm and lm_head are shared."""
        return Decoder(
            self.config, permutation, self._embedding, layers, self._final_norm, self._lm_head, self.token_slice,
            kernels, self._few_tokens,
        )  # fmt: skip

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, step: Step, attention: Attention, all_positions: bool = False,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run `step.num_tokens` tokens through all layers; attention appends their keys and values to its cache.

        Args:
            token_ids: int64 [T] on the decoder's device.
            step: their positions and rotary tables.
            attention: see `Attention`; called once a layer.
            all_positions: return every position instead of the last one only.
            on_layer: called before each layer with its index and the residual stream [T, hidden_size].

        Returns:
            Hidden states after the final norm, [1, hidden_size] or [T, hidden_size], compute dtype.
        """
        every = range(len(self._layers))
        hidden = self.run_layers(every, self.embed(token_ids), step, attention, all_positions, on_layer)
        return self.finished(hidden)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream [T, hidden_size] before the first layer, compute dtype, of int64 [T]."""
        return F.embedding(token_ids, self._embedding).to(self.compute_dtype)

    def finished(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, hidden_size] after the final norm, of the residual stream after the last layer."""
        return self._norm(hidden, self._final_norm)

    @torch.inference_mode()
    def run_layers(
        self, layers: Sequence[int], hidden: Tensor, step: Step, attention: Attention, all_positions: bool = True,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run some layers, in ascending order, over the residual stream [T, hidden_size], which is overwritten.

        Other arguments as `forward`; the last position is enough for the model's last layer alone.

        Returns:
            The residual stream after them.
        """
        config, num_tokens = self.config, hidden.shape[0]
        assert num_tokens == step.num_tokens > 0
        # One buffer serves all layers: a fresh large allocation a layer would be paid in page faults.
        qkv = hidden.new_empty(num_tokens, config.q_size + 2 * config.kv_size)
        cos, sin = step.cos, step.sin
        if self._kernels is None:
            cos, sin = cos[:, None], signed_sin(sin)[:, None]
        last = len(self._layers) - 1
        for layer_idx in layers:
            layer = self._layers[layer_idx]
            if on_layer is not None:
                on_layer(layer_idx, hidden)
            self._project(layer, hidden, qkv, cos, sin)
            heads = qkv.view(num_tokens, -1, config.head_dim)
            q, k, v = heads.split((config.num_qo_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
            attended = attention.run(layer_idx, q, k, v, step).reshape(num_tokens, config.q_size)
            if layer_idx == last and not all_positions:
                hidden, attended = hidden[-1:], attended[-1:]
            self._finish(layer, hidden, attended)
            del attended
        return hidden

    @torch.inference_mode()
    def forward_one(self, token_id: Tensor, decode: Callable[..., Tensor]) -> Tensor:
        """One token through all layers and the lm_head with the GPU's kernels, in a form that a CUDA graph can replay.

        Args:
            token_id: int64 [1] on the decoder's device; read when the graph runs.
            decode: see `FusedDecode.decode`.

        Returns:
            float32 [1, vocab_size].
        """
        assert self._kernels is not None
        hidden = self.embed(token_id)
        return self.layers_of_one(hidden, self._kernels.vector_linear, decode).float()

    def embedding_of(self, token_id: int) -> Tensor:
        """[hidden_size], compute dtype or bf16."""
        return self._embedding[token_id]

    def layers_of_one(self, hidden: Tensor, linear: Callable[..., Tensor], decode: Callable[..., Tensor]) -> Tensor:
        """All layers and the lm_head for one token.

        Args:
            hidden: [1, hidden_size], compute dtype; overwritten.
            linear: `vector_linear` of the kernels.
            decode: see `FusedDecode.decode`.

        Returns:
            [1, vocab_size], compute dtype.
        """
        eps = self.config.rms_norm_eps
        for layer_idx, layer in enumerate(self._layers):
            qkv = linear(hidden, layer.qkv, norm_weight=layer.input_norm, eps=eps)
            attended = decode(layer_idx, qkv, layer.q_norm, layer.k_norm, eps)
            linear(attended, layer.out, out=hidden, accumulate=True)
            gated = linear(hidden, layer.gate_up, norm_weight=layer.post_norm, eps=eps, gated=True)
            linear(gated, layer.down, out=hidden, accumulate=True)
        return linear(hidden, self._head_linear, norm_weight=self._final_norm, eps=eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocab_size] from hidden states [n, hidden_size] as `forward` returns them."""
        few = self._few_linear(hidden.shape[0])
        if few is not None:
            return few(hidden, self._head_linear).float()
        if hidden.dtype == self._lm_head.dtype:
            return F.linear(hidden, self._lm_head).float()
        found, start = hidden.new_empty(hidden.shape[0], self.config.vocab_size), 0
        for piece in self._lm_head.split(max(1, HEAD_PIECE // hidden.shape[1])):
            found[:, start : start + len(piece)] = F.linear(hidden, piece.to(hidden.dtype))
            start += len(piece)
        return found

    def _slices(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self.token_slice):
            yield slice(start, min(start + self.token_slice, num_tokens))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _few_linear(self, num_tokens: int) -> Callable[..., Tensor] | None:
        """The CPU kernel's `vector_linear`, where there is one for so many tokens."""
        few = self._few_tokens
        return few.vector_linear if few is not None and num_tokens <= few.max_tokens else None

    def _project(self, layer: DecoderLayer, hidden: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Norm, q/k/v projection, head norms and RoPE, into `qkv` [T, q_size + 2 * kv_size].

        cos, sin: [T, head_dim] with kernels, else [T, 1, head_dim] and sin signed.
        """
        config, num_tokens = self.config, hidden.shape[0]
        num_turned = config.num_qo_heads + config.num_kv_heads
        dense = layer.qkv.dense() if num_tokens > self.token_slice else None
        few = self._few_linear(num_tokens)
        for part in self._slices(num_tokens):
            if few is not None:
                few(hidden, layer.qkv, out=qkv, norm_weight=layer.input_norm, eps=config.rms_norm_eps)
            else:
                layer.qkv(self._norm(hidden[part], layer.input_norm), out=qkv[part], dense=dense)
            heads = qkv[part].view(-1, num_turned + config.num_kv_heads, config.head_dim)[:, :num_turned]
            if self._kernels is not None:
                self._kernels.rotary_(
                    heads, cos[part], sin[part], weight_a=layer.q_norm, weight_b=layer.k_norm,
                    split=config.num_qo_heads, eps=config.rms_norm_eps,
                )  # fmt: skip
                continue
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = heads.split((config.num_qo_heads, config.num_kv_heads), dim=1)
                q.copy_(self._norm(q, layer.q_norm))
                k.copy_(self._norm(k, layer.k_norm))
            apply_rope_(heads, cos[part], sin[part])

    def _finish(self, layer: DecoderLayer, hidden: Tensor, attended: Tensor) -> None:
        """Output projection and MLP, both added to `hidden` [T, hidden_size] in place."""
        num_tokens, width = hidden.shape[0], self.config.intermediate_size
        few = self._few_linear(num_tokens)
        if few is not None:
            few(attended, layer.out, out=hidden, accumulate=True)
            gate = few(hidden, layer.gate_up, norm_weight=layer.post_norm, eps=self.config.rms_norm_eps, gated=True)
            few(gate, layer.down, out=hidden, accumulate=True)
            return
        share = num_tokens > self.token_slice
        dense = layer.out.dense() if share else None
        for part in self._slices(num_tokens):
            layer.out(attended[part], out=hidden[part], accumulate=True, dense=dense)
        dense = layer.gate_up.dense() if share else None
        dense_down = layer.down.dense() if share else None
        buffer = hidden.new_empty(min(num_tokens, self.token_slice), 2 * width)
        for part in self._slices(num_tokens):
            x = self._norm(hidden[part], layer.post_norm)
            gate_up = layer.gate_up(x, out=buffer[: x.shape[0]], dense=dense)
            del x  # or it would outlive the next slice's norm
            if self._kernels is not None:
                gate = self._kernels.silu_mul_(gate_up)
            else:
                gate, up = gate_up.split(width, dim=1)
                F.silu(gate, inplace=True).mul_(up)
            layer.down(gate, out=hidden[part], accumulate=True, dense=dense_down)
