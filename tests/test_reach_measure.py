"""Losses of heads by reach against the definition; the method "reach" of identify on the planted model."""

import dataclasses
import random

import pytest
import torch
from test_attention import DIM, GROUP, KV_HEADS, random_tokens, rms_ratio
from test_reach import REACHES, by_mask
from tiny_models import save_tiny, save_tokenizer

import longrun
from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.errors import HeadMapError, InputError
from longrun.patterns import reach_measure
from longrun.patterns.head_map import HeadMap
from longrun.patterns.identify import identify
from longrun.patterns.identify_settings import IdentifySettings
from longrun.patterns.reach import PART_SIZE, PARTS, finite_reaches, sampled_text
from longrun.patterns.reach_measure import layer_costs, measure_reaches
from longrun.units import ALL_TOKENS

SINK = 20


@pytest.mark.parametrize("n", [1, 15, 300])
def test_every_head_sees_its_reach(n):
    q, k, v = random_tokens(n)
    reaches = [[*row, *[50] * (KV_HEADS - len(row))] for row in REACHES]
    attention = WholeTextAttention(GROUP, DIM**-0.5, SINK, reaches)
    out = torch.stack([attention.run(i, q[i], k[i], v[i], Step(0, n, None, None)) for i in range(2)])
    assert rms_ratio(out, by_mask(q, k, v)) < 2e-6


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder, "llama")
    return longrun.load(folder, head_map="full", kv_format="fp32", weight_format="fp32", device="cpu", ctx=300)


@pytest.mark.parametrize("size", [1, 64, None])
def test_losses_are_what_the_output_projection_makes_of_the_difference(runtime, size, monkeypatch):
    decoder, length, rows, reaches = runtime.parts.decoder, 200, torch.tensor([3, 70, 150, 199]), (8, 32)
    if size is not None:
        monkeypatch.setitem(reach_measure.TILE_BYTES, "cpu", size * 8 * length)
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(3))
    losses = measure_reaches(decoder, runtime.parts.rotary, ids, rows, reaches, SINK)
    config, hidden, seen = decoder.config, {}, {}

    class Recording(WholeTextAttention):
        def run(self, layer_idx, q, k, v, step):
            seen[layer_idx] = [x.clone() for x in (q, k, v)]
            return super().run(layer_idx, q, k, v, step)

    group, scale = config.num_qo_heads // config.num_kv_heads, config.head_dim**-0.5
    step = Step(0, length, *runtime.parts.rotary.cos_sin(0, length, length))
    decoder.forward(ids, step, Recording(group, scale, SINK), on_layer=lambda i, x: hidden.update({i: x.clone()}))
    assert losses.shape == (config.num_layers, config.num_kv_heads, len(reaches), len(rows))
    for layer in range(config.num_layers):
        weight, whole = decoder.layers[layer].out.dense(), [[ALL_TOKENS] * config.num_kv_heads] * config.num_layers
        full = WholeTextAttention(group, scale, SINK, whole).run(layer, *seen[layer], step)
        for head in range(config.num_kv_heads):
            for i, reach in enumerate(reaches):
                cut = [list(row) for row in whole]
                cut[layer][head] = reach
                some = WholeTextAttention(group, scale, SINK, cut).run(layer, *seen[layer], step)
                difference = (full - some).flatten(1)[rows] @ weight.T
                expected = difference.square().sum(-1) / hidden[layer][rows].square().sum(-1)
                assert torch.allclose(losses[layer, head, i], expected, rtol=1e-3, atol=1e-9)
    assert (losses[..., 0, 0] == 0).all() and (losses[..., 1, :1] == 0).all()  # 3 tokens are all within
    assert (losses[:, :, 0, 2:] > 0).all()


def test_a_layers_cost_is_the_kl_of_cutting_all_its_heads(runtime):
    decoder, rotary, config = runtime.parts.decoder, runtime.parts.rotary, runtime.parts.decoder.config
    ids = torch.randint(0, 97, (120,), generator=torch.Generator().manual_seed(4))
    kinds = torch.arange(40, 100, 3), torch.tensor([101, 119])
    costs = list(layer_costs(decoder, rotary, ids, kinds, 8, 4))
    assert len(costs) == config.num_layers and min(map(min, costs)) > 0
    scores = [[float(layer + 1 < config.num_layers)] * config.num_kv_heads for layer in range(config.num_layers)]
    head_map = HeadMap.from_scores(scores)
    head_map = head_map.with_window(4, 8)  # the last layer streams
    rows = []
    for given in ("full", head_map):
        made = longrun.load(
            runtime.model_dir, head_map=given, kv_format="fp32", weight_format="fp32", device="cpu", ctx=300
        )
        rows.append(torch.log_softmax(made.engine(made.new_session()).run(ids, all_positions=True), dim=-1))
    kl = (rows[0].exp() * (rows[0] - rows[1])).sum(-1)
    assert costs[-1] == pytest.approx([kl[kind].mean().item() for kind in kinds], rel=1e-3)


def test_the_default_context_is_no_longer_than_the_model_reads(tmp_path):
    save_tiny(tmp_path / "model", "llama", max_position_embeddings=1600)
    save_tokenizer(tmp_path / "model")
    made = identify(IdentifySettings(str(tmp_path / "model"), str(tmp_path / "map"), "reach", device="cpu"))
    assert made.reach_losses.measured_length == 1600


def test_repeated_parts_stand_where_the_rows_say():
    ids = torch.arange(1000, 6000).tolist()
    text = sampled_text(ids, lambda text: [ord(c) for c in text], 3000, random.Random(0))
    assert len(text.ids) == 3000 and len(text.repeat_rows) == PARTS * PART_SIZE
    following = text.ids[text.repeat_rows + 1].view(PARTS, PART_SIZE)
    assert (following[:, 1:] == following[:, :-1] + 1).all() and following.min() >= 1000
    assert (following[:, 0].diff() > 0).all()
    assert text.text_rows.tolist() == sorted(set(text.text_rows.tolist()))
    assert (text.ids[text.text_rows + 1] == text.ids[text.text_rows] + 1).all()
    with pytest.raises(InputError, match="give at least"):
        sampled_text(ids, lambda text: [ord(c) for c in text], 900, random.Random(0))


def test_reaches_end_at_a_quarter_of_the_text():
    assert finite_reaches(256, 32768) == (256, 1024, 4096)
    assert finite_reaches(256, 65536) == (256, 1024, 4096, 16384)
    assert finite_reaches(256, 1024) == (256,)
    with pytest.raises(InputError, match="at least 1,200"):
        finite_reaches(300, 1199)


def test_identify_by_reach(planted, tmp_path):
    settings = IdentifySettings(
        str(planted.path), str(tmp_path / "map"), "reach", 4, 64, context=1100, steps=2, device="cpu"
    )
    steps = []
    made = identify(settings, steps.append)
    assert [step.step for step in steps] == [*range(1, 3), *range(4, 4 + planted.shape.num_layers)]
    assert {step.num_steps for step in steps} == {3 + planted.shape.num_layers}
    losses = made.reach_losses
    assert losses.reaches == (64, 256) and losses.measured_length == 1100 and losses.sink_size == 4
    flat = [(loss[0], layer, head) for layer, row in enumerate(losses.losses) for head, loss in enumerate(row)]
    assert max(flat)[1:] == planted.retrieval_head
    assert HeadMap.load(tmp_path / "map") == made
    assert identify(settings) == made  # the one that is there
    with pytest.raises(InputError, match="trained for"):
        identify(dataclasses.replace(settings, out=str(tmp_path / "b"), context=2**24))
    with pytest.raises(HeadMapError):
        identify(dataclasses.replace(settings, context=1090))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 300, 2500])
def test_every_head_sees_its_reach_on_the_gpu(n):
    from longrun.kernels.gpu_kernels import load_gpu_kernels

    q, k, v = (x.repeat(1, 1, 1, 2).bfloat16() for x in random_tokens(n))  # head_dim 64
    reaches = [[*row, *[50] * (KV_HEADS - len(row))] for row in REACHES]
    args = GROUP, DIM**-0.5 / 2, SINK, reaches
    expected = WholeTextAttention(*args)
    attention = WholeTextAttention(*args, load_gpu_kernels(64).window_attention)
    for layer in range(2):
        given = q[layer], k[layer], v[layer]
        step = Step(0, n, None, None)
        out = attention.run(layer, *(x.cuda() for x in given), step).float().cpu()
        assert rms_ratio(out, expected.run(layer, *(x.float() for x in given), step)) < 1e-2


@pytest.mark.gpu
def test_losses_on_the_gpu(tmp_path):
    save_tiny(tmp_path, "llama")
    ids = torch.randint(0, 97, (900,), generator=torch.Generator().manual_seed(3))
    found = []
    for device in ("cpu", "cuda"):
        runtime = longrun.load(
            tmp_path, head_map="full", kv_format="fp32", weight_format="bf16", device=device, ctx=300
        )
        decoder, rotary = runtime.parts.decoder, runtime.parts.rotary
        found.append(measure_reaches(decoder, rotary, ids, torch.arange(400, 900, 7), (32, 128), SINK).mean(-1))
    assert rms_ratio(*found) < 0.05
