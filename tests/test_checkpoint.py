"""Loading a checkpoint: what is accepted, what is refused with which message, what it costs in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import ReferenceAttention
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save_tiny

from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model.checkpoint import load_decoder
from longrun.model.fingerprint import model_fingerprint
from longrun.model.rope import RopeParameters, RotaryTable
from scripts.tiny_gguf import write_gguf

IDENTITY = [[0, 1, 2]] * 3
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "llama")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path, permutation=IDENTITY):
    return load_decoder(folder, ModelConfig.from_dir(folder), permutation, "fp32", "cpu")


def logits(folder: Path, permutation=IDENTITY) -> torch.Tensor:
    decoder = load(folder, permutation)
    table = RotaryTable(RopeParameters.from_dir(folder), decoder.config.head_dim)
    ids = torch.arange(20) % 97
    step = Step(0, 20, *table.cos_sin(0, 20, 20))
    return decoder.logits(decoder.forward(ids, step, ReferenceAttention(3), all_positions=True))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of model.safetensors by `change(dict)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_shards_load_like_one_file(saved, tmp_path):
    model = save_tiny(tmp_path / "again", "llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "shards"), logits(saved))
    assert model_fingerprint(tmp_path / "shards") == model_fingerprint(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(folder, dtype):
    original = load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    embedding = load(folder)._embedding
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, original["model.embed_tokens.weight"].to(dtype).float())


def test_permutation_moves_rows_and_columns(folder):
    order = [2, 0, 1]
    original = load_file(folder / "model.safetensors")
    layer = load(folder, [order] * 3)._layers[0]
    q = original[Q0].view(3, 2, 16, 96)[order].reshape(96, 96)
    k = original[Q0.replace("q_proj", "k_proj")].view(3, 16, 96)[order].reshape(48, 96)
    v = original[Q0.replace("q_proj", "v_proj")].view(3, 16, 96)[order].reshape(48, 96)
    assert torch.equal(layer.qkv.dense(), torch.cat((q, k, v)))
    o = original[Q0.replace("q_proj", "o_proj")].view(96, 3, 32)[:, order].reshape(96, 96)
    assert torch.equal(layer.out.dense(), o)
    assert (logits(folder, [order] * 3) - logits(folder)).abs().max() < 1e-4


def test_many_pieces_equal_one(folder, monkeypatch):
    want = logits(folder, [[1, 2, 0]] * 3)
    monkeypatch.setattr("longrun.model.checkpoint._PIECE_BYTES", 1000)
    assert torch.equal(logits(folder, [[1, 2, 0]] * 3), want)


def test_allowed_extras(folder, tmp_path):
    want = logits(folder)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(folder), want)

    tied = tmp_path / "tied"
    save_tiny(tied, "llama", tie_word_embeddings=True)
    want = logits(tied)
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(tied), want)
    rewrite(tied, lambda t: t["lm_head.weight"][50].add_(1))
    refused(tied, "lm_head.weight differs from the embedding", "tie_word_embeddings")


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(Q0))
    refused(folder, "lacks tensor", Q0)


def test_missing_tensors_are_counted(folder):
    edit_config(folder, num_hidden_layers=4)
    refused(folder, "model.layers.3.self_attn.q_proj.weight and 8 more")


def test_extra_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}))
    refused(folder, "model.safetensors holds tensor model.layers.0.self_attn.q_proj.bias", "LlamaForCausalLM")


def test_misshapen_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({Q0: tensors[Q0][:90].clone()}))
    refused(folder, Q0, "[90, 96]", "[96, 96]")


def test_integer_weights(folder):
    rewrite(folder, lambda tensors: tensors.update({Q0: tensors[Q0].to(torch.int8)}))
    refused(folder, Q0, "I8", "F32, F16, BF16")


@pytest.mark.parametrize("size", [0, 5, 100, -1, -100_000])
def test_truncated_file(folder, size):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    refused(folder, str(file), "truncated")


def test_file_that_shrinks_after_the_check(folder, monkeypatch):
    from longrun.model import checkpoint

    original = checkpoint.find_tensors

    def shrink(*args):
        tensors = original(*args)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100_000])
        return tensors

    monkeypatch.setattr(checkpoint, "find_tensors", shrink)
    refused(folder, "ends inside tensor", "truncated")


def damaged_headers():
    def edit(change):
        def apply(data: bytes) -> bytes:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            change(header)
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + data[8 + length :]

        return apply

    return {
        "longer": lambda data: data + b"x",
        "header length": lambda data: b"\xff" * 8 + data[8:],
        "no JSON": lambda data: data[:8] + b"}" + data[9:],
        "no text": lambda data: data[:8] + b"\xff" + data[9:],
        "no object": lambda data: (2).to_bytes(8, "little") + b"[]",
        "dtype": edit(lambda header: header[Q0].update(dtype="X9")),
        "shape": edit(lambda header: header[Q0].update(shape=[96, 97])),
        "offsets": edit(lambda header: header[Q0].update(data_offsets=[4, 36868])),
        "entry": edit(lambda header: header.update({Q0: 3})),
        "negative": edit(lambda header: header[Q0].update(data_offsets=[-36864, 0])),
    }


@pytest.mark.parametrize("damage", damaged_headers())
def test_damaged_header(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damaged_headers()[damage](file.read_bytes()))
    refused(folder, str(file))


def test_folders_without_weights(folder, tmp_path):
    file = folder / "model.safetensors"
    file.rename(tmp_path / "aside")
    refused(folder, "holds no model.safetensors and no model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "only pytorch_model.bin", "only safetensors checkpoints")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_decoder(tmp_path / "none", ModelConfig.from_dir(folder), IDENTITY, "fp32", "cpu")


def test_index_errors(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    for content in (
        "{",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"x": "../a.safetensors"}}',
        '{"weight_map": [1]}',
    ):
        index.write_text(content)
        refused(folder, str(index), "cannot be used")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    refused(folder, "b.safetensors", "missing")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, "both hold tensor")


def test_fingerprint_tells_models_apart(folder, saved):
    same = model_fingerprint(saved)
    assert model_fingerprint(folder) == same
    assert len(same) == 64

    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1e-6))
    changed = model_fingerprint(folder)
    edit_config(folder, rms_norm_eps=2e-5)
    other_eps = model_fingerprint(folder)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 501.0})
    assert len({same, changed, other_eps, model_fingerprint(folder)}) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "weight_format"), [("safetensors", "fp32"), ("gguf", "fp32"), ("gguf", "int4")])
def test_loading_costs_the_weights_and_one_piece(tmp_path, kind, weight_format):
    """int4 by the compiled kernel: no linear ever stands in float32."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000, "num_hidden_layers": 6, "head_dim": 64}
    model = save_tiny(tmp_path / "model", "llama", **{**shape, "num_attention_heads": 8, "num_key_value_heads": 4})
    path = tmp_path / "model" if kind == "safetensors" else write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert total > 120e6
    code = (
        "import sys\n"
        "from longrun.config.model_config import ModelConfig\n"
        "from longrun.model.checkpoint import load_decoder\n"
        "def status(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))\n"
        "import torch\n"
        "from longrun.kernels.cpu_int4 import CpuInt4\n"
        "from longrun.paths import cache_dir\n"
        "torch.set_num_threads(4)\n"
        "config = ModelConfig.from_dir(sys.argv[1])\n"
        "quantize = CpuInt4(cache_dir() / 'kernels').quantize\n"
        "before = status('VmRSS')\n"
        "order = [[3, 1, 0, 2]] * 6\n"
        "decoder = load_decoder(sys.argv[1], config, order, sys.argv[2], 'cpu', quantize_int4=quantize)\n"
        "print(status('VmHWM') - before, decoder.weight_bytes)\n"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), weight_format], capture_output=True, text=True, check=True, cwd=root
    )
    growth, weights = map(int, result.stdout.split())
    print(f"{kind} {weight_format}: weights {weights / 1e6:.0f} MB, growth {growth / 1e6:.0f} MB")
    assert weights == total if weight_format == "fp32" else weights < total / 4
    assert weights * 0.9 < growth < weights + 60e6
