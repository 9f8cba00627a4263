"""What tests of selected decode share: views with digests, garbage wherever nothing is meant, and choices by hand."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from page_views import ALL, listed, scattered_view

from longrun.kernels.page_choose import Budget
from longrun.quant.digest_format import DigestFormat
from longrun.quant.kv_format import PageFormat
from longrun.quant.page_digest import encode_digest


@dataclass(frozen=True)
class Case:
    """Candidates: list lengths by head, query heads a KV head, head_dim, bits of a centre, part of the lists."""

    counts: tuple[int, ...]
    group: int
    dim: int
    centre_bits: int = 4
    skip: int = 0
    limit: int = ALL
    shared: bool = False
    lam: float = 0.5

    @property
    def digest(self) -> DigestFormat:
        return DigestFormat(64, self.dim, centre_bits=self.centre_bits)

    def __str__(self) -> str:
        return "-".join(str(x) for x in vars(self).values()).replace(" ", "")


CASES = [
    Case((1,), 1, 64),
    Case((3,), 2, 128, shared=True),
    Case((4, 4), 8, 128, 8),
    Case((0, 0, 0), 4, 64, 8),
    Case((5, 0, 9), 3, 128, skip=1, limit=7),
    Case((37, 2, 16), 4, 128, 8, lam=0),
    Case((21, 33), 5, 64, 8, skip=2, lam=0),
    Case((9, 5), 4, 128, lam=0),
    Case((6, 7), 2, 64, lam=0),
    Case((31, 32, 33), 7, 64, shared=True),
    Case((130, 67, 0, 129), 4, 128, lam=0.25),
]


def make(case: Case, device="cpu", seed=0):
    """q [num_heads, group, head_dim], view and digests; those of pages that no list names are NaN."""
    view = scattered_view(
        PageFormat("k5v3", 64, case.dim), case.counts, skip=case.skip, limit=case.limit, shared=case.shared,
        device=device, seed=seed,
    )  # fmt: skip
    fmt = case.digest
    g = torch.Generator().manual_seed(seed + 1)
    heads, pages = view.table.shape
    keys = torch.randn(heads, pages, 64, case.dim, generator=g) + torch.randn(heads, pages, 1, case.dim, generator=g)
    encoded = encode_digest(keys, fmt)
    digest = torch.full((heads, pages, fmt.page_bytes), 0xFF, dtype=torch.uint8)
    for head in range(heads):
        numbers = listed(view, head)
        digest[head, numbers] = encoded[head, numbers]
    q = torch.randn(heads, case.group, case.dim, generator=g) * 3
    return q.bfloat16().float().to(device), view, digest.to(device)


def poisoned_scores(view, group, room=5):
    """NaN [num_heads, group, max_entries], with `room` entries that no list reaches."""
    longest = int(view.num_entries().max())
    return torch.full((view.num_heads, group, longest + room), torch.nan, device=view.table.device)


def random_scores(view, group, seed=0, ties=False, spread=2.0):
    """Scores of the entries of a view's lists, NaN beyond them; `ties`: of few values."""
    scores = poisoned_scores(view, group)
    drawn = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed)) * spread
    drawn = (drawn * 2).round() / 2 if ties else drawn + torch.arange(group)[:, None]
    for head, count in enumerate(view.num_entries().tolist()):
        scores[head, :, :count] = drawn[head, :, :count].to(scores.device)
    return scores


def chosen_by_hand(view, scores, pages, newest, share=0):
    """The pages of every head, in the order of its list, by the words of `choose_pages`."""
    found = []
    for head in range(view.num_heads):
        numbers = listed(view, head)
        part = scores[head, :, : len(numbers)].cpu()
        totals = (part.double().logsumexp(dim=1) * 16).round() / 16
        values = (part - totals[:, None].float()).amax(dim=0).tolist()
        order = sorted(range(len(numbers)), key=lambda e: (e < len(numbers) - newest, -values[e], e))
        found.append([numbers[e] for e in sorted(order[: max(pages, ceil(Fraction(len(numbers) * share, 10_000)))])])
    return found


def check_choice(choose, view, scores, pages, newest, room=3, share=0) -> list[list[int]]:
    """Choose into poisoned outputs, compare with `chosen_by_hand`, and return the lists."""
    device = view.table.device
    most = max(pages, ceil(scores.shape[2] * share / 10_000))
    wide = torch.full((view.num_heads, most + room + 2), -7, dtype=torch.int32, device=device)
    pages_out, counts_out = wide[:, 1:-1], torch.full((view.num_heads,), -7, dtype=torch.int32, device=device)
    choose(scores, view, budget=Budget(pages, share), newest=newest, pages_out=pages_out, counts_out=counts_out)
    expected = chosen_by_hand(view, scores, pages, newest, share)
    assert counts_out.tolist() == [len(numbers) for numbers in expected]
    for row, numbers in zip(wide.tolist(), expected, strict=True):
        assert row == [-7, *numbers, *[-7] * (len(row) - 1 - len(numbers))]
    return expected
