"""Choosing pages: indices and masses against hand-made cases, and the probes that measure them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from selection_case import DIM, PAGES, random_model, random_queries, random_text

from longrun.lab.quality.judged import Judged
from longrun.lab.selection import LayerKeys, LayerQueries, best
from longrun.lab.selection_rules import LAMBDAS, PAGE, TODAY, Index, Rule, known_rules, pages_of
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_codec import decode_pages, encode_pages
from longrun.quant.page_digest import decode_digest, encode_digest
from longrun.quant.rotation import key_rotation
from scripts.quality import digest_probe, selection_answers, selection_probe
from scripts.quality.selection_answers import Choice, Read
from scripts.quality.selection_probe import AT, BUDGETS, fitted_lambda, lost_mass, measure, steps_of, table_of
from scripts.quality.selection_steps import filter_layers, own_choice, pool_hits


def turned(x: torch.Tensor, keys: LayerKeys) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * keys._cos + torch.cat((-other, one), -1) * keys._sin


def test_masses_of_a_case_by_hand():
    """One query that scores ln 3 with one token of page 2, ln 2 with one of page 3 and 0 with all others."""
    keys, q = torch.zeros(1, 8 * PAGE, DIM), torch.zeros(1, 1, 1, DIM)
    q[..., 0] = 1
    keys[0, 2 * PAGE + 5, 0], keys[0, 3 * PAGE + 63, 0] = torch.tensor([3.0, 2.0]).log()
    turns = torch.ones(8 * PAGE, DIM), torch.zeros(8 * PAGE, DIM)
    some = LayerQueries(q, torch.tensor([7 * PAGE + 3]), LayerKeys(keys, *turns), 1.0, 2)
    whole = 7 * 64 + 4 + 2 + 1  # the query sees 452 tokens
    expected = torch.tensor([0, 64, 66, 65, 64, 0, 0, 0]) / whole
    torch.testing.assert_close(some.mass(PAGE)[0, 0], expected)
    found = lost_mass(some.ranking(Rule(None)), some.mass(PAGE), [1, 2, 4, 100])
    torch.testing.assert_close(found[0], torch.tensor([193, 128, 0, 0]) / whole)
    chosen = best(some.ranking(known_rules()[TODAY]), 2)
    assert chosen.nonzero()[:, 2].tolist() == [2, 3]
    units = best(some.ranking(Rule(None, unit=16)), 2)
    assert units.nonzero()[:, 2].tolist() == [2 * 4, 3 * 4 + 3]


def test_nothing_loses_less_than_the_perfect_choice():
    some, counts = random_queries(), [1, 2, 4, 8]
    for unit, ideal in ((PAGE, "perfect"), (16, "perfect, 16-token units")):
        mass = some.mass(unit)
        least = lost_mass(some.ranking(known_rules()[ideal]), mass, counts)
        for name, rule in known_rules().items():
            if rule.chosen_unit == unit:
                lost = lost_mass(some.ranking(rule), mass, counts)
                assert (lost >= least - 1e-5).all(), name
        assert (lost_mass(some.ranking(known_rules()["mean 16"]), some.mass(PAGE), counts)[:, 0] > least[:, 0]).any()


def test_indices_are_what_their_formulas_say():
    some = random_queries()
    keys, q = some._keys, some._q
    true = (q.flatten(1, 2) @ keys.keys.mT * 0.25).unflatten(1, (5, 2)).unflatten(-1, (-1, 16))
    rotated = Index(16, basis="rotated", unit=16)
    for index in (Index(16, unit=16), rotated):  # a mean gives the same, rotated or not
        torch.testing.assert_close(keys.scores(index, q, 0.25), true.mean(-1), atol=1e-4, rtol=1e-4)
    for basis in ("plain", "rotated"):
        bound = keys.scores(Index(16, 1, basis, middle=True, unit=16), q, 0.25)
        assert (bound >= true.amax(-1) - 1e-4).all()
    plain, other = (keys.scores(Index(16, 1, basis, middle=True), q, 1) for basis in ("plain", "rotated"))
    assert not torch.allclose(plain, other)
    # Keys that only RoPE tells apart: unturned, all are one, and every fourth token's score is exact.
    same = keys._in_basis("unturned")[:, :1].expand_as(keys.keys)
    one = LayerKeys(turned(same, keys), keys._cos, keys._sin)
    exact = (q.flatten(1, 2) @ one.keys.mT * 0.25).unflatten(1, (5, 2))[..., 2::4]
    for lam in (0, 1):
        found = one.scores(Index(16, lam, "unturned"), q, 0.25)
        torch.testing.assert_close(found, exact.unflatten(-1, (-1, 16)).logsumexp(-1), atol=1e-3, rtol=1e-3)


def test_fewer_bits_lose_more_of_an_index_and_bytes_are_counted():
    some = random_queries()
    whole = some._keys.scores(Index(16, 0.5), some._q, 0.25)
    errors = [(some._keys.scores(Index(16, 0.5, bits=n), some._q, 0.25) - whole).abs().mean() for n in (8, 4)]
    assert 0 < 5 * errors[0] < errors[1] < 0.3
    whole = some._keys.scores(Index(16, 0.5, "unturned"), some._q, 0.25)
    few = (some._keys.scores(Index(16, 0.5, "unturned", bits=4), some._q, 0.25) - whole).abs().mean()
    assert 0 < few < 0.3
    true = some.scores.unflatten(-1, (-1, PAGE)).logsumexp(-1)[..., : PAGES - 1]
    found = [some._keys.scores(Index(1, bits=n), some._q, 0.25)[..., : PAGES - 1] for n in (16, 4, 2, 1)]
    codes = [(one - true).abs().mean() for one in found]
    assert codes[0] < 1e-4 < codes[1] < codes[2] < codes[3] < 1
    sizes = {name: rule.index.token_bytes(128) for name, rule in known_rules().items() if rule.index}
    assert sizes[TODAY] == sizes["min/max 64"] == 8 and sizes["min/max 16 best"] == 32
    assert sizes["mean 64"] == 4 and sizes["mean 16"] == 16 and sizes["keys"] == 256
    assert sizes["mean 16 at 4 bits"] == (64 + 2) / 16 and sizes["middle 64 + 0.5 at 4 bits"] == (128 + 4) / 64
    assert sizes["1-bit keys"] == 16 + 8 and sizes["unturned 16 + 0.25"] == (128 + 64) * 2 / 16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_digests_are_those_of_pages(head_dim):
    keys = torch.randn(2, 4 * PAGE, head_dim, generator=torch.Generator().manual_seed(0)) + 3
    turns = torch.ones(4 * PAGE, head_dim)
    some, pages = LayerKeys(keys, turns, 0 * turns), (keys @ key_rotation(head_dim)[1]).unflatten(1, (-1, PAGE))
    stored = PageFormat("k5v3", PAGE, head_dim)
    stored = decode_pages(*encode_pages(pages, pages, stored), stored)[0]
    for bits in (4, 8):
        fmt, index = DigestFormat(PAGE, head_dim, centre_bits=bits), Index(16, 0.25, "digest", bits=bits)
        made = encode_digest(stored, fmt)
        for own, other in zip(some.vectors(index), decode_digest(made, fmt), strict=True):
            wrong = (own - other.flatten(1, 2)).abs() > 1e-4
            assert wrong.float().mean() < 2e-3  # a code at the border may round to its neighbour
        assert index.token_bytes(head_dim) == fmt.page_bytes / PAGE
    whole = some.scores(Index(16, basis="digest", half_bits=8), 0 * keys[:, None, :1] + 1, 1)
    errors = [
        (some.scores(Index(16, basis="digest", bits=bits, less=less), 0 * keys[:, None, :1] + 1, 1) - whole)
        .abs()
        .mean()
        for bits, less in ((4, ""), (4, "page"), (4, "first"))
    ]
    assert errors[0] > 2 * max(errors[1:]) > 0


def test_pools_and_filter_layers_by_hand():
    chosen = torch.zeros(1, 40, 10, dtype=torch.bool)
    chosen[0, torch.arange(40), torch.arange(40) % 3] = True  # one page a row: 0, 1, 2, 0, 1, 2, ...
    assert pool_hits(chosen, 1) == {1: 0, 2: 0, 4: 1, 8: 1}
    lost = torch.full((3, 2, 3, 2), 0.5)  # two heads a layer; head 1 of layer 1 serves layer 2 well
    lost[2, :, 1, 1] = 0.1
    for layer in range(3):
        for head in range(2):
            lost[layer, head, layer, head] = 0.05
    assert own_choice(lost) == pytest.approx(0.05)
    one, two, every = filter_layers(lost, 2 * lost)
    assert one["layers"] == [0] and one["lost_where_fitted"] == pytest.approx((2 * 0.05 + 4 * 0.5) / 6)
    assert two["layers"] == [0, 1] and two["lost"] == pytest.approx(2 * (4 * 0.05 + 2 * 0.1) / 6)
    assert every["layers"] == [0, 1, 2] and every["lost"] == pytest.approx(2 * 0.05)
    assert pages_of("64", 1000) == 64 and pages_of("1.5%", 1000) == 15 and pages_of("1.5%", 10) == 1


def test_all_pages_are_full_attention():
    model, text = random_model(), random_text()
    read = Read(model, text, 4)
    torch.testing.assert_close(read.known.log_probs, model.log_probs(read.text, None), atol=1e-4, rtol=1e-4)
    for name in ("perfect", TODAY, "mean 16 + 0.5 at 4 bits", "keys, 16-token units", "unturned 16 + 0.25"):
        found = read.log_probs(Choice(known_rules()[name], 20, False))[0]
        torch.testing.assert_close(found, read.known.log_probs, atol=1e-4, rtol=1e-4)
    count = len(read.text.text_rows)
    few, in_full = (read.log_probs(Choice(known_rules()[TODAY], 2, dense))[0] for dense in (False, True))
    assert not torch.allclose(few, read.known.log_probs, atol=0.1)
    torch.testing.assert_close(few[:count], in_full[:count])  # running text comes before the questions
    assert not torch.allclose(few[count:], in_full[count:], atol=0.1)
    judged = Judged()
    judged.add(read.known, read.known.log_probs.clone())
    row = judged.row(Counter(one=2))
    assert row["kl_text"] == 0 and row["same_answers"] == 1 and row["kept"] == sum(read.known.right)
    alone = Choice(known_rules()["perfect"], 2, False)
    by_rule = {name: Judged() for name in ("perfect", "mean 64")}
    for name, own in by_rule.items():
        own.add(read.known, read.log_probs(replace(alone, rule=known_rules()[name]))[0])
    losses = [sum(own.kl[0]) for own in by_rule.values()]
    assert 0 < losses[0] < losses[1]


def test_a_text_is_measured():
    found = measure(random_model(), random_text(), 4)
    table, names = table_of([found], DIM), list(BUDGETS)
    for kind, rows in table.items():
        least = rows["rules"]["perfect"]
        assert 0.1 < rows["could_be_chosen"] < 1 and least["lost"][names.index("32")] == pytest.approx(0, abs=1e-5), (
            kind
        )
        assert least["lost"][AT] > 0.05 and least["worst_head"][2] == least["worst_head"][3]
        whole, most = rows["rules"]["keys"]["lost"][AT], rows["rules"]["mean 64 at 4 bits"]["lost"][AT]
        assert least["lost"][AT] < whole < most
    assert fitted_lambda([found], "mean")["lambda"] in LAMBDAS
    steps = list(steps_of([found], 20, 2))
    assert len(steps) == 8 and all(step["filters"][-1]["lost"] >= 0 for step in steps)
    for step in steps:
        assert step["repeated_by_age"][0] == 1 and step["lost_by_age"][0] == pytest.approx(step["lost_by_own_choice"])
        assert step["lost_by_age"][0] < step["lost_by_age"][8] and step["pool_hits"][1] <= step["pool_hits"][8]


def test_probes_run(planted, tmp_path):
    out = tmp_path / "out.json"
    base = ["--model", str(planted.path), "--lengths", "4500", "--json", str(out)]
    assert selection_answers.main([
        *base, "--texts", "1", "--budgets", "8,2,1000",
        "--rules", "perfect;4% by mean 64 at 8 bits, then keys;perfect, mass 0.5",
        "--questions", "selected",
    ]) == 0  # fmt: skip
    rows = json.loads(out.read_text())["lengths"][0]["rows"]
    rows = {(row["rule"][:13], row["pages"]): row for row in rows}
    assert rows.keys() == {
        ("perfect", 8),
        ("perfect, mass", 8),
        ("perfect", 2),
        ("4% by mean 64", 2),
        ("perfect, mass", 2),
    }
    whole, few, coarse = rows["perfect", 8], rows["perfect", 2], rows["4% by mean 64", 2]
    assert whole["kept"] == whole["known"] >= 4 and whole["kl_text"] < few["kl_text"] < coarse["kl_text"]
    half = rows["perfect, mass", 8]
    assert 1 <= half["pages_chosen"] < whole["pages_chosen"] <= 8 and coarse["pages_chosen"] == 2
    assert few["share_read_questions"] < half["share_read"] < whole["share_read"] < 1
    assert selection_probe.main([*base, "--texts", "1"]) == 0
    found = json.loads(out.read_text())["lengths"][0]
    for table in found["mass"].values():
        least = table["rules"]["perfect"]["lost"]
        pages = [row["lost"] for name, row in table["rules"].items() if "units" not in name]
        assert all(row[0] >= least[0] - 1e-4 for row in pages) and least[:5] == sorted(least[:5], reverse=True)
    assert not found["steps"][0]["filters_judged_on_another_text"]
    assert digest_probe.main([*base, "--texts", "1", "--rows", "8"]) == 0
    found = json.loads(out.read_text())["lengths"][0]["mass"]
    for table in found.values():
        least = table["rules"]["perfect"]["lost"]
        assert all(row["lost"][0] >= least[0] - 1e-4 for row in table["rules"].values())
