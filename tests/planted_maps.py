"""Head maps of a planted model that leave out the head that retrieves."""

from __future__ import annotations

from longrun.lab.planted import PlantedModel
from longrun.patterns.baseline_maps import random_map


def maps_that_miss(planted: PlantedModel) -> list[int]:
    """Seeds of random maps that do not keep the one head that retrieves."""
    layer, head = planted.retrieval_head
    shape = planted.shape.num_layers, planted.shape.num_kv_heads
    return [
        seed for seed in range(30) if not random_map(*shape, seed).split(retrieval_ratio=0.25).retrieval[layer][head]
    ]  # fmt: skip
