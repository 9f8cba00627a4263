"""A session's files other than its manifest: pooled pages, and the state of everything else.

pages-FIRST-STOP-ID.bin   pooled pages [FIRST, STOP): layer by layer, and within a layer reach by reach, payloads
                          [heads, n, payload_bytes], then the index [heads, n, 2, head_dim] float16 (quantized only)
state-ID.safetensors      token ids, logits, random state, tails, sink pages, rings

Heads of a finite reach have those pages in a file that they read when it was written, see `Reach.kept`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from longrun.errors import SessionError, shortened
from longrun.session.manifest import Manifest, StoredFile, shown

if TYPE_CHECKING:
    from longrun.cache.dual import DualCache
    from longrun.session.savable import Savable

_HEADER_BYTES = 2**20  # more than safetensors' header of any session


def write_pages(path: Path, cache: DualCache, first: int, stop: int) -> StoredFile:
    """Pooled pages [first, stop) into the new file `path`. Raises OSError."""
    return _write(path, _page_bytes(cache, first, stop), first, stop, cache.seq_len)


def write_state(path: Path, session: Savable) -> StoredFile:
    """All but the pooled pages into the new file `path`. Raises OSError."""
    found = {f"cache.{name}": x.cpu().contiguous() for name, x in session.cache.state().items()}
    found.update(session.snapshot())
    return _write(path, iter([memoryview(save_safetensors(found))]))


def restore_pages(folder: Path, files: Sequence[StoredFile], cache: DualCache, seq_len: int) -> None:
    """Fill an empty cache with the pooled pages of `seq_len` tokens.

    Raises:
        SessionError: they are not these files' pages, or a file is missing, truncated or damaged.
    """
    pooled = cache.spec.page_format.pooled_pages(seq_len)
    if (files[-1].stop if files else 0) != pooled:
        raise SessionError(
            f"session {shown(folder)} has files for {files[-1].stop if files else 0:,} pages, and its {seq_len:,} "
            f"tokens need {pooled:,}: restore it from a copy"
        )
    for file in files:
        _restore_file(folder, file, cache, seq_len)


def read_state(folder: Path, manifest: Manifest, session: Savable) -> dict[str, Tensor]:
    """The state of an empty session's successor: each tensor of the shape and dtype that it must have.

    Raises:
        SessionError: the file is missing, truncated or damaged, or holds other tensors.
    """
    path = shown(folder / manifest.state.name)
    expected = _expected_state(manifest, session)
    most = _HEADER_BYTES + sum(x.nbytes for x in expected.values())
    if manifest.state.bytes > most:
        raise SessionError(f"{path} has {manifest.state.bytes:,} bytes where a session has at most {most:,}")
    raw = b"".join(_read(folder, manifest.state, [manifest.state.bytes]))
    try:
        state = load_safetensors(raw)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SessionError(f"{path} holds no tensors ({shortened(error)}): restore it from a copy") from error
    for name in [*expected, *state]:
        if name == "logits" and name not in state:
            continue
        own, found = expected.get(name), state.get(name)
        if own is None or found is None or (own.shape, own.dtype) != (found.shape, found.dtype):
            raise SessionError(f"{path} does not hold {shortened(name)} of this session: restore it from a copy")
    _check_values(path, state, session.vocab_size)
    return state


def _expected_state(manifest: Manifest, session: Savable) -> dict[str, Tensor]:
    """Every tensor of the state, without memory behind it; rings as large as those of the saved capacity were."""
    spec = session.cache.spec
    slots = min(spec.sink_size + spec.recent_size, manifest.capacity)
    expected = {}
    for name, own in session.cache.state().items():
        shape = [own.shape[0], slots, *own.shape[2:]] if ".ring_" in name else own.shape
        expected[f"cache.{name}"] = torch.empty(shape, dtype=own.dtype, device="meta")
    expected["token_ids"] = torch.empty(manifest.num_tokens, dtype=torch.int32, device="meta")
    expected["logits"] = torch.empty(session.vocab_size, dtype=torch.float32, device="meta")
    expected["generator"] = torch.Generator().get_state()
    return expected


def _check_values(path: str, state: dict[str, Tensor], vocab_size: int) -> None:
    ids = state["token_ids"]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise SessionError(f"{path} holds token ids outside the vocabulary of {vocab_size:,}: restore it from a copy")
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise SessionError(f"{path} holds no random state ({shortened(error)}): restore it from a copy") from error


def _page_bytes(cache: DualCache, first: int, stop: int) -> Iterator[memoryview]:
    for pages, _ in cache.layers:
        for group in pages.groups if pages is not None else ():
            numbers = _numbers(group.reach.kept(first, stop, cache.seq_len))
            yield _raw(pages.places.read(group.heads, numbers.numpy()))
            if pages.index is not None:
                yield _raw(pages.index[group.heads][:, numbers.to(cache.device)])


def _numbers(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """int64 [n], the pages of these ranges."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(begin, end) for begin, end in ranges)])


def _restore_file(folder: Path, file: StoredFile, cache: DualCache, seq_len: int) -> None:
    fmt, count = cache.spec.page_format, file.stop - file.first
    layers = [pages for pages, _ in cache.layers if pages is not None]
    numbers = {id(g): _numbers(g.reach.kept(file.first, file.stop, file.seq_len)) for p in layers for g in p.groups}
    sizes = [
        group.num_heads * len(numbers[id(group)]) * size
        for pages in layers for group in pages.groups for size in (fmt.payload_bytes, fmt.index_bytes)
    ]  # fmt: skip
    parts = _read(folder, file, sizes)
    for pages in layers:
        new = pages.places.add(count, seq_len)
        for group in pages.groups:
            saved = numbers[id(group)]
            shape = group.num_heads, len(saved)
            payload = torch.frombuffer(next(parts), dtype=torch.uint8).view(*shape, -1) if len(saved) else next(parts)
            raw = next(parts)
            for part in (part for part in new if part.heads == group.heads):
                rows = slice(*torch.searchsorted(saved, torch.tensor([part.begin, part.end])).tolist())
                if rows.stop - rows.start != part.end - part.begin:
                    raise SessionError(
                        f"{shown(folder / file.name)} lacks pages of the session: restore it from a copy"
                    )
                index = None
                if fmt.quantized:
                    index = torch.frombuffer(raw, dtype=torch.float16).view(*shape, 2, fmt.head_dim)
                    index = index[:, rows].to(cache.device)
                pages.write(part, payload[:, rows].to(cache.device), index)
    assert next(parts, None) is None


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().view(torch.uint8).reshape(-1).numpy())


def _write(path: Path, parts: Iterator[memoryview], first: int = 0, stop: int = 0, seq_len: int = 0) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as out:
        for part in parts:
            digest.update(part)
            out.write(part)
            size += part.nbytes
        out.flush()
        os.fsync(out.fileno())
    return StoredFile(path.name, size, digest.hexdigest(), first, stop, seq_len)


def _read(folder: Path, file: StoredFile, sizes: list[int]) -> Iterator[bytearray]:
    """The file's parts in turn; its checksum is compared after the last one."""
    path, digest = folder / file.name, hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != file.bytes or sum(sizes) != file.bytes:
            raise SessionError(
                f"{shown(path)} has {size:,} bytes where the session needs {sum(sizes):,}: it is truncated"
            )
        with path.open("rb") as source:
            for count in sizes:
                part = bytearray(count)
                if source.readinto(part) != count:
                    raise SessionError(f"{shown(path)} ended early: it is truncated")
                digest.update(part)
                if source.tell() == file.bytes and digest.hexdigest() != file.sha256:
                    raise SessionError(
                        f"{shown(path)} is damaged (its checksum does not match): restore it from a copy"
                    )
                yield part
    except OSError as error:
        raise SessionError(f"{shown(path)} cannot be read ({error.strerror}): the session is incomplete") from error
