"""The decoder against transformers: every family, every RoPE type, in one piece, in odd chunks, token by token."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from allocation_peak import allocation_peak
from reference import ReferenceAttention, visible
from tiny_models import FAMILIES, ROPES, save_tiny, tiny_model
from torch import Tensor

from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.machine.processor import bf16_product_copy_bytes
from longrun.model.checkpoint import load_decoder
from longrun.model.decoder import Decoder
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.specs.model_bytes import activation_bytes, model_weight_bytes

PERMUTATION = [[2, 0, 1], [0, 1, 2], [1, 2, 0]]
SPLITS = {"one piece": [150], "odd chunks": [1, 37, 64, 5, 43], "token by token": [130] + [1] * 20}
LIMIT = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads only slow each other down on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def token_ids(count: int, vocab_size: int = 97) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(1))


def their_logits(model, ids: Tensor, lengths: list[int]) -> Tensor:
    model = copy.deepcopy(model)  # RoPE of type dynamic keeps state between calls
    cache, start, parts = None, 0, []
    with torch.inference_mode():
        for length in lengths:
            result = model(ids[None, start : start + length], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits[0])
            start += length
    return torch.cat(parts)


def our_logits(decoder: Decoder, table: RotaryTable, attention, ids: Tensor, lengths: list[int]) -> Tensor:
    start, parts = 0, []
    for length in lengths:
        step = Step(start, length, *table.cos_sin(start, length, start + length))
        hidden = decoder.forward(ids[start : start + length], step, attention, all_positions=True)
        parts.append(decoder.logits(hidden))
        start += length
    return torch.cat(parts)


def load(folder: Path, weight_format: str = "fp32") -> tuple[Decoder, RotaryTable]:
    config = ModelConfig.from_dir(folder)
    decoder = load_decoder(folder, config, PERMUTATION, weight_format, "cpu")
    return decoder, RotaryTable(RopeParameters.from_dir(folder), config.head_dim)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, rope):
    overrides = {"max_position_embeddings": 128} if rope == "llama3" else {}
    model = save_tiny(tmp_path, family, rope, **overrides)
    decoder, table = load(tmp_path)
    ids = token_ids(150)
    for name, lengths in SPLITS.items():
        got = our_logits(decoder, table, ReferenceAttention(3), ids, lengths)
        assert ratio(got, their_logits(model, ids, lengths)) <= LIMIT, name


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_the_comparison_sees_another_rope_type(tmp_path, rope):
    overrides = {"max_position_embeddings": 128} if rope == "llama3" else {}
    model = save_tiny(tmp_path, "llama", rope, **overrides)
    decoder, _ = load(tmp_path)
    plain = RotaryTable(RopeParameters(ROPES["default"], 64), 16)
    got = our_logits(decoder, plain, ReferenceAttention(3), token_ids(150), [150])
    assert ratio(got, their_logits(model, token_ids(150), [150])) > 100 * LIMIT


def test_dynamic_rope_depends_on_the_call_as_in_transformers(tmp_path):
    model = save_tiny(tmp_path, "llama", "dynamic")
    ids = token_ids(150)
    one, many = (their_logits(model, ids, SPLITS[name]) for name in ("one piece", "token by token"))
    assert ratio(one, many) > 100 * LIMIT


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 24, "num_key_value_heads": 6}),
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
    ],
)
def test_options_of_a_family(tmp_path, family, options):
    model = save_tiny(tmp_path, family, **options)
    config = ModelConfig.from_dir(tmp_path)
    order = list(reversed(range(config.num_kv_heads)))
    decoder = load_decoder(tmp_path, config, [order] * 3, "fp32", "cpu")
    table = RotaryTable(RopeParameters.from_dir(tmp_path), config.head_dim)
    got = our_logits(decoder, table, ReferenceAttention(3), token_ids(60), [23, 37])
    assert ratio(got, their_logits(model, token_ids(60), [60])) <= LIMIT


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_streaming_heads_equal_transformers_under_a_mask_per_head(tmp_path, family):
    """transformers' eager attention takes an additive mask per query head: an independent judge of the permutation."""
    model = save_tiny(tmp_path, family)
    model.set_attn_implementation("eager")
    num_retrieval, sink_size, recent_size, total = [1, 2, 0], 3, 11, 90
    ids = token_ids(total)
    masks = []
    for layer_idx, order in enumerate(PERMUTATION):
        retrieval = set(order[: num_retrieval[layer_idx]])
        heads = [visible(0, total, kv in retrieval, sink_size, recent_size) for kv in range(3) for _ in range(2)]
        masks.append(torch.zeros(1, 6, total, total).masked_fill(~torch.stack(heads), float("-inf")))
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    with torch.inference_mode():
        want = model(ids[None]).logits[0]
    decoder, table = load(tmp_path)
    got = our_logits(decoder, table, ReferenceAttention(3, num_retrieval, sink_size, recent_size), ids, [40, 1, 49])
    assert ratio(got, want) <= LIMIT
    full = our_logits(decoder, table, ReferenceAttention(3), ids, [total])
    assert ratio(full, want) > 100 * LIMIT


def test_last_position_and_token_slices_change_nothing(tmp_path):
    save_tiny(tmp_path, "qwen3")
    decoder, table = load(tmp_path)
    ids = token_ids(50)
    step = Step(0, 50, *table.cos_sin(0, 50, 50))
    every = decoder.forward(ids, step, ReferenceAttention(3), all_positions=True)
    last = decoder.forward(ids, step, ReferenceAttention(3))
    assert last.shape == (1, 96)
    assert ratio(last, every[-1:]) <= 1e-6
    for weight_format in ("fp32", "int8", "nf4", "int4"):
        decoder, _ = load(tmp_path, weight_format)
        whole = decoder.forward(ids, step, ReferenceAttention(3), all_positions=True)
        decoder.token_slice = 16
        sliced = decoder.forward(ids, step, ReferenceAttention(3), all_positions=True)
        assert ratio(sliced, whole) <= 1e-5, weight_format


def test_bf16_weights_stay_near(tmp_path):
    model = save_tiny(tmp_path, "qwen2")
    decoder, table = load(tmp_path, "bf16")
    assert decoder.compute_dtype == torch.bfloat16
    got = our_logits(decoder, table, ReferenceAttention(3), token_ids(60), [60])
    assert got.dtype == torch.float32
    theirs = their_logits(copy.deepcopy(model).bfloat16(), token_ids(60), [60])
    exact = their_logits(model, token_ids(60), [60])
    assert ratio(got, exact) <= 1.25 * ratio(theirs, exact) < 0.2


class _Copy:
    """Attention that costs its output and nothing else."""

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        return q.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("shape", "chunk_size", "weight_format"),
    [
        ({}, 3000, "fp32"),
        ({"intermediate_size": 3072}, 1024, "fp32"),
        ({}, 700, "bf16"),
        ({}, 2100, "bf16"),
        ({"num_key_value_heads": 8, "intermediate_size": 96}, 900, "bf16"),
        ({"hidden_size": 512, "intermediate_size": 2048}, 1500, "int8"),
        ({"hidden_size": 512, "intermediate_size": 2048}, 1500, "nf4"),
        ({"hidden_size": 512, "intermediate_size": 2048}, 1500, "int4"),
        ({"vocab_size": 60000}, 1, "fp32"),
    ],
)
def test_activation_bytes_are_the_measured_peak(tmp_path, shape, chunk_size, weight_format):
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    save_tiny(tmp_path, "llama", **{**sizes, "intermediate_size": 768, "num_hidden_layers": 2, **shape})
    config = ModelConfig.from_dir(tmp_path)
    decoder = load_decoder(tmp_path, config, [list(range(config.num_kv_heads))] * 2, weight_format, "cpu")
    table = RotaryTable(RopeParameters.from_dir(tmp_path), config.head_dim)
    ids = token_ids(chunk_size)

    def one_step() -> None:
        step = Step(0, chunk_size, *table.cos_sin(0, chunk_size, chunk_size))
        decoder.logits(decoder.forward(ids, step, _Copy()))

    one_step()
    peak = allocation_peak(one_step, tmp_path)
    itemsize = decoder.compute_dtype.itemsize
    copies = bf16_product_copy_bytes() if itemsize == 2 else 0
    promised = activation_bytes(config, chunk_size, itemsize, weight_format, product_copy=copies)
    assert 0.75 * promised <= peak <= 1.02 * promised


def test_weight_bytes_equal_the_arithmetic(tmp_path):
    save_tiny(tmp_path, "qwen3", attention_bias=True)
    decoder, _ = load(tmp_path)
    assert decoder.weight_bytes == model_weight_bytes(decoder.config, "fp32", "cpu")
    parameters = sum(parameter.nbytes for parameter in tiny_model("qwen3", attention_bias=True).parameters())
    assert decoder.weight_bytes == parameters
