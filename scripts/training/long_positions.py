"""Stretched positions: position ids of short samples jump, so that far distances are seen at the cost of short texts.

Positional skip-wise training (PoSE, arXiv 2309.10400): a few jumps cut a sample into chunks, each of consecutive
positions, that lie spread over the target window. Which token comes before which stays as it is; only the angles of
RoPE are those of a far longer text. Jumps happen between pieces of the document and before the questions, never within.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

_MOST_JUMPS = 6
_BEFORE_QUESTIONS = 0.35  # how often the questions are moved away by one of the jumps, whatever else jumps
_MOVED = 0.5  # how often all of a sample begins far from position 0


def stretched(rng: random.Random, count: int, joints: Sequence[int], window: int) -> np.ndarray:
    """Positions of a sample's tokens: rising by one but for jumps at some of `joints`, all below `window`.

    Args:
        count: tokens of the sample.
        joints: where a jump is allowed, in order; the last stands before the questions.
        window: positions that there are; a sample that fills it stays as it is.

    Returns:
        int64 [count].
    """
    positions = np.arange(count, dtype=np.int64)
    spare = window - count
    if spare <= 0 or not joints:
        return positions
    # Half of the samples anywhere up to the window, half with distances of every order of magnitude.
    total = round(spare ** rng.uniform(0.5, 1.0)) if rng.random() < 0.5 else rng.randint(1, spare)
    chosen = set(rng.sample(list(joints), min(len(joints), rng.randint(1, _MOST_JUMPS))))
    if rng.random() < _BEFORE_QUESTIONS:
        chosen.add(joints[-1])
    shares = [-math.log(1.0 - rng.random()) for _ in chosen]
    done = 0.0
    for joint, share in zip(sorted(chosen), shares, strict=True):
        before = round(total * done / sum(shares))
        done += share
        positions[joint:] += round(total * done / sum(shares)) - before
    if rng.random() < _MOVED:
        positions += rng.randint(0, spare - total)
    return positions
