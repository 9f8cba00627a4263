"""Whether a written answer is the right one: exact after quotes, marks of code and white space are taken off."""

from __future__ import annotations

import re

_WRAPPING = " \t`'\"*"
_NUMBER = re.compile(r"(?<![\w.])[-+]?\.?\d[\w.]*")


def first_line(text: str) -> str:
    """The answer's first line that says something: blank ones and fences of code blocks are skipped."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("```")), "")


def is_finished(text: str) -> bool:
    """Whether the first line is complete: another one has begun after it."""
    return first_line(text) != "" and text.rstrip(" \t").endswith("\n")


def bare(text: str) -> str:
    """Without quotes, backticks, asterisks and a full stop around it."""
    return text.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING)


def holds_value(answer: str, value: str) -> bool:
    """Whether the first line is `value` (a literal or a file's name), or holds it as a whole token: after the last
    `=`, `:` or `is`, as the only number, or as the last text in quotes."""
    line, wanted = first_line(answer), bare(value)
    if wanted in (bare(line), bare(re.split(r"\s*(?:=|:|\bis\b)\s+", line)[-1])):
        return True
    if _NUMBER.fullmatch(wanted):
        return [number.rstrip(".").removeprefix("+") for number in _NUMBER.findall(line)] == [wanted]
    quoted = re.findall(r"(['\"`])(.*?)\1", line)
    return bool(quoted) and bare(quoted[-1][1]) == wanted


def same_names(answer: str, expected: str) -> bool:
    """Whether the first line lists exactly the expected names, separated by commas, in their order; brackets around the
    list, types, defaults and a leading `self` do not count."""
    line = first_line(answer)
    inside = re.search(r"\((.*)\)", line)
    names = [bare(re.split(r"[:=]", part)[0]) for part in (inside[1] if inside else line).split(",")]
    return names[names[0] in ("self", "cls") :] == [part.strip() for part in expected.split(",")]
