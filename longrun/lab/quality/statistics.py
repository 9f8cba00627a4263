"""Intervals for the numbers of a comparison: Wilson for shares, bootstrap for means, paired where rows are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # two-sided 95%
_RESAMPLES = 4000
_MIN_GROUPS = 8  # with fewer documents resampling them says little, and single items are resampled


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval over `count` items."""

    value: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def wilson(successes: int, count: int) -> Estimate:
    """Share of successes with Wilson's 95% score interval (Wilson 1927); count at least 1."""
    share, square = successes / count, _Z**2 / count
    centre = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), count)


def bootstrap(
    values: Sequence[float], groups: Sequence[str], bounds: tuple[float, float] | None = None, seed: int = 0
) -> Estimate:
    """Mean with its 95% percentile bootstrap interval.

    Whole groups (documents) are drawn where there are at least 8 of them, since their items resemble each other, else
    single items.

    Args:
        values: [n], n at least 1; groups: the document of each.
        bounds: least and greatest possible value. Where all values are equal a bootstrap would claim certainty: with
            bounds the interval then is the rule of three's, 3 / (number drawn from) to either side.
    """
    numbers = np.asarray(values, dtype=np.float64)
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    if len(names) >= _MIN_GROUPS:
        places = np.array([names[name] for name in groups])
        sums = np.bincount(places, weights=numbers)
        counts = np.bincount(places).astype(np.float64)
    else:
        sums, counts = numbers, np.ones(len(numbers))
    mean = float(numbers.mean())
    if bounds is not None and (numbers == numbers[0]).all():
        reach = 3 / len(sums)
        return Estimate(mean, max(bounds[0], mean - reach), min(bounds[1], mean + reach), len(numbers))
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, min(mean, float(low)), max(mean, float(high)), len(numbers))


def paired_difference(
    own: Sequence[float],
    reference: Sequence[float],
    groups: Sequence[str],
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean of own - reference over the same items, with the interval of `bootstrap` (bounds are the difference's)."""
    assert len(own) == len(reference) == len(groups) > 0
    return bootstrap([one - other for one, other in zip(own, reference, strict=True)], groups, bounds, seed)
