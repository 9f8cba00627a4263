"""The header of a GGUF file: its metadata, and where each tensor stands. No tensor is read, and no torch loaded.

The format (version 2 and 3, little-endian): magic, version, number of tensors and of metadata entries, the entries
(name, type, value), the tensors' entries (name, dimensions with the row's length first, type, offset), padding to the
alignment, and the data. The `gguf` package makes a numpy array of every string, which takes ten seconds for a
vocabulary of 150,000 tokens, and trusts every number: here lengths are compared with the file's first, and arrays that
nobody asks for are passed over.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from longrun.errors import CheckpointError, quoted, short_path, shortened

TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
"""What weights may come in."""

MAX_HEADER_BYTES = 256 * 2**20
"""A vocabulary of 256,000 tokens with its merges takes 15 MB."""

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_NUMBERS = 1024  # of an array that nobody asked for: what differs by layer
_MAX_DIMENSIONS = 4
_READ_BYTES = 2**20
_SETTLED_NS = 2 * 10**9  # a file that changes once more within the clock's step of the system looks the same


@dataclass(frozen=True)
class PassedOver:
    """Stands for an array of the metadata that was not asked for: its number of items."""

    count: int


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor stands: name in the file, type (one of `TENSOR_TYPES`), shape with rows first, first byte in
    the file, and number of bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file without its data.

    Attributes:
        metadata: name -> number, bool, str, list, or `PassedOver`.
        tensors: by their names in the file.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.tokens" in self.metadata and "tokenizer.ggml.model" in self.metadata


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that a model's path means: the file itself, or the only one of a folder that holds no safetensors.

    None: a folder of another kind, or nothing there.

    Raises:
        CheckpointError: the folder holds several.
    """
    path = Path(model)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        return None
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors*")):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"model folder {short_path(path)} holds {len(files)} GGUF files ({shortened(files[0].name)}, "
            f"{shortened(files[1].name)}{', ...' if len(files) > 2 else ''}): name one of them as the model"
        )
    return files[0]


def read_gguf_header(file: Path, keep: Collection[str] = ()) -> GgufHeader:
    """Metadata and tensors of a GGUF file, after checking that the header is sound and the file complete.

    Args:
        keep: names of the arrays to give back whole.

    Raises:
        CheckpointError: no GGUF file, one of another version or byte order, one part of several, a damaged header, a
            type that is not supported, tensors that overlap or lie beyond the file's end.
    """
    try:
        found = os.stat(file)
    except OSError:
        return _read_header(file, keep)  # which says what is wrong
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if keep or time.time_ns() - changed < _SETTLED_NS:
        return _read_header(file, keep)
    return _settled_header(file, found.st_dev, found.st_ino, found.st_size, changed)


@lru_cache(maxsize=2)
def _settled_header(file: Path, *_identity: int) -> GgufHeader:
    """A load asks for the header ten times, and a vocabulary takes a twentieth of a second."""
    return _read_header(file, ())


def _read_header(file: Path, keep: Collection[str]) -> GgufHeader:
    where = short_path(file)
    try:
        with open(file, "rb") as stream:
            reader = _Reader(stream, os.fstat(stream.fileno()).st_size, where)
            metadata, num_tensors = _read_metadata(reader, keep)
            entries = [_read_entry(reader) for _ in range(num_tensors)]
            start = reader.position
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror}): fetch it again") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
        raise reader.damaged(f"general.alignment is {quoted(alignment)}, and must be a power of two")
    start += -start % alignment
    return GgufHeader(Path(file), metadata, _placed(entries, start, alignment, reader))


class _Reader:
    """The header's bytes from the first to the last, read as they are needed."""

    def __init__(self, stream: BufferedIOBase, size: int, where: str) -> None:
        self.stream, self.size, self.where = stream, size, where
        self.position = 0
        self._bytes = bytearray()

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where} cannot be used ({shortened(why, 200)}): fetch it again")

    def number(self, code: str) -> Any:
        """The next scalar, by its letter in `struct`."""
        return self.numbers(1, code)[0]

    def numbers(self, count: int, code: str) -> tuple[Any, ...]:
        length = count * struct.calcsize(f"<{code}")
        self._need(length)
        found = struct.unpack_from(f"<{count}{code}", self._bytes, self.position)
        self.position += length
        return found

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        unpack, found = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                if self.position + 8 > len(self._bytes):
                    self._need(8)
                length = unpack(self._bytes, self.position)[0]
                self.position += 8
                if self.position + length > len(self._bytes):
                    self._need(length)
                found.append(self._bytes[self.position : self.position + length].decode())
                self.position += length
        except UnicodeDecodeError:
            raise self.damaged(f"a text at byte {self.position:,} is not in UTF-8") from None
        return found

    def pass_over(self, length: int) -> None:
        self._need(length)
        self.position += length

    def pass_over_texts(self, count: int) -> None:
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.position + 8 > len(self._bytes):
                self._need(8)
            self.position += 8 + unpack(self._bytes, self.position)[0]
        self._need(0)

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things of at least that many bytes each; more than the file can hold is damage."""
        number = self.number("Q")
        if number * least_bytes > self.size - self.position:
            raise self.cut(f"it claims {number:,} {what}")
        return number

    def cut(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} ends inside its header ({what} in a file of {self.size:,} bytes): the file is truncated or "
            f"damaged, fetch it again"
        )

    def _need(self, length: int) -> None:
        end = self.position + length
        if end > self.size:
            raise self.cut(f"byte {end:,} is named")
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
        while end > len(self._bytes):
            more = self.stream.read(max(_READ_BYTES, end - len(self._bytes)))
            if not more:
                raise self.cut(f"byte {end:,} is named")
            self._bytes += more


def _read_metadata(reader: _Reader, keep: Collection[str]) -> tuple[dict[str, Any], int]:
    """Metadata, and the number of tensors whose entries follow."""
    magic = reader.numbers(min(4, reader.size), "c")
    if b"".join(magic) != b"GGUF":
        raise CheckpointError(
            f"{reader.where} is no GGUF file (it begins with {quoted(b''.join(magic))}): give a GGUF file, or a folder "
            f"with config.json and *.safetensors"
        )
    version = reader.number("I")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise CheckpointError(
                f"{reader.where} is a big-endian GGUF file, which is not supported: fetch the little-endian one"
            )
        raise CheckpointError(
            f"{reader.where} is of GGUF version {version:,}, and only {_VERSIONS[0]} and {_VERSIONS[1]} are supported: "
            f"convert it again or fetch another file"
        )
    num_tensors = reader.count(24, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(13, "metadata entries")):
        name = reader.text()
        if name in metadata:
            raise reader.damaged(f"metadata holds {shortened(name)} twice")
        metadata[name] = _read_value(reader, name, reader.number("I"), name in keep)
    if not isinstance(metadata.get("general.architecture"), str):
        raise reader.damaged("metadata names no general.architecture")
    parts = metadata.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise CheckpointError(
            f"{reader.where} is one of {parts:,} parts of a split GGUF file, which is not supported: merge them into "
            f"one file (llama-gguf-split --merge) or fetch a whole one"
        )
    return metadata, num_tensors


def _read_value(reader: _Reader, name: str, kind: int, keep: bool) -> Any:
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind])
    if kind == _STRING:
        return reader.text()
    if kind == _ARRAY:
        item = reader.number("I")
        if item == _STRING:
            count = reader.count(8, f"items of {shortened(name)}")
            if keep:
                return reader.texts(count)
            reader.pass_over_texts(count)
            return PassedOver(count)
        if item in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[item]}")
            count = reader.count(size, f"items of {shortened(name)}")
            if keep or count <= _KEPT_NUMBERS:
                return list(reader.numbers(count, _SCALARS[item]))
            reader.pass_over(count * size)
            return PassedOver(count)
        kind = item
    raise reader.damaged(f"metadata {shortened(name)} is of the unknown type {kind}")


def _read_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions with the row's length first, number of the type, and offset in the data."""
    name = reader.text()
    num_dimensions = reader.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise reader.damaged(f"tensor {shortened(name)} has {num_dimensions:,} dimensions")
    dimensions = reader.numbers(num_dimensions, "Q")
    return name, dimensions, reader.number("I"), reader.number("Q")


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, reader: _Reader
) -> dict[str, GgufEntry]:
    """The tensors with their places in the file, one behind the other."""
    tensors: dict[str, GgufEntry] = {}
    end = start
    for name, dimensions, kind, offset in sorted(entries, key=lambda entry: (entry[3], entry[0])):
        if name in tensors:
            raise reader.damaged(f"it holds tensor {shortened(name)} twice")
        type_name, per_block, block_bytes = _type_of(kind, name, reader)
        if dimensions[0] % per_block or 0 in dimensions:
            raise reader.damaged(
                f"tensor {shortened(name)} of type {type_name} has dimensions {quoted(list(dimensions))}"
            )
        num_bytes = math.prod(dimensions) // per_block * block_bytes
        if start + offset != end + (start - end) % alignment:
            raise reader.damaged(f"there is a gap or an overlap before tensor {shortened(name)}")
        end = start + offset + num_bytes
        if end > reader.size:
            raise CheckpointError(
                f"{reader.where} ends inside tensor {shortened(name)} ({reader.size:,} bytes where its header needs at "
                f"least {end:,}): the file is truncated, fetch it again"
            )
        tensors[name] = GgufEntry(name, type_name, dimensions[::-1], start + offset, num_bytes)
    return tensors


def _type_of(kind: int, tensor: str, reader: _Reader) -> tuple[str, int, int]:
    """Name, weights a block and bytes a block of a tensor type by its number."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = kind in GGMLQuantizationType.__members__.values()
    name = GGMLQuantizationType(kind).name if known else f"number {kind}"
    if name not in TENSOR_TYPES:
        raise CheckpointError(
            f"{reader.where}: tensor {shortened(tensor)} is of type {name}, which is not supported: fetch a file whose "
            f"tensors are of {', '.join(TENSOR_TYPES)}"
        )
    return (name, *GGML_QUANT_SIZES[GGMLQuantizationType(kind)])
