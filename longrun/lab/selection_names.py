"""What selection's rules are called with their ways to choose, as options of a probe name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from longrun.errors import InputError
from longrun.lab.selection_choice import OWN_BEST, FilterLayers, Mass, PreviousToken, Way
from longrun.lab.selection_rules import PAGE, Rule

_ENDINGS = {
    "units": re.compile("16-token units"), "mass": re.compile(r"mass (\d*\.?\d+)(?: from (\d+))?"),
    "previous": re.compile("previous token"), "every": re.compile(r"every (\d+)(?:st|nd|rd|th) layer"),
}  # fmt: skip


def named_rule(name: str, known: Mapping[str, Rule]) -> tuple[Rule, Way]:
    """A rule, and what stands behind it in any order: "16-token units", "mass 0.9" (or "mass 0.9 from 16", pages at
    least), "previous token", "every 4th layer", each once and after a comma.

    Raises:
        InputError: no such rule.
    """
    base, found = name.strip(), dict[str, re.Match[str]]()
    while base not in known:
        base, _, last = base.rpartition(", ")
        kind, match = next(
            ((kind, m) for kind, ending in _ENDINGS.items() if (m := ending.fullmatch(last))), ("", None)
        )
        if not base or match is None or kind in found:
            raise InputError(
                f"--rules: there is no rule {name!r}; known are {'; '.join(known)}; each may be followed, once, by "
                "', 16-token units', ', mass 0.9' (', mass 0.9 from 16': pages at least), ', previous token' and "
                "', every 4th layer'"
            )
        found[kind] = match
    rule, way = known[base], OWN_BEST
    if "units" in found:
        if rule.index is None or rule.coarse is not None or 16 % rule.index.group or rule.index.unit != PAGE:
            raise InputError(f"--rules: {name!r} cannot choose units of 16 tokens; take an index by groups of 16 or 8")
        rule = replace(rule, index=replace(rule.index, unit=16))
    if "mass" in found:
        share, least = found["mass"].groups()
        if not 0 < float(share) <= 1:
            raise InputError(f"--rules: {name!r} has a mass of {share}; give one above 0, and 1 at most")
        way = replace(way, pick=Mass(float(share), int(least or 1)))
    if "every" in found:
        every = int(found["every"][1])
        if every < 2:
            raise InputError(
                f"--rules: {name!r} lets every layer choose; give every 2nd or less often, or leave it out"
            )
        way = replace(way, layers=FilterLayers(every))
    return rule, replace(way, previous=PreviousToken() if "previous" in found else None)
