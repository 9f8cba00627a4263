"""Sparse prefill's probe: values and masses against computations spelled out, a full choice against full attention."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from selection_case import DIM, Turns, random_model, random_text
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.errors import InputError
from longrun.lab.prefill_choice import LEVELLED, RULES, Choice, Limits, counts_at, ladder
from longrun.lab.prefill_mass import LEVELS, SHARES, MassTable
from longrun.lab.prefill_selectors import PERFECT, SELECTORS, TILE, page_values, tiles_of
from longrun.lab.prefill_sparse import Reading, SparsePrefill
from longrun.lab.selection import LayerKeys
from longrun.lab.selection_rules import PAGE
from scripts.quality import prefill_probe
from scripts.quality.prefill_probe import Setting, mass_of, measured, settings_of

PAGES, SCALE, LIMITS = 8, 0.25, Limits(newest=2, floor=3)


def random_case(steady: bool = False) -> tuple[Tensor, Tensor, LayerKeys]:
    """Two KV heads of two query heads, two tiles behind eight pages; their own log-sum-exps; keys.

    Args:
        steady: 32 queries and a page's keys are alike.
    """
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 2 * TILE, DIM, generator=draw), torch.randn(2, PAGES * PAGE, DIM, generator=draw)
    if steady:
        q, k = q[:, ::32].repeat_interleave(32, 1), k[:, ::PAGE].repeat_interleave(PAGE, 1)
    own_lse = 3 + torch.rand(2, 2, 2, 4, 1, generator=draw).expand(-1, -1, -1, -1, 32).flatten(3)
    turns = torch.ones(PAGES * PAGE, DIM), torch.zeros(PAGES * PAGE, DIM)
    return tiles_of(3 * q, 2), own_lse, LayerKeys(k, *turns)


def exact_mass(q: Tensor, own_lse: Tensor, keys: LayerKeys) -> Tensor:
    """[2, 2, 2, PAGES], a page's share of a tile's attention to all pages and its own chunk."""
    scores = torch.einsum("kgtqd,knd->kgtqn", q, keys.keys) * SCALE
    weights = torch.cat((scores, own_lse[..., None]), -1).softmax(-1)[..., :-1]
    return weights.unflatten(-1, (PAGES, PAGE)).sum(-1).mean(3)


def test_a_perfect_value_is_the_attention():
    case = random_case()
    past, whole = page_values(PERFECT, *case, PAGES, SCALE, 0.25)
    torch.testing.assert_close(whole.exp(), exact_mass(*case), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(past.exp().sum(-1), torch.ones(2, 2, 2))


@pytest.mark.parametrize(
    "selector", [name for name in SELECTORS if name not in ("bands", "bands 16", "digest, means 1")]
)
def test_selectors_are_exact_where_queries_and_keys_are_alike(selector):
    """Groups of like tokens are what their means say; half-ranges are 0, and 4 bits hold a page's keys nearly."""
    q, own_lse, keys = random_case(steady=True)
    if SELECTORS[selector].rows in ("mean", "halves", "outliers"):
        q, own_lse = (x[:, :, :, :1].expand_as(x).contiguous() for x in (q, own_lse))
    found = page_values(selector, q, own_lse, keys, PAGES, SCALE, 0.25)[1].exp()
    off = 0.06 if SELECTORS[selector].kind == "digest" else 1e-5
    torch.testing.assert_close(found, exact_mass(q, own_lse, keys), atol=off, rtol=1e-3)


def test_two_stages_are_the_second_among_the_first():
    case = random_case()
    coarse = page_values("digest", *case, PAGES, SCALE, 0.25)[1]
    fine, both = (page_values(name, *case, PAGES, SCALE, 0.25)[0] for name in ("means 1", "digest, means 1"))
    kept = both > -torch.inf
    assert kept.sum() == 20  # 30% of eight pages of eight tiles
    assert coarse[kept].min() >= coarse[~kept].max()
    assert (fine[kept] <= both[kept]).all()  # of a smaller whole
    q, own_lse, keys = case
    own_lse[0, 0] += 100  # so that no page of this head is worth a look
    past, whole = page_values("digest, means 1", q, own_lse, keys, PAGES, SCALE, 0.25)
    assert (past[0, 0] == -torch.inf).all() and (whole[0, 0] == -torch.inf).all() and not past.isnan().any()
    ranking = Choice("digest, means 1", 0.5, "relative").ranking(past, whole, LIMITS)
    for rule in LEVELLED:
        assert counts_at(ranking, rule, torch.tensor([0.01]), LIMITS)[0, 0].tolist() == [[3], [3]]


def test_bands_are_prisms():
    """Against the formula of Prism's code: q_b . k_b / (sqrt(d_b) t), t = sqrt(d_b / d) (q_b / q) (k_b / k), norms."""
    q, own_lse, keys = random_case()
    mean_q, mean_k = q.mean(3), keys.keys.unflatten(1, (PAGES, PAGE)).mean(2)

    def rms(x: Tensor) -> Tensor:
        return x.square().mean((-2, -1), keepdim=True).sqrt()

    each = []
    for own in ([0, 1, 2, 3, 8, 9, 10, 11], [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]):
        band_q, band_k = mean_q[..., own], mean_k[..., own]
        heat = (len(own) / DIM) ** 0.5 * (rms(band_q) / rms(mean_q)) * (rms(band_k) / rms(mean_k))[:, None]
        each.append((band_q @ band_k[:, None].mT / (len(own) ** 0.5 * heat)).log_softmax(-1))
    found, _ = page_values("bands", q, own_lse, keys, PAGES, DIM**-0.5, 0.25)
    torch.testing.assert_close(found, torch.maximum(*each))


def test_counts_by_hand():
    ranking = torch.tensor([[torch.inf, 0.5, 0.1, 0.05, 0.01, 0.2, torch.inf, torch.inf]]).log()
    levels = torch.tensor([0.6, 0.3, 0.09, 0.001])
    assert counts_at(ranking, "relative", levels, LIMITS).tolist() == [[4, 5, 7, 8]]
    assert counts_at(ranking, "absolute", levels, LIMITS).tolist() == [[3, 4, 6, 8]]
    levels = torch.tensor([0.9, 0.2, 0.06, 0.055, 0.0001])
    assert counts_at(ranking, "left", levels, LIMITS).tolist() == [[3, 5, 6, 7, 8]]  # of 0.86 in all
    assert ladder(LIMITS, 8) == [3, 4, 5, 6, 7, 8] and ladder(Limits(4, 40), 50) == [40, 45, 50]
    assert Choice("means", 0.2, "absolute", 0.3).counts(ranking, LIMITS).tolist() == [4]
    assert Choice("means", 0.1).counts(ranking, LIMITS).tolist() == [3]
    assert Choice("means", 0.5).counts(ranking, LIMITS).tolist() == [4]
    with pytest.raises(InputError, match="needs a level"):
        Choice("means", 0.2, "relative").counts(ranking, LIMITS)
    assert SELECTORS["means"].cost == 4 / 128 / 16 and SELECTORS["diagonals 8"].cost == 1 / 8


def attended(choice: Choice, **more) -> tuple[SparsePrefill, Tensor, Tensor]:
    """Sparse and full attention [T, 4, DIM] of a random layer, 1,100 tokens in chunks of 256, the last 76 in full."""
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1100, heads, DIM, generator=draw) for heads in (4, 2, 2))
    step = Step(0, 1100, *Turns().cos_sin(0, 1100, 1100))
    sparse = SparsePrefill(2, 1.0, 1.25, 1, 4, Reading(choice, LIMITS, 256, 1024, **more))
    whole = WholeTextAttention(2, 1.0, 0)
    return sparse, sparse.run(0, q.clone(), k.clone(), v, step), whole.run(0, q, k, v, step)


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_full_share_is_full_attention(selector):
    for delta in (False, True):
        sparse, found, expected = attended(Choice(selector, 1.0), delta=delta)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert sparse.read[0] == sparse.read[1] == 4 * 2 * (4 + 8 + 12) and sparse.rows == 3 * 4
        torch.testing.assert_close(sparse.caught / sparse.rows, torch.ones(1, 4), atol=1e-4, rtol=0)


def test_few_pages_are_the_attention_to_those():
    """Against a mask, made of the pages that the perfect choice takes; the first chunk and the end see everything."""
    sparse, found, expected = attended(Choice(PERFECT, 0.3))
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1100, heads, DIM, generator=draw).transpose(0, 1) for heads in (4, 2, 2))
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    scores = (q @ k.mT).masked_fill(torch.ones(1100, 1100, dtype=torch.bool).triu(1), -torch.inf)
    weights, kept = scores.softmax(-1), torch.zeros(4)
    for start in range(256, 1024, TILE):
        pages = start // 256 * 4
        mass = weights[:, start : start + TILE, : pages * PAGE].unflatten(-1, (pages, PAGE)).sum((1, 3))
        mass[:, [0, -1, -2]] = torch.inf
        chosen = mass.topk(max(3, round(0.3 * pages))).indices
        hidden = torch.ones(4, pages, dtype=torch.bool).scatter_(1, chosen, False).repeat_interleave(PAGE, 1)
        scores[:, start : start + TILE, : pages * PAGE].masked_fill_(hidden[:, None], -torch.inf)
        rows = weights[:, start : start + TILE : 64]
        kept += rows.sum((1, 2)) - rows[..., : pages * PAGE].masked_fill(~hidden[:, None], 0).sum((1, 2))
    torch.testing.assert_close(found, (scores.softmax(-1) @ v).transpose(0, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sparse.caught[0] / sparse.rows, kept / 12, atol=1e-5, rtol=0)
    assert (found[256:1024] - expected[256:1024]).abs().mean() > 0.01
    assert sparse.read[0] / sparse.read[1] == (3 + 3 + 4) / 24


def test_delta_is_exact_at_dense_rows_and_moves_the_others_alike():
    plain, expected = attended(Choice("means", 0.3))[1:]
    found = attended(Choice("means", 0.3), delta=True)[1]
    torch.testing.assert_close(found[256:1024:64], expected[256:1024:64], atol=1e-5, rtol=1e-4)
    moved = (found - plain)[256:1024].unflatten(0, (-1, 64))
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-5, rtol=1e-4)
    assert moved.abs().mean() > 0.01
    torch.testing.assert_close(attended(Choice("means", 0.3), dense_layers=frozenset({0}))[1], expected)
    sparse = attended(Choice("means", 0.3))[0]
    errors = (expected - plain)[256:1024].unflatten(0, (3, -1))[:, ::64]
    by_hand = torch.stack([(errors[:, :-1] * x).sum() for x in (errors[:, 1:], errors[:, :-1])])
    torch.testing.assert_close(sparse.alike[0], by_hand, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", [Choice("means 1", 0.3, "absolute", 0.03), Choice(PERFECT, 1.0)], ids=str)
def test_a_gpu_reads_as_the_cpu(choice):
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3000, heads, 128, generator=draw).bfloat16() for heads in (12, 2, 2))
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        turns = torch.ones(3000, 128, device=device), torch.zeros(3000, 128, device=device)
        reading = Reading(choice, LIMITS, 1024, 2944, delta=True)
        sparse = SparsePrefill(6, 128**-0.5, 1.0, 1, 12, reading)
        out = sparse.run(0, *(x.to(device, dtype) for x in (q, k, v)), Step(0, 3000, *turns))
        found.append((out.float().cpu(), sparse.caught / sparse.rows))
    error = (found[1][0] - found[0][0]).square().mean().sqrt() / found[0][0].square().mean().sqrt()
    assert error < 0.02
    torch.testing.assert_close(found[1][1], found[0][1], atol=0.01, rtol=0)


def test_mass_is_measured():
    model, text = random_model(), random_text()
    table = MassTable.empty(2, 4, torch.device("cpu"))
    measured(model, text, 3, 256, SELECTORS, LIMITS, table)
    assert table.tiles == 3 and len(table.by_tile) == 3
    past = table.past / 3
    assert (past > 0).all() and (past < 1).all()
    assert (table.held[..., 0] <= table.held[..., 1]).all() and (table.lost[..., 0] <= table.lost[..., 2]).all()
    for name in SELECTORS:
        for rule in ("share", "weighed"):
            caught, best = table.caught[name, rule], table.caught[PERFECT, "share"]
            assert (
                (caught >= 0).all() and (caught <= best + 1e-5).all() and (best <= table.past[..., None] + 1e-5).all()
            )
            assert (caught.diff(dim=-1) >= 0).all()
        for rule in LEVELLED:
            assert (table.levelled[name, rule].diff(dim=-1) >= -1e-5).all()
    assert table.caught["means", "share"][..., 3].sum() < table.caught[PERFECT, "share"][..., 3].sum() - 0.01
    found = mass_of(table)
    json.dumps(found)
    assert found["past"] == pytest.approx(past.mean().item())
    row = found["selectors"][PERFECT]["rules"]["absolute"]
    assert row["read"] == sorted(row["read"]) and max(row["caught_by_level"]) <= found["past"] + 1e-4


def test_levels_lie_between_those_measured():
    table = MassTable.empty(1, 1, torch.device("cpu"))
    table.tiles = 2
    table.levelled["means", "relative"] = 2 * torch.stack(
        (torch.linspace(0.1, 0.79, len(LEVELS)), torch.linspace(0.3, 0.99, len(LEVELS)))
    )
    assert table.level("means", "relative", 0.1) == pytest.approx(LEVELS[0])
    assert table.level("means", "relative", 0.13) == pytest.approx(LEVELS[1])
    assert LEVELS[2] < table.level("means", "relative", 0.145) < LEVELS[1]
    assert table.caught_at("means", "relative", 0.145) == pytest.approx(0.345)
    assert table.caught_at("means", "relative", 0.05) is None


def test_settings_are_read_and_run():
    model, text = random_model(), replace(random_text(), document_length=1220)
    limits = Limits(newest=1, floor=2)
    table = MassTable.empty(2, 4, torch.device("cpu"))
    measured(model, text, 2, 256, ["means"], limits, table)
    names = ["means 100%", "means 40%", "perfect 40%", "means 40% absolute", "means 40% delta"]
    rows = list(settings_of(model, [text], [Setting.of(name) for name in names], table, 256, limits, 60, 256))
    full, few, best, levelled, moved = rows
    assert full["kl_text"] < 1e-6 and full["same_text"] == full["read"] == 1
    assert full["caught"] == pytest.approx(1, abs=1e-5)
    assert full["kept"] == full["known"]
    assert min(best["kl_text"], few["kl_text"]) > 0.01 and best["caught"] != few["caught"] < 0.9
    assert levelled["level"] is not None and 0 < levelled["read"] < 1
    assert moved["caught"] != few["caught"] and moved["kl_text"] != few["kl_text"]
    assert Setting.of("means 25% ends").reading(text, 9, None, 256, limits, 256).dense_layers == {0, 1, 7, 8}
    assert Setting.of("means 25%").reading(text, 9, None, 256, limits, 256).dense_from == 896
    for all_read in ("means 25% first", "means 25% tail"):  # of two layers both; of 1,220 tokens all
        with pytest.raises(InputError, match="in full"):
            list(settings_of(model, [text], [Setting.of(all_read)], table, 256, limits, 60, 256))
    assert rows[0]["setting"] == "means 100%"
    late = list(settings_of(model, [text], [Setting.of("means 25%")], table, 256, limits, -1, 256))
    assert late == [{"setting": "means 25%", "left_out": True}]
    for bad in ("means", "8%", "best 8%", "means 0%", "means x%", "means 8% fast", "means 8% relative absolute"):
        with pytest.raises(InputError, match="is none"):
            Setting.of(bad)
    with pytest.raises(InputError, match="needs the mass"):
        Setting.of("sampled 8% relative").reading(text, 2, table, 256, limits, 256)
    assert set(RULES) >= {"share"} and len(SHARES) == 4


def test_the_probe_runs(planted, tmp_path):
    out = tmp_path / "out.json"
    assert prefill_probe.main([
        "--model", str(planted.path), "--lengths", "4500", "--json", str(out), "--texts", "1", "--chunk", "512",
        "--newest", "1", "--floor", "2", "--tiles", "2", "--selectors", "means;perfect",
        "--settings", "means 100%; perfect 10%; means 10% absolute delta",
    ]) == 0  # fmt: skip
    part = json.loads(out.read_text())["lengths"][0]
    assert set(part["mass"]) == {"code", "prose"} and part["mass"]["prose"]["tiles"] == 2
    rows = part["rows"]
    assert [row["setting"] for row in rows] == ["means 100%", "perfect 10%", "means 10% absolute delta"]
    assert rows[0]["kept"] == rows[0]["known"] >= 8 and rows[0]["kl_text"] == pytest.approx(0, abs=1e-4)
