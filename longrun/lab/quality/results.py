"""The results file of a comparison: written whole after every (row, length, group of tasks); a run can resume it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrun.errors import InputError
from longrun.files.folder_lock import FolderLock
from longrun.files.user_files import RESULTS_BYTES, read_object
from longrun.lab.results_file import RESULTS_FILE, open_results, refuse_changes, write_results

FORMAT = 1


class QualityResults:
    """`results.json` in a folder.

    Attributes:
        head: everything but the records (settings, rows, environment, notes); JSON-able.
        records: what was measured, in the order it was; one a (row, length, group).
    """

    def __init__(self, folder: Path, head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        self.folder, self.head, self.records = folder, head, records
        self._lock: FolderLock | None = None

    @classmethod
    def open(
        cls, folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], force: bool = False
    ) -> QualityResults:
        """Start in `folder`, or resume what it holds.

        Args:
            settings: JSON-able; must equal the file's key by key.
            rows: JSON-able rows; those that the file has must stand there unchanged, others may be added.
            force: drop what another comparison left there.

        No other run may open it until this object is gone.

        Raises:
            InputError: another run has it open, the folder cannot be written, or it holds a damaged file or other
                settings (the first is named).
        """
        return open_results(folder, lambda: cls._open(folder, settings, rows, force))

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], force: bool) -> QualityResults:
        head: dict[str, Any] = {"format": FORMAT, "settings": settings, "rows": rows}
        if force or not (folder / RESULTS_FILE).exists():
            return cls(folder, head, [])
        earlier_results = cls.read(folder)
        earlier = earlier_results.head["settings"]
        now = {f"row {row['name']}": row for row in rows}
        then = {f"row {row['name']}": row for row in earlier_results.head["rows"]}
        pairs = [(key, earlier.get(key), settings.get(key)) for key in sorted({*settings, *earlier})]
        pairs += [(name, row, now.get(name)) for name, row in then.items()]
        refuse_changes(folder, pairs)
        return cls(folder, {**earlier_results.head, **head}, earlier_results.records)

    def measured_in(self, environment: dict[str, Any]) -> None:
        """Note where the records from here on come from; earlier runs that differ in more than their command stay."""
        last = self.head.get("environment")
        if self.records and last is not None and {**last, "command": ""} != {**environment, "command": ""}:
            self.head["earlier"] = [*self.head.get("earlier", []), last]
        self.head["environment"] = environment

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Of every run that measured some of it, in their order."""
        return [*self.head.get("earlier", []), self.head["environment"]]

    @classmethod
    def read(cls, folder: Path) -> QualityResults:
        """What `folder` holds, as it is.

        Raises:
            InputError: no results there, or a damaged file.
        """
        path = folder / RESULTS_FILE
        try:
            head = read_object(path, InputError, "it holds no results", RESULTS_BYTES)
            records = head.pop("records")
            keys = [(record["row"], record["length"], record["group"]) for record in records]
            known = {row["name"] for row in head["rows"]}
            sound = head["format"] == FORMAT and isinstance(head["settings"], dict)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read as a comparison's results: name the folder of one, or start over with --force"
            ) from error
        if not sound or len(keys) != len(set(keys)) or not {row for row, _, _ in keys} <= known:
            raise InputError(
                f"{path} is damaged or of another version: name another folder, or start over with --force"
            )
        return cls(folder, head, records)

    def settings_at(self, length: int) -> dict[str, Any]:
        """What was asked at one length: a joint result of several runs may differ there (`by_length`)."""
        settings = self.head["settings"]
        return {**settings, **settings.get("by_length", {}).get(str(length), {})}

    def get(self, row: str, length: int, group: str) -> dict[str, Any] | None:
        """The record, or None."""
        for record in self.records:
            if (record["row"], record["length"], record["group"]) == (row, length, group):
                return record
        return None

    def describe(self, row: str, described: dict[str, Any]) -> None:
        """Note how a row is run.

        Raises:
            InputError: records of the row are there and were run otherwise, by an earlier version or on other defaults.
        """
        earlier = self.head["described"].get(row)
        if earlier is not None and any(record["row"] == row for record in self.records):
            for key in sorted({*earlier, *described}):
                then, now = (json.dumps(one.get(key)) for one in (earlier, described))
                if then != now:
                    raise InputError(
                        f"{self.folder / RESULTS_FILE} has row {row} measured with {key} = {then}, now it is {now}: "
                        f"use another --out, or --force to start over"
                    )
        self.head["described"][row] = described

    def drop(self, row: str, length: int, group: str) -> None:
        """Forget a record that must be measured again."""
        self.records = [r for r in self.records if (r["row"], r["length"], r["group"]) != (row, length, group)]

    def add(self, record: dict[str, Any]) -> None:
        """Take in a record (with row, length and group) and write the file."""
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Write the file, see `write_results`."""
        write_results(self.folder, {**self.head, "records": self.records})
