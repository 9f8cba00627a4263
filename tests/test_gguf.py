"""Models in GGUF files: the same logits as the checkpoint they were made of, in every family, RoPE and tensor type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from reference import ReferenceAttention
from tiny_models import FAMILIES, ROPES, save_tiny, tiny_model

import longrun
from longrun.attention.interface import Step
from longrun.config.gguf_header import TENSOR_TYPES
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.kernels.cpu_gguf import CpuGguf
from longrun.kernels.cpu_int4 import CpuInt4
from longrun.model.adapter_merge import load_merged
from longrun.model.checkpoint import load_decoder
from longrun.model.checkpoint_tensors import find_tensors
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.paths import cache_dir
from longrun.plan.budget import Budget
from scripts.tiny_gguf import TYPE, UNWRITTEN, named_tensors, random_blocks, write_gguf

IDS = torch.arange(40) * 7 % 97
K_SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 97, "head_dim": 64, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
ROPES_OF_GGUF = {
    **{name: rope for name, rope in ROPES.items() if name not in ("dynamic", "yarn-mscale")},
    "yarn-factors": {**ROPES["yarn"], "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
}


def logits(path: Path, order: list[int] | None = None, weight_format: str = "fp32", **options: object) -> torch.Tensor:
    """Of `IDS`, float32 [40, vocab_size]."""
    config = ModelConfig.from_dir(path)
    permutation = [order or list(range(config.num_kv_heads))] * config.num_layers
    decoder = load_decoder(path, config, permutation, weight_format, "cpu", **options)
    table = RotaryTable(RopeParameters.from_dir(path), config.head_dim)
    step = Step(0, 40, *table.cos_sin(0, 40, 40))
    return decoder.logits(decoder.forward(IDS, step, ReferenceAttention(config.num_layers), all_positions=True))


def theirs(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


def close(ours: torch.Tensor, right: torch.Tensor, limit: float = 1e-5) -> bool:
    return ((ours - right).norm() / right.norm()).item() <= limit


@pytest.mark.parametrize("rope", ROPES_OF_GGUF)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_checkpoints(tmp_path, family, rope):
    model = tiny_model(family, rope_parameters=dict(ROPES_OF_GGUF[rope]))
    file = write_gguf(tmp_path / "model.gguf", model)
    right = theirs(model)
    assert close(logits(file), right)
    assert close(logits(file, [2, 0, 1]), right)
    assert close(logits(tmp_path), right)  # the folder of one file


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_q_and_k_are_where_the_checkpoint_has_them(tmp_path, family):
    """Undone for Llama and Mistral, and there alone: either mistake would show."""
    model = save_tiny(tmp_path / "original", family)
    file = write_gguf(tmp_path / "model.gguf", model)
    tensors = find_tensors(file, ModelConfig.from_dir(file))
    for name, value in model.state_dict().items():
        rows = torch.empty(value.shape)
        tensors[name].read_into(rows, 0)
        assert torch.equal(rows, value), name
        first = min(13, len(value) - 3)
        part = torch.empty(3, *value.shape[1:])
        tensors[name].read_into(part, first)
        assert torch.equal(part, value[first : first + 3]), name
        values = value.numpy().tobytes()
        assert tensors[name].read_bytes(30, 30) == values[30:60], name
        assert tensors[name].read_bytes(len(values) - 9, 9) == values[-9:], name


def test_biases_of_llama(tmp_path):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    file = write_gguf(tmp_path / "model.gguf", model)
    assert close(logits(file, [1, 2, 0]), theirs(model))


def test_another_alignment(tmp_path):
    model = tiny_model("qwen2")
    file = write_gguf(tmp_path / "model.gguf", model, change=lambda writer: writer.add_custom_alignment(256))
    assert close(logits(file), theirs(model))


def test_tied_embeddings(tmp_path):
    model = tiny_model("qwen2", tie_word_embeddings=True)
    file = write_gguf(tmp_path / "model.gguf", model)
    assert ModelConfig.from_dir(file).tie_word_embeddings
    assert close(logits(file), theirs(model))


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("order", [None, [1, 0]], ids=["in place", "moved"])
def test_many_pieces_on_threads_equal_one(tmp_path, monkeypatch, weight_format, order):
    """Compiled kernels do it in pieces, the `gguf` package and torch a whole linear."""
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama", **K_SHAPE), "Q4_K")
    want = logits(file, order, weight_format)
    monkeypatch.setattr("longrun.model.checkpoint._PIECE_BYTES", 100_000)
    monkeypatch.setattr("longrun.model.gguf_tensors._STEP_VALUES", 1)
    monkeypatch.setattr("longrun.model.gguf_tensors._COPY_VALUES", 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        folder = cache_dir() / "kernels"
        kernels = {"quantize_int4": CpuInt4(folder).quantize, "dequantize_gguf": CpuGguf(folder).by_type}
        found = logits(file, order, weight_format, **kernels)
    finally:
        torch.set_num_threads(threads)
    assert close(found, want, 1e-6)


def test_a_thread_that_fails_ends_the_load(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama", **K_SHAPE), "Q4_K")
    monkeypatch.setattr("longrun.model.gguf_tensors._STEP_VALUES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    config = ModelConfig.from_dir(file)
    tensors = find_tensors(file, config)
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 5000)
    last = max(tensors.values(), key=lambda stored: stored.entry.offset)
    with pytest.raises(CheckpointError, match="the file is truncated"):
        last.read_into(torch.empty(last.shape), 0)


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_every_tensor_type(tmp_path, kind):
    """Against the package's own dequantization, put into transformers' model."""
    model, kind = tiny_model("llama", **K_SHAPE), TYPE[kind]
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    config = ModelConfig.from_dir(file)
    right, state = {}, model.state_dict()
    for name, value in named_tensors(model).items():
        if value.ndim == 2 and kind != TYPE.F32:
            stored = random_blocks(value.shape, kind) if kind in UNWRITTEN else gguf.quantize(value, kind)
            right[name] = gguf.dequantize(stored, kind)
    if kind not in (*UNWRITTEN, TYPE.F32):
        assert not np.array_equal(right["output.weight"], state["lm_head.weight"].numpy())
    tensors = find_tensors(file, config)
    for name, stored in tensors.items():
        rows = torch.empty(stored.shape, dtype=stored.torch_dtype)
        stored.read_into(rows, 0)
        state[name] = rows.float()
    for name, key in (
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
    ):
        if kind != TYPE.F32:
            assert np.array_equal(state[name].numpy(), right[key])
    q = state["model.layers.2.self_attn.q_proj.weight"].view(4, 2, 32, 256).transpose(1, 2).reshape(256, 256)
    if kind != TYPE.F32:
        assert np.array_equal(q.numpy(), right["blk.2.attn_q.weight"])
    model.load_state_dict(state)
    assert close(logits(file), theirs(model))


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_weight_formats_are_those_of_the_converted_checkpoint(tmp_path, weight_format):
    file = write_gguf(tmp_path / "model.gguf", tiny_model("qwen3", **K_SHAPE), "Q4_K")
    load_merged(file, None, dtype=torch.float32).save_pretrained(tmp_path / "converted")
    assert torch.equal(logits(file, [1, 0], weight_format), logits(tmp_path / "converted", [1, 0], weight_format))


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q8_0"), ("llama", "F16"), ("qwen2", "Q4_K"), ("qwen3", "F32")])
def test_transformers_reads_the_same(tmp_path, family, kind):
    """Its reader has no RoPE scaling, and no Mistral."""
    file = write_gguf(tmp_path / "model.gguf", tiny_model(family, **K_SHAPE), kind)
    config = {"head_dim": 64} if family == "qwen3" else {}  # which its reader does not read
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **config
    )
    assert close(logits(file), theirs(model))


def test_merged_for_measuring(tmp_path):
    for rope in ("llama3", "yarn"):
        model = tiny_model("llama", rope)
        file = write_gguf(tmp_path / f"{rope}.gguf", model)
        assert close(theirs(load_merged(file, None, dtype=torch.float32)), theirs(model))


def test_fingerprint_is_of_the_values(tmp_path):
    """A file, and its conversion to a float32 checkpoint, are one model; another type of a tensor is another model."""
    file = write_gguf(tmp_path / "a.gguf", tiny_model("llama", **K_SHAPE), "Q4_0")
    load_merged(file, None, dtype=torch.float32).save_pretrained(tmp_path / "converted")
    assert model_fingerprint(file) == model_fingerprint(tmp_path / "converted")
    assert weights_fingerprint(file) == weights_fingerprint(tmp_path / "converted")
    others = [write_gguf(tmp_path / "b.gguf", tiny_model("llama", **K_SHAPE), "Q4_1")]
    others.append(write_gguf(tmp_path / "c.gguf", tiny_model("llama", seed=1, **K_SHAPE), "Q4_0"))
    plain, factors = tiny_model("llama"), tiny_model("llama")
    others.append(write_gguf(tmp_path / "d.gguf", plain))
    freqs = {"rope_freqs.weight": np.linspace(1, 2, 8)}
    others.append(write_gguf(tmp_path / "e.gguf", factors, tensors=lambda found: found.update(freqs)))
    assert weights_fingerprint(others[2]) == weights_fingerprint(others[3])
    assert len({model_fingerprint(path) for path in (file, *others)}) == 5


def test_a_run_and_its_session(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_model("qwen2"), tokenizer="gpt2")
    budget = Budget(device_bytes=2 * 10**9, kv_format="fp32", weight_format="fp32", chunk_size=64)
    runtime = longrun.load(file, budget, device="cpu", ctx=64)
    assert runtime.eos_token_ids == {2} and runtime.notices == []
    session = runtime.new_session()
    session.prefill(runtime.encode("the lighthouse"))
    session.save(tmp_path / "session")
    want = list(session.generate(8))
    again = longrun.load(file, budget, device="cpu", ctx=64, session=tmp_path / "session")
    assert list(again.load_session(tmp_path / "session").generate(8)) == want
