"""How far heads need to reach: the losses' file, and reaches allocated from them."""

import itertools
import json
import random

import pytest

from longrun.errors import HeadMapError
from longrun.patterns.head_map import HeadMap
from longrun.patterns.reach_allocation import allocate
from longrun.patterns.reach_losses import ReachLosses
from longrun.units import ALL_TOKENS

REACHES = (4, 16, 64)
BYTES = {4: 10, 16: 24, 64: 70, ALL_TOKENS: 200}


def random_losses(layers=2, heads=3, seed=0, falling=True):
    rng = random.Random(seed)
    rows = [[[rng.random() for _ in REACHES] for _ in range(heads)] for _ in range(layers)]
    if falling:
        rows = [[sorted(of_head, reverse=True) for of_head in row] for row in rows]
    return ReachLosses(2, 256, REACHES, tuple(tuple(map(tuple, row)) for row in rows))


def loss_of(losses, reaches):
    total = 0.0
    for of_heads, row in zip(losses.losses, reaches, strict=True):
        for of_head, reach in zip(of_heads, row, strict=True):
            total += 0.0 if reach == ALL_TOKENS else of_head[REACHES.index(reach)]
    return total


def bytes_of(reaches):
    return sum(BYTES[reach] for row in reaches for reach in row)


def least_loss(losses, budget):
    """Of all choices that fit, the one that loses least."""
    heads = losses.num_layers * losses.num_kv_heads
    found = []
    for flat in itertools.product(BYTES, repeat=heads):
        rows = tuple(flat[first : first + losses.num_kv_heads] for first in range(0, heads, losses.num_kv_heads))
        if bytes_of(rows) <= budget:
            found.append(loss_of(losses, rows))
    return min(found)


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_where_a_step_ends_with_the_bytes_no_choice_loses_less(seed, falling):
    """What is best at a price per byte, head by head, is best for the bytes that it takes."""
    losses = random_losses(2, 2, seed, falling)
    budgets = set()
    for price in (0.85**n for n in range(10, 80)):
        best = []
        for of_head in (of_head for row in losses.losses for of_head in row):
            options = zip(BYTES.items(), (*of_head, 0.0), strict=True)
            best.append(min((loss + price * size, size) for (_, size), loss in options)[1])
        budgets.add(sum(best))
    assert len(budgets) > 4
    for budget in budgets:
        reaches = allocate(losses, BYTES.get, budget)
        assert bytes_of(reaches) == budget
        assert loss_of(losses, reaches) == pytest.approx(least_loss(losses, budget))


@pytest.mark.parametrize("falling", [True, False])
def test_more_bytes_never_lose_more(falling):
    for seed in range(20):
        losses = random_losses(3, 3, seed, falling)
        before = float("inf")
        for budget in range(90, 1900, 7):
            reaches = allocate(losses, BYTES.get, budget)
            assert bytes_of(reaches) <= budget
            assert loss_of(losses, reaches) <= before + 1e-12
            before = loss_of(losses, reaches)
        assert before == 0


def test_ties_go_to_the_lower_layer_and_head():
    same = ReachLosses(0, 1000, (4,), (((1.0,), (1.0,)), ((1.0,), (1.0,))))
    step = {4: 1, ALL_TOKENS: 3}
    rows = [allocate(same, step.get, budget) for budget in (4, 6, 8, 9, 12)]
    assert [[reach == ALL_TOKENS for row in found for reach in row] for found in rows] == [
        [False] * 4, [True, False, False, False], [True, True, False, False], [True, True, False, False], [True] * 4,
    ]  # fmt: skip


def test_a_step_too_large_leaves_room_for_smaller_ones():
    losses = ReachLosses(0, 1000, (4, 16), (((100.0, 99.0), (1.0, 0.5)),))
    cost = {4: 0, 16: 10, ALL_TOKENS: 100}
    assert allocate(losses, cost.get, 50) == ((4, 16),)
    assert allocate(losses, cost.get, 100) == ((ALL_TOKENS, 4),)


def test_a_head_that_loses_nothing_gets_nothing():
    losses = ReachLosses(0, 1000, (4, 16), (((0.0, 0.0), (1.0, 0.0)),))
    assert allocate(losses, {4: 1, 16: 2, ALL_TOKENS: 3}.get, 100) == ((4, 16),)


def test_reaches_that_do_not_fit():
    with pytest.raises(HeadMapError, match=r"59 B .* 60 B: give at least 60 bytes"):
        allocate(random_losses(), BYTES.get, 59)
    assert bytes_of(allocate(random_losses(), BYTES.get, 60)) == 60


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reaches": ()}, "name no reach"),
        ({"reaches": (16, 16, 64)}, "reach 16 follows 16"),
        ({"reaches": (4, 16, 65)}, "reach 65 is longer than a quarter of the 256 tokens"),
        ({"reaches": (4, 16)}, "layer 0, KV head 0 has 3 losses for 2 reaches"),
        ({"reaches": (0, 16, 64)}, "must be at least 1"),
        ({"measured_length": 0}, "must be at least 1"),
        ({"sink_size": 1.5}, "is not an integer"),
        ({"losses": ()}, "are empty"),
        ({"losses": (((1, 1, 1),), ())}, "layer 1 has 0 KV heads where layer 0 has 1"),
        ({"losses": (((1, -1, 1),),)}, "layer 0, KV head 0: loss -1 is outside the range"),
        ({"losses": (((1, float("nan"), 1),),)}, "not a finite number"),
        ({"losses": (((1, True, 1),),)}, "not a finite number"),
    ],
)
def test_impossible_losses(fields, words):
    good = random_losses()
    with pytest.raises(HeadMapError, match=words):
        ReachLosses(**{**vars(good), **fields})


def test_the_file_stands_with_the_map(tmp_path):
    losses = random_losses()
    scores = ((1.0, 0.5, 0.0), (0.25, 1.0, 1.0))
    plain, whole = HeadMap(scores, 2, 4), HeadMap(scores, 2, 4, reach_losses=losses)
    whole.save(tmp_path / "map")
    assert HeadMap.load(tmp_path / "map") == whole
    assert whole.with_window(3).reach_losses == losses
    names = {"full_attention_heads.tsv", "config.json"}
    plain.save(tmp_path / "plain")
    for name in names:  # as DuoAttention reads it
        assert (tmp_path / "map" / name).read_text() == (tmp_path / "plain" / name).read_text()
    assert {path.name for path in (tmp_path / "plain").iterdir()} == names
    with pytest.raises(HeadMapError, match="holds another head map"):
        whole.save(tmp_path / "plain")
    plain.save(tmp_path / "map", force=True)
    assert HeadMap.load(tmp_path / "map") == plain
    with pytest.raises(HeadMapError, match="2 layers of 3 KV heads, but the head map has 1 of 2"):
        HeadMap(((1.0, 0.0),), reach_losses=losses)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("losses"), "losses is None, no list"),
        (lambda data: data.update(reaches=4), "reaches is 4, no list"),
        (lambda data: data.update(losses=[[1.0]]), "losses are no lists"),
        (lambda data: data.update(losses=["abc"]), "losses are no lists"),
        (lambda data: data["losses"][0][0].append(1.0), "has 4 losses for 3 reaches"),
        (lambda data: data["losses"][0].pop(), "layer 1 has 3 KV heads where layer 0 has 2"),
        (lambda data: data.update(measured_length="long"), "is not an integer"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, words):
    HeadMap(((1.0,) * 3,) * 2, reach_losses=random_losses()).save(tmp_path / "map")
    file = tmp_path / "map" / "reach_losses.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(HeadMapError, match=words) as error:
        HeadMap.load(tmp_path / "map")
    assert "reach_losses.json" in str(error.value)
