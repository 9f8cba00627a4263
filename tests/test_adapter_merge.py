"""Checkpoint and adapter merged in transformers: the logits of `longrun.load(adapter=)`, rounded once, base checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_adapter import SHORT, write_adapter
from tiny_models import save_tiny

import longrun
from longrun.config.model_config import ModelConfig
from longrun.errors import CheckpointError
from longrun.model.adapter import Adapter
from longrun.model.adapter_merge import load_merged

IDS = torch.arange(40) * 7 % 97


def open_adapter(model: Path, folder: Path) -> Adapter:
    return Adapter.open(folder, ModelConfig.from_dir(model))


@pytest.mark.parametrize(
    ("family", "rope", "own"),
    [
        ("llama", "default", {"rope_theta": 9000.0, "max_position_embeddings": 4096}),
        ("qwen2", "default", None),
        ("llama", "dynamic", {"max_position_embeddings": 24}),
    ],
)
def test_the_logits_are_those_of_our_runtime(family: str, rope: str, own: dict | None, tmp_path: Path) -> None:
    """40 tokens; with positions of 24, dynamic RoPE is past them, and within the checkpoint's own 64."""
    model = tmp_path / "model"
    save_tiny(model, family, rope)
    folder = write_adapter(tmp_path / "adapter", model, own=own)
    theirs = load_merged(model, open_adapter(model, folder), dtype=torch.float32)
    with torch.no_grad():
        want = theirs(IDS[None]).logits[0]
        base = load_merged(model, None, dtype=torch.float32)(IDS[None]).logits[0]
    runtime = longrun.load(
        model, adapter=folder, device="cpu", kv_format="fp32", weight_format="fp32", ctx=128, chunk_size=64
    )
    session = runtime.new_session()
    if rope == "dynamic":  # its frequencies are those of the whole text, which a step must hold
        got, want, base = session.prefill(IDS.tolist()).reshape(1, -1), want[-1:], base[-1:]
    else:
        session.prefill(IDS[:1].tolist())
        got, want, base = session.score(IDS[1:].tolist()), want[:-1], base[:-1]
    torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=1e-4)
    assert (want - base).abs().max() > 0.1
    if own is not None:
        assert theirs.config.max_position_embeddings == own["max_position_embeddings"]


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny(model, "llama")
    adapter = open_adapter(model, write_adapter(tmp_path / "adapter", model, targets=SHORT[:4]))
    exact, base, half = (
        load_merged(model, one, dtype=dtype).state_dict()
        for one, dtype in ((adapter, torch.float32), (None, torch.float32), (adapter, torch.bfloat16))
    )
    for name, weight in half.items():
        assert torch.equal(weight, exact[name].bfloat16()), name
        changed = any(part in name for part in SHORT[:4])
        assert changed != torch.equal(exact[name], base[name]), name


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    folder = write_adapter(tmp_path / "adapter", tmp_path / "model", own={"base_weights": "0" * 64})
    with pytest.raises(CheckpointError, match="made for another checkpoint"):
        load_merged(tmp_path / "model", open_adapter(tmp_path / "model", folder))
