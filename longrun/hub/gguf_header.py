"""The header of a GGUF file on the hub, fetched without the weights: some MB, most of them its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from struct import unpack
from typing import BinaryIO

from longrun.errors import CheckpointError
from longrun.files.whole_file import write_whole
from longrun.hub.names import HubName
from longrun.hub.repository import hub_errors, list_files, one_gguf
from longrun.paths import cache_dir

MAX_HEADER = 256 * 2**20
"""Bytes. The largest vocabularies take 20 MB."""

_PIECE = 2**20
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the other value types, in bytes


def header_file(name: HubName) -> Path:
    """A file with the header of the GGUF file that `name` means and the length of the whole: its weights are a hole.

    It is kept in longrun's cache folder, for planning alone.

    Raises:
        CheckpointError: the hub does not have the file, cannot be reached, or it is no GGUF file.
    """
    from huggingface_hub import HfFileSystem

    sizes = list_files(name)
    file = one_gguf(name, sizes)
    kept = cache_dir() / "gguf_headers" / re.sub(r"[^\w.-]", "--", f"{name.repo}/{sizes[file]}/{file}")
    if kept.is_file():
        return kept
    with hub_errors(name), HfFileSystem().open(f"{name.repo}/{file}", "rb", block_size=_PIECE) as source:
        header = read_header(source, str(name))

    def write(target: BinaryIO) -> None:
        target.write(header)
        target.truncate(sizes[file])

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, write)
    except OSError as error:
        raise CheckpointError(
            f"{kept.parent} cannot be written ({error.strerror or error}): set LONGRUN_CACHE to another folder"
        ) from None
    return kept


def read_header(source: BinaryIO, name: str) -> bytes:
    """Everything before the weights of a GGUF file of version 2 or 3: its keys and its list of tensors.

    Raises:
        CheckpointError: no such file, or a header that ends early or takes more than `MAX_HEADER` bytes.
    """
    parts: list[bytes] = []
    total = 0

    def take(size: int) -> bytes:
        nonlocal total
        total += size
        content = source.read(size) if total <= MAX_HEADER else b""
        if len(content) != size:
            raise CheckpointError(f"{name} has a damaged header: name another file")
        parts.append(content)
        return content

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def skip(kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            take(number(8))
        elif kind == _ARRAY and depth < 4:
            of, count = number(4), number(8)
            if of in _SIZES:
                take(count * _SIZES[of])
            else:
                for _ in range(count):
                    skip(of, depth + 1)
        elif kind in _SIZES:
            take(_SIZES[kind])
        else:
            raise CheckpointError(f"{name} has a damaged header (value type {kind}): name another file")

    magic, version = unpack("<4sI", take(8))
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(f"{name} is no GGUF file of version 2 or 3: name another file")
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        skip(_STRING)
        skip(number(4))
    for _ in range(tensors):
        skip(_STRING)
        take(8 * number(4))
        take(12)
    return b"".join(parts)
