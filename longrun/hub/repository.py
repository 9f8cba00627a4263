"""A model's repository on the Hugging Face hub: what it holds, what of it a run needs, and what is in the local cache.

Functions of huggingface_hub do the work, with its cache, its login and its environment variables.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from longrun.errors import CheckpointError, LongrunError, short_path, shortened
from longrun.files.user_files import read_object
from longrun.hub.names import HubName, has_tag
from longrun.units import format_bytes

CONFIG = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS, _SETTINGS = ("tokenizer.json", "tokenizer.model", "vocab.json"), "tokenizer_config.json"
_BESIDE = (
    CONFIG, "generation_config.json", *_TOKENIZERS, _SETTINGS, "special_tokens_map.json",
    "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TIMEOUT = 15.0  # seconds for the list of files


class HubUnreachable(CheckpointError):
    """There is no network, or the hub does not answer."""


def cached_snapshot(repo: str) -> Path | None:
    """Folder in the local cache that holds the files of the repository's main branch fetched so far, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def missing_weights(folder: Path) -> list[str]:
    """Files of safetensors weights that `folder` lacks; the index where it holds neither that nor weights in one file.

    Raises:
        CheckpointError: an index that cannot be used.
    """
    if (folder / _SINGLE).is_file():
        return []
    if not (folder / _INDEX).is_file():
        return [_INDEX]
    return [file for file in _shards(folder / _INDEX) if not (folder / file).is_file()]


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's vocabulary and settings are there."""
    return (folder / _SETTINGS).is_file() and any((folder / name).is_file() for name in _TOKENIZERS)


def cached_ggufs(folder: Path) -> list[str]:
    """Paths within `folder` of the GGUF files there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.is_file())


def list_files(name: HubName) -> dict[str, int]:
    """Bytes of every file of the repository's main branch, by path, as the hub says.

    Raises:
        CheckpointError: the hub cannot be reached, or the repository cannot be read.
    """
    from huggingface_hub import HfApi

    with hub_errors(name):
        info = HfApi().model_info(name.repo, files_metadata=True, timeout=_TIMEOUT)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def needed_files(name: HubName, files: Mapping[str, int]) -> list[str]:
    """The files that a run needs of those that a repository holds: a GGUF file, or config, tokenizer and weights.

    An index of weights in several files is fetched, so that it can say which.

    Raises:
        CheckpointError: the repository does not hold what is asked for.
    """
    if name.is_gguf:
        return [one_gguf(name, files)]
    beside = [file for file in _BESIDE if file in files]
    if CONFIG in files and _SINGLE in files:
        return [*beside, _SINGLE]
    if CONFIG in files and _INDEX in files:
        shards = _shards(fetch(name, {_INDEX: files[_INDEX]}) / _INDEX)
        absent = [file for file in shards if file not in files]
        if absent:
            raise CheckpointError(f"{name} on the Hugging Face hub lacks {shortened(absent[0])}, which its index names")
        return [*beside, _INDEX, *shards]
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(
            f"{name} on the Hugging Face hub holds GGUF files only: name one of them, like "
            f"{name.repo}/{shortened(ggufs[0])}"
        )
    raise CheckpointError(
        f"{name} on the Hugging Face hub holds no checkpoint in safetensors ({CONFIG} with {_SINGLE} or {_INDEX}): "
        f"name another repository"
    )


def one_gguf(name: HubName, files: Collection[str]) -> str:
    """The GGUF file that `name` means among these paths.

    Raises:
        CheckpointError: none of them, or several.
    """
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    found = meant_ggufs(name, ggufs)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{name} means {shortened(', '.join(found))}: name one file, like {name.repo}/{found[0]}")
    held = shortened(", ".join(ggufs), 200) if ggufs else "no GGUF file"
    raise CheckpointError(f"there is no such GGUF file as {name} on the Hugging Face hub; {name.repo} holds {held}")


def meant_ggufs(name: HubName, files: Iterable[str]) -> list[str]:
    """Those of the paths that `name` can mean."""
    return [file for file in files if (file == name.file if name.tag is None else has_tag(file, name.tag))]


def fetch(name: HubName, files: Mapping[str, int]) -> Path:
    """Fetch these files (path: bytes) into the local cache, with progress on a terminal; returns their folder.

    Raises:
        CheckpointError: the disk is too full, the hub cannot be reached or refuses, or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    _check_space(name, sum(files.values()))
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        with hub_errors(name):
            folder = Path(snapshot_download(name.repo, allow_patterns=[glob.escape(file) for file in files]))
    finally:
        if quiet:
            enable_progress_bars()
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(f"{name}: {shortened(absent[0])} did not arrive from the Hugging Face hub: try again")
    return folder


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched ($HF_HUB_CACHE, $HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextlib.contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Whatever goes wrong with the hub, as one sentence about `name`.

    Raises:
        CheckpointError: in place of every error of huggingface_hub, of the network and of the file system.
    """
    from huggingface_hub import errors

    http_error = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub uses
    try:
        yield
    except LongrunError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is gated on the Hugging Face hub: accept its terms on its page there, then log in "
            f"(`hf auth login`, or a token in $HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is neither a path {name} here nor a repository {name.repo} on the Hugging Face hub (or it is "
            f"private: log in with `hf auth login`): check the name"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(name, error.__cause__ or error) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"a file of {name} is gone from the Hugging Face hub: try again") from None
    except errors.HFValidationError:
        raise CheckpointError(
            f"there is no path {name} here, and it is no name that the Hugging Face hub allows: check it"
        ) from None
    except (http_error, ConnectionError, TimeoutError) as error:
        raise _unreachable(name, error) from None
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(name, f"{short_path(cache_folder())} is full") from None
        raise CheckpointError(
            f"{name} cannot be fetched into {short_path(cache_folder())} ({shortened(error)}): try again, or set "
            f"HF_HOME to a folder that can be written"
        ) from None


def _unreachable(name: HubName, error: BaseException) -> HubUnreachable:
    from huggingface_hub.errors import OfflineModeIsEnabled

    first_line = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        first_line = "HF_HUB_OFFLINE is set"
    return HubUnreachable(
        f"there is no path {name} here, it is not (wholly) in the local Hugging Face cache, and the hub cannot be "
        f"reached ({shortened(first_line)}): fetch it where there is a network, or name a checkpoint folder or GGUF "
        f"file"
    )


def _check_space(name: HubName, size: int) -> None:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.isdir(parent))
    free = shutil.disk_usage(existing).free
    if size > free:
        raise _no_space(
            name, f"{short_path(folder)} has {format_bytes(free)} free, and {format_bytes(size)} are needed"
        )


def _no_space(name: HubName, what: str) -> CheckpointError:
    return CheckpointError(f"{name} cannot be fetched: {what}; make room, or set HF_HOME to a folder of a larger disk")


def _shards(index: Path) -> list[str]:
    weight_map = read_object(index, CheckpointError, "fetch it again").get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not files or not all(isinstance(file, str) and os.path.basename(file) == file for file in files):
        raise CheckpointError(f"{short_path(index)} cannot be used (weight_map names no files of this folder)")
    return sorted(files)
