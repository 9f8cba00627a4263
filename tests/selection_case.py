"""A small random model and text whose attention is peaked, for probes of what attention can do without."""

from __future__ import annotations

import torch

from longrun.config.model_config import ModelConfig
from longrun.lab.quality.answered import AnsweredText
from longrun.lab.selection import LayerKeys, LayerQueries
from longrun.lab.selection_rules import PAGE
from longrun.model.decoder import Decoder, DecoderLayer
from longrun.quant.linear import QuantLinear
from scripts.quality.reach_probe import Model

DIM = 16
PAGES = 12


class Turns:
    """RoPE of three speeds, with YaRN's factor on cos and sin."""

    scaling = 1.25

    def cos_sin(self, start: int, num_tokens: int, rope_seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        speeds = torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat_interleave(2).repeat(2)
        angles = torch.arange(start, start + num_tokens)[:, None] * speeds
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def random_model() -> Model:
    """Two layers, two KV heads of two query heads each, random weights that make attention peaked."""
    draw = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> QuantLinear:
        return QuantLinear(torch.randn(rows, columns, generator=draw) * 2.5 / columns**0.5, "fp32")

    config = ModelConfig("LlamaForCausalLM", "llama", 2, 64, 64, 4, 2, DIM, 50, 1e-5, 9999, True, *[False] * 4, None)
    ones, embedding = torch.ones(64), torch.randn(50, 64, generator=draw)
    layers = [
        DecoderLayer(ones, linear(128, 64), None, None, linear(64, 64), ones, linear(128, 64), linear(64, 64))
        for _ in range(2)
    ]
    model = Model.__new__(Model)
    model.decoder = Decoder(config, [(0, 1)] * 2, embedding, layers, ones, embedding)
    model.rotary, model.shape, model.group, model.scale, model.window = Turns(), (2, 2), 2, DIM**-0.5, None
    return model


def random_text() -> AnsweredText:
    """20 pages, the last of them with two questions and their answers."""
    ids = torch.randint(50, (1280,), generator=torch.Generator().manual_seed(1))
    answers = (("one", torch.arange(1230, 1235)), ("other", torch.arange(1260, 1270)))
    return AnsweredText(ids, torch.arange(700, 900, 10), answers, 1220)


def random_queries(newest: int = 2, seed: int = 0, first: int = (PAGES - 1) * PAGE) -> LayerQueries:
    """Five rows of 3 KV heads of 2 queries each, in the last page of twelve; keys turned by RoPE at two
    speeds."""
    draw = torch.Generator().manual_seed(seed)
    angles = torch.arange(PAGES * PAGE)[:, None] * torch.tensor([1.0, 0.01]).repeat_interleave(DIM // 4).repeat(2)
    keys = torch.randn(3, PAGES * PAGE, DIM, generator=draw) + 3 * torch.randn(3, 1, DIM, generator=draw)
    q = 2 * torch.randn(3, 5, 2, DIM, generator=draw)
    rows = torch.arange(first, first + 5)
    return LayerQueries(q, rows, LayerKeys(keys, angles.cos(), angles.sin()), 0.25, newest)
