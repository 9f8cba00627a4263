"""A comparison's settings file: rows read from TOML, folders put in place of names, rows chosen by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from longrun.errors import InputError, quoted
from longrun.files.user_files import parse_toml, read_text
from longrun.lab.quality.row import REFERENCE, Row


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a settings file: `[[row]]` tables with the fields of `Row`.

    Raises:
        InputError: a file that cannot be read, an unknown key, a name given twice or kept for the reference.
    """
    advice = "see scripts/quality/compare_settings.toml"
    found = parse_toml(read_text(path, InputError, advice), f"settings file {path}", InputError)
    tables = found.pop("row", None)
    if found or not isinstance(tables, list) or not tables:
        raise InputError(
            f"settings file {path} must hold [[row]] tables and nothing else: see scripts/quality/compare_settings.toml"
        )
    known, rows = {field.name for field in fields(Row)}, []
    for number, table in enumerate(tables, start=1):
        for key in table:
            if key not in known:
                raise InputError(f"{path}, row {number}: {key} is unknown: use {', '.join(sorted(known))}")
        if "name" not in table:
            raise InputError(f"{path}, row {number} has no name: every row needs one")
        row = Row(**table)
        if row.name == REFERENCE or row.name in {other.name for other in rows}:
            raise InputError(f"{path}: the name {quoted(row.name)} is taken: give every row one of its own")
        rows.append(row)
    return tuple(rows)


def with_maps(rows: Sequence[Row], folders: Mapping[str, str]) -> tuple[tuple[Row, ...], list[str]]:
    """The rows with folders in place of "@NAME", and the names of the rows left out, whose NAME has no folder.

    Raises:
        InputError: a NAME of `folders` that no row has.
    """
    kept, left_out, used = [], [], set()
    for row in rows:
        before, placeholder, name = row.head_map.rpartition("@")
        if not placeholder:
            kept.append(row)
        elif name in folders:
            used.add(name)
            kept.append(replace(row, head_map=before + folders[name]))
        else:
            left_out.append(row.name)
    if unknown := sorted(set(folders) - used):
        raise InputError(f"head map name {quoted(unknown[0])} is in no row of the settings file: see its @NAMEs")
    return tuple(kept), left_out


def chosen_rows(rows: Sequence[Row], words: Sequence[str]) -> tuple[Row, ...]:
    """The rows whose names hold one of the words, in their order; all of them without a word.

    Raises:
        InputError: a word that no name holds.
    """
    for word in words:
        if not any(word in row.name for row in rows):
            raise InputError(
                f"--rows {quoted(word)} is in no row's name: they are {', '.join(row.name for row in rows)}"
            )
    return tuple(row for row in rows if not words or any(word in row.name for word in words))
