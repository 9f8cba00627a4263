"""Split a file into parts below a size, and join them again: for machines that accept only small files.

`split FILE DIR` writes DIR/NAME.part0, .part1, ... and DIR/NAME.parts.json (size and SHA-256 of the whole);
`join DIR NAME TARGET` puts the parts together and checks them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import COUNT
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.files.user_files import read_object
from longrun.files.whole_file import write_whole
from longrun.paths import path_option

PART_BYTES = 48 * 10**6


def split(file: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write the parts and the note of the whole; returns the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while data := source.read(part_bytes):
            digest.update(data)
            parts.append(folder / f"{file.name}.part{len(parts)}")
            parts[-1].write_bytes(data)
    note = {"bytes": file.stat().st_size, "sha256": digest.hexdigest(), "parts": len(parts)}
    (folder / f"{file.name}.parts.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    return parts


def join(folder: Path, name: str, target: Path) -> None:
    """Put the parts of `name` together. Raises `InputError` where one is missing or the whole is not what it was."""
    digest = hashlib.sha256()

    def write(made: BinaryIO) -> None:
        for number in range(note["parts"]):
            data = (folder / f"{name}.part{number}").read_bytes()
            digest.update(data)
            made.write(data)
        if digest.hexdigest() != note["sha256"]:
            raise InputError(f"the parts of {name} in {folder} are not what was split: bring them again")

    try:
        note = read_object(folder / f"{name}.parts.json", InputError, "bring all of the parts")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, write)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the parts of {name} in {folder} cannot be joined ({error}): bring all of them") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The two commands; status 0."""
    parser = Parser(description="Split a file into parts, join parts into a file.")
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("split")
    cutting.add_argument("file", type=path_option)
    cutting.add_argument("folder", type=path_option)
    cutting.add_argument("--part-bytes", type=COUNT, default=PART_BYTES)
    joining = commands.add_parser("join")
    joining.add_argument("folder", type=path_option)
    joining.add_argument("name")
    joining.add_argument("target", type=path_option)
    arguments = parser.parse_args(argv)
    if arguments.command == "split":
        for part in split(arguments.file, arguments.folder, arguments.part_bytes):
            print(f"{part} {part.stat().st_size:,} bytes")
    else:
        join(arguments.folder, arguments.name, arguments.target)
    return 0


if __name__ == "__main__":
    run(main)
