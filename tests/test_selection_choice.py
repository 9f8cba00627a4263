"""Ways to choose among ranked pages, against slow references; what is read is counted; and their names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from selection_case import PAGES, random_model, random_queries, random_text
from torch import Tensor

from longrun.errors import InputError
from longrun.lab.selection import LayerQueries
from longrun.lab.selection_choice import OWN_BEST, Best, Choosing, FilterLayers, Mass, PreviousToken, Way, read_row
from longrun.lab.selection_names import named_rule
from longrun.lab.selection_rules import PAGE, Rule, digest_rules, known_rules
from scripts.quality.selection_answers import Choice, Read

NAMES = ("mean 16 + 0.25 at 4 bits", "mean 16 + 0.25 at 4 bits, 16-token units", "perfect", "keys")
FIRST = 9 * PAGE - 7  # the first piece stands in page 8, the second in pages 8 and 9, as rows follow each other
WAYS = (
    "", ", mass 0.6", ", mass 0.6 from 3", ", mass 0.999", ", mass 1", ", previous token", ", every 2nd layer",
    ", every 3rd layer", ", mass 0.6, previous token, every 2nd layer",
)  # fmt: skip


def layers(count: int = 4) -> list[list[LayerQueries]]:
    """Of each layer ten consecutive rows, in two pieces."""
    return [[random_queries(2, 10 * n + part, FIRST + 5 * part) for part in range(2)] for n in range(count)]


def slow_pick(values: list[float], shares: list[float], cap: int, least: int, mass: float | None) -> set[int]:
    """One row's units."""
    chosen: set[int] = set()
    for unit in sorted(range(len(values)), key=lambda unit: -values[unit])[:cap]:
        if values[unit] == float("-inf"):
            break
        if mass is not None and len(chosen) >= least and sum(shares[one] for one in chosen) >= mass:
            break
        chosen.add(unit)
    return chosen


def slow_shares(part: LayerQueries, rule: Rule) -> Tensor:
    """[num_kv_heads, R, units], of each query head a softmax over candidates, the mean of a KV head's."""
    seen = part.candidates(rule.chosen_unit)
    if rule.index is None:
        mass = part.mass(rule.unit)
        return mass / mass.sum(-1, keepdim=True)
    if rule.index.group == 1:
        scores = part.scores.unflatten(-1, (-1, rule.chosen_unit)).logsumexp(-1)
    else:
        scores = part._keys.scores(rule.index, part._q, part._scale)
    found = torch.zeros_like(scores)
    for head in range(scores.shape[0]):
        for row in range(scores.shape[1]):
            for query in range(scores.shape[2]):
                found[head, row, query, seen[row]] = scores[head, row, query, seen[row]].softmax(0)
    return found.mean(2)


def slow_taken(rule: Rule, way: Way, count: int, every: list[list[LayerQueries]]) -> Iterator[list[list[set[int]]]]:
    """Of each layer, by KV head and row, the units that are read."""
    per_page, shared = PAGE // rule.chosen_unit, []
    mass = way.pick.share if isinstance(way.pick, Mass) else None
    least = way.pick.least * per_page if isinstance(way.pick, Mass) else 0
    for layer_idx, parts in enumerate(every):
        values = torch.cat([part.ranking(rule) for part in parts], 1)
        shares = torch.cat([slow_shares(part, rule) for part in parts], 1)
        values, shares = (torch.cat((x, y[None])) for x, y in ((values, values.amax(0)), (shares, shares.mean(0))))
        found = [
            [slow_pick(v.tolist(), s.tolist(), count * per_page, least, mass) for v, s in zip(*head, strict=True)]
            for head in zip(values, shares, strict=True)
        ]
        if way.previous is not None:
            found = [[head[0], *head[:-1]] for head in found]
        if layer_idx % way.layers.every == 0:
            shared = found[-1]
            yield found[:-1]
        else:
            yield [shared] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", WAYS)
def test_every_way_reads_what_a_slow_reference_reads(name, ending):
    """Rows from 5 on read their choice: some of the first piece, and all of the second."""
    rule, way = named_rule(name + ending, known_rules())
    unit, count = rule.chosen_unit, 4
    selects = torch.arange(PAGES * PAGE) >= FIRST + 3
    choosing = Choosing(rule, way, count, selects, FIRST + 5)
    pages, share = [[], []], [[], []]
    for layer_idx, (wanted, parts) in enumerate(zip(slow_taken(rule, way, count, layers()), layers(), strict=True)):
        before = [part.scores.clone() for part in parts]
        for number, part in enumerate(choosing.narrowed(layer_idx, parts)):
            candidates = part.candidates(unit)
            for i, row in enumerate(part.rows.tolist()):
                for head in range(3):
                    taken = wanted[head][5 * number + i]
                    read = torch.tensor([not candidates[i, at] or at in taken for at in range(len(candidates[i]))])
                    if not selects[row]:
                        read[:] = True
                    else:
                        pages[number].append(len(taken) * unit / PAGE)
                        share[number].append(read[: row // unit + 1].float().mean().item())
                    tokens = read.repeat_interleave(unit)
                    expected = before[number][head, i].masked_fill(~tokens, float("-inf"))
                    assert torch.equal(part.scores[head, i], expected), (layer_idx, row, head)
    found = read_row(choosing.read)
    for kind, one in (("_text", 0), ("_questions", 1)):
        assert found["pages_chosen" + kind] == pytest.approx(sum(pages[one]) / len(pages[one]))
        assert found["share_read" + kind] == pytest.approx(sum(share[one]) / len(share[one]))
    assert found["share_read"] == pytest.approx(sum(map(sum, share)) / sum(map(len, share)))
    assert found["share_read"] < 0.99
    if ending == ", mass 0.6":
        assert found["pages_chosen"] < count - 0.1


def test_a_mass_of_one_is_the_cap_and_without_a_cap_everything():
    some = random_queries()
    for name in NAMES:
        rule = known_rules()[name]
        values, shares, of_page = some.ranking(rule), some.shares(rule), PAGE // rule.chosen_unit
        torch.testing.assert_close(shares.exp().sum(-1), torch.ones(3, 5))
        whole = Mass(1).picked(values, shares, PAGES * of_page, of_page)
        assert torch.equal(whole, some.candidates(rule.chosen_unit).expand_as(whole))
        peaked = (40 * shares).log_softmax(-1)  # most units' shares are nothing beside 1
        for cap in (1, 3, 5):
            few = Mass(1).picked(values, peaked, cap * of_page, of_page)
            assert torch.equal(few, Best().picked(values, shares, cap * of_page, of_page))
        sizes = [Mass(p).picked(values, shares, PAGES * of_page, of_page).sum().item() for p in (0.1, 0.5, 0.9, 0.99)]
        assert sizes == sorted(sizes) and 15 * of_page <= sizes[0] < sizes[-1]


def test_rows_without_candidates_choose_nothing():
    early = random_queries(2, 0, 3 * PAGE - 2)  # pages 0 to 2 are always read; from page 4 on there is a candidate
    for name in NAMES:
        rule = known_rules()[name]
        for pick in (Best(), Mass(0.9)):
            assert not pick.picked(early.ranking(rule), early.shares(rule), 4, 1).any()


def test_a_model_reads_by_them():
    read = Read(random_model(), random_text(), 4)
    found = {}
    for ending in ("", ", mass 0.5", ", mass 1", ", previous token", ", every 2nd layer"):
        rule, way = named_rule("mean 16 at 4 bits" + ending, known_rules())
        whole, sums = read.log_probs(Choice(rule, 20, True, Way(way.pick, None, way.layers)))
        if ending != ", mass 0.5":
            torch.testing.assert_close(whole, read.known.log_probs, atol=1e-4, rtol=1e-4)
            assert read_row(sums)["share_read"] == pytest.approx(1)
        found[ending] = read.log_probs(Choice(rule, 3, True, way))
    assert torch.equal(found[", mass 1"][0], found[""][0]) and torch.equal(found[", mass 1"][1], found[""][1])
    own, few = (read_row(found[ending][1]) for ending in ("", ", mass 0.5"))
    assert own["pages_chosen"] == 3 and 1 <= few["pages_chosen"] < 2.9
    for ending in (", mass 0.5", ", previous token", ", every 2nd layer"):
        assert not torch.allclose(found[ending][0], found[""][0], atol=1e-2), ending
    text, questions = len(read.text.ids) - 16 - 256, 13  # of answers' tokens all but the first
    assert found[""][1][:, 2].tolist() == [2 * 256, 2 * questions] and text == 1008


def test_names_are_read_and_mistakes_said():
    known = digest_rules() | known_rules()
    base = known["mean 16 + 0.25 at 4 bits"]
    assert named_rule(" mean 16 + 0.25 at 4 bits", known) == (base, OWN_BEST)
    rule, way = named_rule("mean 16 + 0.25 at 4 bits, mass 0.9 from 16, every 4th layer, previous token", known)
    assert rule == base and way == Way(Mass(0.9, 16), PreviousToken(), FilterLayers(4))
    digest = next(name for name in digest_rules() if name.startswith("digest of 16, 4 bits + 0.25"))
    assert named_rule(f"{digest}, 16-token units, mass .5", known)[0].chosen_unit == 16
    assert named_rule("mean 16, 16-token units, mass 1", known)[1].pick == Mass(1)
    for wrong in ("nonsense", "mean 16, mass", "mean 16, mass 0.5, mass 0.6", "mass 0.5", ", previous token"):
        with pytest.raises(InputError, match=r"no rule .*; known are .*; mean 16 at 4 bits; .*previous token"):
            named_rule(wrong, known)
    for wrong in ("mean 16, mass 1.5", "mean 16, mass 0", "mean 16, every 1st layer", "mean 64, 16-token units"):
        with pytest.raises(InputError, match=r"a mass of|lets every layer|units of 16 tokens"):
            named_rule(wrong, known)
