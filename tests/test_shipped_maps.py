"""The head maps that ship: made for what ships, and as alike as patterns/maps/README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import longrun
from longrun.config.model_config import ModelConfig
from longrun.model.adapter import Adapter
from longrun.patterns.compare_maps import compare_maps
from longrun.patterns.head_map import HeadMap

PACKAGE = Path(longrun.__file__).resolve().parent
MAPS = PACKAGE / "patterns" / "maps"
LONG = MAPS / "smollm2-135m-instruct-long"
PAIRS = (
    ("gates", "gates-seed1"),
    ("reconstruction-ctx4k-seed1", "reconstruction-ctx4k-seed2"),
    ("reconstruction-ctx4k", "reconstruction"),
    ("gates", "reconstruction"),
)
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip
FOLDERS = sorted(file.parent for file in MAPS.glob("*/*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_map_is_of_the_demo_models_shape_and_says_where_it_comes_from(folder: Path) -> None:
    head_map = HeadMap.load(folder)
    assert (head_map.num_layers, head_map.num_kv_heads) == (30, 3)
    assert head_map.origin is not None and head_map.origin.model_fingerprint


def test_maps_of_the_adapted_model_were_made_with_the_adapter_that_ships() -> None:
    adapter = Adapter.open(
        PACKAGE / "model" / "adapters" / LONG.name, ModelConfig.from_dict(SMOLLM2_135M, "SmolLM2-135M")
    )
    made_with = {f.name: HeadMap.load(f).origin.adapter_sha256 for f in FOLDERS if f.parent == LONG}
    assert made_with and made_with == dict.fromkeys(made_with, adapter.digest())


def test_the_readme_has_the_overlaps_of_these_maps() -> None:
    table = [line for line in (MAPS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    ratios = (0.1, 0.25, 0.5, 0.75)
    found = [compare_maps(HeadMap.load(LONG / a), HeadMap.load(LONG / b), ratios) for a, b in PAIRS]
    for index, ratio in enumerate(ratios):
        overlaps = [overlaps[index] for _, overlaps in found]
        first = overlaps[0]
        cells = [f"{ratio:.0%}", first.num_retrieval, f"{first.chance:.1f}", *(one.shared for one in overlaps)]
        assert "| " + " | ".join(map(str, cells)) + " |" in table
    correlations = " | ".join(f"{rho:.3f}" for rho, _ in found)
    assert any(re.fullmatch(rf"\| rank correlation [| ]*{re.escape(correlations)} \|", line) for line in table)
