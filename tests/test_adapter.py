"""Adapters: the merged weights and logits of transformers and peft, what is refused, what a fingerprint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from reference import ReferenceAttention
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

import longrun
from longrun.attention.interface import Step
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model.adapter import Adapter
from longrun.model.checkpoint import load_decoder
from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.model.rope import RopeParameters, RotaryTable
from longrun.quant.linear import QuantLinear

ORDER = [[2, 0, 1], [0, 1, 2], [1, 2, 0]]
RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
IDS = torch.arange(20) % 97
SHORT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Path, targets=SHORT, dtype=torch.float32, own=None, **settings) -> Path:
    """A random adapter of every `targets` linear, written by hand in peft's format."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for spec in ModelConfig.from_dir(model).weights():
        name = spec.name.removesuffix(".weight")
        if spec.kind == "linear" and name.rpartition(".")[2] in targets:
            a, b = (torch.randn(s, generator=generator) for s in ((RANK, spec.shape[1]), (spec.shape[0], RANK)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = (0.1 * a).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (0.1 * b).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none",
        "lora_dropout": 0.0, "inference_mode": True, "use_rslora": False, "modules_to_save": None, **settings,
    }  # fmt: skip
    if own is not None:
        config["longrun"] = own
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_weights(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with the adapter added, by a plain float64 product."""
    tensors, lora = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        key = f"base_model.model.{name.removesuffix('weight')}lora_{{}}.weight"
        if key.format("A") in lora:
            change = SCALE * lora[key.format("B")].double() @ lora[key.format("A")].double()
            tensors[name] = (tensors[name].double() + change).float()
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, "llama")
    return folder


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", model)


def load(model: Path, adapter: Path | None, weight_format="fp32", order=ORDER):
    config = ModelConfig.from_dir(model)
    lora = None if adapter is None else Adapter.open(adapter, config)
    return load_decoder(model, config, order, weight_format, "cpu", adapter=lora)


def logits(model: Path, adapter: Path | None) -> torch.Tensor:
    config, decoder = ModelConfig.from_dir(model), load(model, adapter)
    rope = RopeParameters.from_dir(model)
    if adapter is not None:
        rope = Adapter.open(adapter, config).adapted_rope(rope)
    table = RotaryTable(rope, config.head_dim)
    step = Step(0, len(IDS), *table.cos_sin(0, len(IDS), len(IDS)))
    return decoder.logits(decoder.forward(IDS, step, ReferenceAttention(3), all_positions=True))


def of_transformers(model: Path, adapter: Path, **config) -> torch.Tensor:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **config)
    missing, extra = theirs.load_state_dict(merged_weights(model, adapter), strict=False)
    assert not extra and all("inv_freq" in name for name in missing)
    with torch.inference_mode():
        return theirs(IDS[None]).logits[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [SHORT, ("q_proj", "o_proj", "down_proj")])
def test_logits_equal_transformers_with_merged_weights(tmp_path, family, targets):
    save_tiny(tmp_path / "model", family)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model", targets)
    got, want = logits(tmp_path / "model", adapter), of_transformers(tmp_path / "model", adapter)
    assert (got - want).abs().max() < 1e-4
    assert (got - logits(tmp_path / "model", None)).abs().max() > 0.1


def test_logits_equal_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base = save_tiny(tmp_path / "model", "llama")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        want = theirs(IDS[None]).logits[0]
    assert (logits(tmp_path / "model", tmp_path / "adapter") - want).abs().max() < 1e-4


def test_an_adapter_of_ours_loads_in_peft(model, adapter):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        assert (logits(model, adapter) - theirs(IDS[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "nf4", "int4"])
def test_every_format_holds_the_merged_weight(model, adapter, weight_format, tmp_path):
    """The same as a checkpoint of merged weights, quantized: permuted rows and columns, fused linears."""
    merged = Path(shutil.copytree(model, tmp_path / "merged"))
    save_file(merged_weights(model, adapter), merged / "model.safetensors", metadata={"format": "pt"})
    got, want = load(model, adapter, weight_format), load(merged, None, weight_format)
    assert got.weight_bytes == want.weight_bytes
    for mine, other in zip(got._layers, want._layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            a, b = getattr(mine, name), getattr(other, name)
            assert isinstance(a, QuantLinear) and a.weight_format == weight_format
            # Sums in another order differ by a rounding, which may move a few quantized values by one step.
            apart = (a.dense().float() - b.dense().float()).abs()
            step = {"fp32": 1e-6, "bf16": 2**-7, "int8": 0.02, "nf4": 0.2, "int4": 0.2}[weight_format]
            assert apart.max() <= step
            assert (apart > 1e-6).float().mean() < 0.005
    if weight_format == "fp32":
        assert (got._layers[0].qkv.dense() - load(model, None)._layers[0].qkv.dense()).abs().max() > 0.01


def test_pieces_and_half_precision_files(model, tmp_path, monkeypatch):
    """A bf16 checkpoint is added to in float32 and rounded once; small pieces give the same."""
    half = Path(shutil.copytree(model, tmp_path / "half"))
    tensors = {name: t.bfloat16() for name, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", half, dtype=torch.bfloat16)
    want = merged_weights(half, adapter)["model.layers.1.mlp.down_proj.weight"]
    monkeypatch.setattr("longrun.model.checkpoint._ADAPTED_PIECE_BYTES", 1000)
    assert (load(half, adapter)._layers[1].down.dense() - want).abs().max() < 1e-6
    assert torch.equal(load(half, adapter, "bf16")._layers[1].down.dense(), want.bfloat16())


def test_overrides_reach_rope_and_window(model, tmp_path):
    adapter = write_adapter(
        tmp_path / "a", model, own={"rope_theta": 9000.0, "max_position_embeddings": 4096, "notes": "x"}
    )
    rope = {"rope_type": "default", "rope_theta": 9000.0}
    assert (logits(model, adapter) - of_transformers(model, adapter, rope_parameters=rope)).abs().max() < 1e-4
    runtime = longrun.load(model, adapter=adapter, device="cpu")
    assert runtime.config.max_position_embeddings == 4096
    session = runtime.new_session(64)
    session.prefill(IDS.tolist())
    want = of_transformers(model, adapter, rope_parameters=rope).argmax(dim=-1)[-1]
    assert next(iter(session.generate(max_new_tokens=1))) == want


def test_sessions_and_fingerprints_know_the_adapter(model, adapter, tmp_path):
    config = ModelConfig.from_dir(model)
    other = write_adapter(tmp_path / "other", model, own={"rope_theta": 9000.0})
    prints = {model_fingerprint(model)} | {model_fingerprint(model, Adapter.open(a, config)) for a in (adapter, other)}
    assert len(prints) == 3
    runtime = longrun.load(model, adapter=adapter, device="cpu", ctx=64)
    session = runtime.new_session(64)
    session.prefill(IDS.tolist())
    session.save(tmp_path / "session")
    assert runtime.load_session(tmp_path / "session").seq_len == 20
    with pytest.raises(longrun.LongrunError, match="saved with model"):
        longrun.load(model, device="cpu", ctx=64).load_session(tmp_path / "session")


def test_the_base_is_checked(model, tmp_path):
    right = write_adapter(tmp_path / "right", model, own={"base_weights": weights_fingerprint(model)})
    load(model, right)
    wrong = write_adapter(tmp_path / "wrong", model, own={"base_weights": "0" * 64})
    with pytest.raises(CheckpointError, match="made for another checkpoint"):
        load(model, wrong)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"peft_type": "LOHA"}, ("LOHA", "only LORA")),
        ({"r": 0}, ("r is 0",)),
        ({"r": 512}, ("r 512", "256")),
        ({"lora_alpha": "8"}, ("lora_alpha is '8'",)),
        ({"target_modules": ["q_proj", "lm_head"]}, ("target_modules", "lm_head")),
        ({"target_modules": ".*"}, ("target_modules",)),
        ({"use_rslora": True}, ("rsLoRA",)),
        ({"use_dora": True}, ("DoRA",)),
        ({"bias": "all"}, ("bias", "'all'")),
        ({"lora_bias": True}, ("lora_bias",)),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save",)),
        ({"rank_pattern": {"q_proj": 2}}, ("rank_pattern",)),
        ({"init_lora_weights": "pissa"}, ("pissa", "base weights")),
        ({"made_up": 3}, ("made_up", "not known")),
        ({"longrun": {"rope_theta": -1}}, ("rope_theta is -1",)),
        ({"longrun": {"rope": 1}}, ("unknown key rope",)),
    ],
)
def test_refused_settings(model, adapter, changes, parts):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(model, adapter, *parts)


def test_refused_tensors(model, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    original = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def rewrite(**changes) -> None:
        tensors = {**original, **changes}
        save_file({key: value for key, value in tensors.items() if value is not None}, file)

    rewrite(**{name: None})
    refused(model, adapter, "lacks tensor", name)
    rewrite(**{name: original[name][:, :3].clone()})
    refused(model, adapter, name, "[136, 3]", "[136, 4]")
    rewrite(**{name: original[name].to(torch.int8)})
    refused(model, adapter, name, "I8")
    rewrite(**{"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 96)})
    refused(model, adapter, "holds tensor base_model.model.lm_head.lora_A.weight")
    file.write_bytes(file.read_bytes()[:-10])
    refused(model, adapter, "truncated")
    refused(model, tmp_path, "holds no adapter_config.json")


def refused(model: Path, adapter: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Adapter.open(adapter, ModelConfig.from_dir(model))
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
