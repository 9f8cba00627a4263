"""What the pictures share: text that fits its width, and lines that stay apart, also for the colour-blind."""

from __future__ import annotations

import textwrap

SCALE = "cividis"
"""Colours of shares and scores from 0 to 1, dark to light: read the same way with any colour vision, and in grey."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito, 2008
_MARKERS = "so^vDP*X<>p"
_LINES = ("-", "--", ":", "-.")
_CHARACTER = 0.62  # mean width of a character, in heights of the font


def series_style(number: int) -> dict[str, object]:
    """Colour, marker and line of the series `number`, from 0: no two numbers share both colour and line."""
    turn, place = divmod(number, len(_COLOURS))
    line = _LINES[turn] if turn < len(_LINES) else (0, (turn, 1, 1, 1))
    return {"color": _COLOURS[place], "marker": _MARKERS[number % len(_MARKERS)], "linestyle": line}


def wrapped(text: str, inches: float, points: float) -> str:
    """`text` broken into lines that a font of `points` writes within `inches`; long paths are broken, too."""
    width = max(8, int(inches * 72 / (points * _CHARACTER)))
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""])
