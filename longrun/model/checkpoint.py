"""From a checkpoint to a `Decoder`: one tensor at a time, everything checked before the first byte is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longrun.allocation import ask_for_huge_pages, keep_freed_memory
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model.adapter import Adapter
from longrun.model.checkpoint_tensors import find_tensors
from longrun.model.decoder import Decoder, DecoderKernels, DecoderLayer, FewTokenLinear
from longrun.model.fingerprint import check_base
from longrun.model.gguf_tensors import Dequantize, GgufTensor
from longrun.model.stored_tensor import StoredTensor
from longrun.quant.int4_weight import Int4Quantizer, Int4Rows
from longrun.quant.linear import QuantLinear
from longrun.quant.weight_format import compute_itemsize, is_quantized, table_itemsize
from longrun.specs.model_bytes import TOKEN_SLICE

_PIECE_BYTES = 32 * 2**20
# A piece that an adapter changes also stands in float32: smaller ones stay within what the plan counts for a piece.
_ADAPTED_PIECE_BYTES = 8 * 2**20


def load_decoder(
    model_dir: str | Path,
    config: ModelConfig,
    permutation: Sequence[Sequence[int]],
    weight_format: str,
    device: torch.device | str,
    token_slice: int = TOKEN_SLICE,
    kernels: DecoderKernels | None = None,
    adapter: Adapter | None = None,
    few_tokens: FewTokenLinear | None = None,
    quantize_int4: Int4Quantizer | None = None,
    dequantize_gguf: Mapping[str, Dequantize] | None = None,
) -> Decoder:
    """Load a checkpoint into a decoder whose KV heads are reordered per layer.

    Rows of q/k/v (and their biases) and columns of o are permuted on the way; q, k and v become one linear, gate and
    up another. Peak memory is the weights loaded so far, plus one linear in the compute dtype where it is being
    quantized, plus a piece of 32 MiB.

    Args:
        model_dir: folder with config.json and safetensors files, or a GGUF file (or its folder).
        config: its shape, from `ModelConfig.from_dir`.
        permutation: per layer, the old index of each KV head in its new place.
        weight_format: format of the linears; norms and biases are in the compute dtype, embedding and lm_head in
            float32 or bf16 (see `table_itemsize`).
        device: where the weights go, and stay.
        token_slice, kernels, few_tokens: see `Decoder`.
        adapter: added to the linears in float32, before they are permuted and quantized.
        quantize_int4: does on a CPU what `quantize_int4_into` does, some rows at a time.
        dequantize_gguf: by tensor type of a GGUF file, what turns it into values; default: the `gguf` package.

    Raises:
        CheckpointError: an adapter of another checkpoint; a missing, left-over, misshapen, truncated or unreadable
            tensor or file.
        ConfigError: unknown weight format; a package that the format needs is missing.
    """
    device = torch.device(device)
    dtype = torch.float32 if compute_itemsize(weight_format, device.type) == 4 else torch.bfloat16
    tensors = find_tensors(model_dir, config, dequantize_gguf)
    if adapter is not None:
        check_base(adapter, tensors, config, model_dir)
    keep_freed_memory()
    loader = _Loader(tensors, config, weight_format, dtype, device, adapter, quantize_int4)
    table_dtype = torch.float32 if table_itemsize(weight_format) == 4 else torch.bfloat16
    embedding = loader.tensor("model.embed_tokens.weight", table_dtype)
    layers = [loader.layer(layer_idx, order) for layer_idx, order in enumerate(permutation)]
    final_norm = loader.tensor("model.norm.weight")
    lm_head = embedding if config.tie_word_embeddings else loader.tensor("lm_head.weight", table_dtype)
    if config.tie_word_embeddings:
        loader.check_tied(embedding)
    return Decoder(config, permutation, embedding, layers, final_norm, lm_head, token_slice, kernels, few_tokens)


class _Loader:
    """Fills tensors on the target device from stored ones, a piece at a time."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        config: ModelConfig,
        weight_format: str,
        dtype: torch.dtype,
        device: torch.device,
        adapter: Adapter | None,
        quantize_int4: Int4Quantizer | None,
    ) -> None:
        self.tensors = tensors
        self.adapter = adapter
        self.config = config
        self.weight_format = weight_format
        self.dtype = dtype
        self.device = device
        self.quantize_int4 = quantize_int4 if weight_format == "int4" and device.type == "cpu" else None
        self.rooms: dict[str, Tensor] = {}

    def room(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the values of one use until the next ones: fetched from the system once, not for each tensor."""
        length = math.prod(shape) * dtype.itemsize
        if use not in self.rooms or len(self.rooms[use]) < length:
            self.rooms.pop(use, None)
            self.rooms[use] = torch.empty(length, dtype=torch.uint8, device=device)
        return self.rooms[use][:length].view(dtype).view(shape)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        target = self.empty(self.tensors[name].shape, dtype or self.dtype)
        self.fill(target, name)
        return target

    def layer(self, layer_idx: int, order: Sequence[int]) -> DecoderLayer:
        config = self.config
        attention, mlp = f"model.layers.{layer_idx}.self_attn.", f"model.layers.{layer_idx}.mlp."
        norm = f"model.layers.{layer_idx}.{{}}.weight"
        kv = _channels(order, config.head_dim)
        q = _channels(order, config.head_dim * config.group_size)
        loaded = DecoderLayer(
            input_norm=self.tensor(norm.format("input_layernorm")),
            qkv=self.linear([(attention + f"{x}_proj", q if x == "q" else kv) for x in "qkv"]),
            q_norm=self.tensor(norm.format("self_attn.q_norm")) if config.qk_norm else None,
            k_norm=self.tensor(norm.format("self_attn.k_norm")) if config.qk_norm else None,
            out=self.linear([(attention + "o_proj", None)], columns=q),
            post_norm=self.tensor(norm.format("post_attention_layernorm")),
            gate_up=self.linear([(mlp + "gate_proj", None), (mlp + "up_proj", None)]),
            down=self.linear([(mlp + "down_proj", None)]),
        )
        return loaded

    def linear(self, parts: list[tuple[str, Tensor | None]], columns: Tensor | None = None) -> QuantLinear:
        """One linear from the rows of several: (name, order of its rows) each, `columns` the order of columns."""
        shapes = [self.tensors[f"{name}.weight"].shape for name, _ in parts]
        num_rows = sum(rows for rows, _ in shapes)
        shape = (num_rows, shapes[0][1])
        bias = None
        if f"{parts[0][0]}.bias" in self.tensors:
            bias = torch.empty(num_rows, dtype=self.dtype, device=self.device)
        if self.quantize_int4 is not None:
            weight: Tensor | Int4Rows = Int4Rows.empty(*shape, self.quantize_int4)
            ask_for_huge_pages(weight.data.data_ptr(), weight.data.nbytes)
        elif is_quantized(self.weight_format):
            weight = self.room("linear", shape, self.dtype, self.device)
        else:
            weight = self.empty(shape, self.dtype)
        start = 0
        for (name, order), (rows, _) in zip(parts, shapes, strict=True):
            self.fill(weight[start : start + rows], f"{name}.weight", order, columns)
            if bias is not None:
                self.fill(bias[start : start + rows], f"{name}.bias", order)
            start += rows
        if isinstance(weight, Int4Rows):
            return QuantLinear.of_stored(weight.data, "int4", weight.scale, shape, self.dtype, bias)
        return QuantLinear(weight, self.weight_format, bias, self.dtype)

    def fill(
        self, target: Tensor | Int4Rows, name: str, order: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        """Set `target` [rows, ...] to the stored tensor: row i is stored row order[i], column j stored columns[j]."""
        stored = self.tensors[name]
        place = None if order is None else torch.argsort(order).to(self.device)
        change = None if self.adapter is None else self.adapter.change_of(name, self.device)
        straight = place is None and columns is None and change is None and self.device.type == "cpu"
        dtype = stored.torch_dtype
        if change is None and target.dtype.itemsize < dtype.itemsize:
            dtype = target.dtype
        for rows in _pieces(stored, _PIECE_BYTES if change is None else _ADAPTED_PIECE_BYTES):
            if straight and isinstance(target, Tensor):
                stored.read_into(target[rows], rows.start)
                continue
            if straight and isinstance(stored, GgufTensor):
                stored.read_runs(target.put_rows, rows.start, rows.stop)
                continue
            shape = (rows.stop - rows.start, *stored.shape[1:])
            piece = self.room("piece", shape, dtype, torch.device("cpu"))
            stored.read_into(piece, rows.start)
            if change is not None:
                piece = change.add_to(piece.to(self.device, torch.float32), rows)
            piece = piece.to(self.device, target.dtype)
            if columns is not None:
                piece = piece.index_select(1, columns.to(self.device))
            if place is None:
                target[rows] = piece
            else:
                target.index_copy_(0, place[rows], piece)

    def check_tied(self, embedding: Tensor) -> None:
        """A stored lm_head next to tied embeddings must equal them, or the checkpoint contradicts its config.json."""
        stored = self.tensors.get("lm_head.weight")
        if stored is None:
            return
        for rows in _pieces(stored, _PIECE_BYTES):
            piece = torch.empty((rows.stop - rows.start, *stored.shape[1:]), dtype=stored.torch_dtype)
            stored.read_into(piece, rows.start)
            if not torch.equal(piece.to(self.device, embedding.dtype), embedding[rows]):
                raise CheckpointError(
                    f"{stored.file}: tensor lm_head.weight differs from the embedding, though config.json ties them: "
                    f"set tie_word_embeddings to false"
                )


def _channels(order: Sequence[int], width: int) -> Tensor | None:
    """Order of rows (or columns) from an order of heads of `width` rows each: int64 [len(order) * width].

    None where nothing moves.
    """
    if list(order) == sorted(order):
        return None
    heads = torch.tensor(order, dtype=torch.int64)
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _pieces(stored: StoredTensor, piece_bytes: int) -> list[slice]:
    """Runs of rows of about `piece_bytes`."""
    rows = stored.shape[0]
    step = max(1, piece_bytes * rows // max(stored.num_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
