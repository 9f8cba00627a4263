"""Turns the value of --model into a folder or file on this machine: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longrun.arguments import YARN
from longrun.errors import InputError, short_path
from longrun.hub.gguf_header import header_file
from longrun.hub.names import HubName, parse_name
from longrun.hub.repository import (
    CONFIG,
    HubUnreachable,
    cache_folder,
    cached_ggufs,
    cached_snapshot,
    fetch,
    has_tokenizer,
    list_files,
    meant_ggufs,
    missing_weights,
    needed_files,
    one_gguf,
)
from longrun.paths import path_option, user_path
from longrun.units import format_bytes

MODEL_HELP = "checkpoint folder, GGUF file, or name on the Hugging Face hub (user/repo, user/repo:Q4_K_M)"
DOWNLOAD_HELP = "fetch a --model of the Hugging Face hub that is not in the local cache, without asking"
YARN_HELP = (
    "stretch the trained window by YaRN, 4 for 32K to 128K, where the model's makers say so and the text is that long: "
    "short ones suffer a little"
)


def add_model_option(parser: argparse.ArgumentParser, default: str | None = "the demo model") -> None:
    """The options --model and --download.

    Args:
        default: what is taken without --model, in words; None requires it.
    """
    told = MODEL_HELP if default is None else f"{MODEL_HELP} (default: {default})"
    parser.add_argument("--model", required=default is None, type=path_option, metavar="DIR|NAME", help=told)
    add_download_option(parser)


def add_download_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option --download, for a caller with a --model of its own."""
    parser.add_argument("--download", action="store_true", help=DOWNLOAD_HELP)


def add_yarn_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option --yarn, for what loads the model with `longrun.load(yarn=)` or plans one."""
    parser.add_argument("--yarn", type=YARN, metavar="FACTOR", help=YARN_HELP)


def find_model(
    model: str | Path, download: bool = False, *, what: str = "--model", consent: str = "--download", ask: bool = True
) -> Path:
    """The checkpoint folder or GGUF file that `model` names.

    A path is returned as it is, whether it exists or not. A name on the hub is looked up in the local cache; what is
    not there is fetched: with `download`, or after a yes on a terminal, where the size is shown.

    Args:
        download: whether to fetch without asking.
        what: what messages call the argument; consent: how to say yes beforehand.
        ask: whether a person may be asked.

    Raises:
        InputError: neither a path nor a name; nobody agreed to the download.
        CheckpointError: the hub does not have it, cannot be reached, or the disk is full.
    """
    name = parse_name(model, what)
    if name is None:
        return user_path(model, what)
    folder = cached_snapshot(name.repo)
    found = None if folder is None else _in_cache(name, folder)
    if found is not None and (name.is_gguf or has_tokenizer(found)):
        return found
    try:
        sizes = list_files(name)
    except HubUnreachable:
        if found is None:
            raise
        told = f"longrun: {name} is used as far as the local Hugging Face cache holds it, without all of a tokenizer"
        print(f"{told}: the hub cannot be reached", file=sys.stderr)
        return found
    needed = needed_files(name, sizes)
    lacking = {file: sizes[file] for file in needed if folder is None or not (folder / file).is_file()}
    if not lacking and found is not None:
        return found
    if found is None and not download:  # small files other than the weights are fetched without asking
        _agree(name, sum(lacking.values()), ask, consent)
    print(f"longrun: fetching {name}, {format_bytes(sum(lacking.values()))}", file=sys.stderr, flush=True)
    folder = fetch(name, lacking)
    # A branch that moved meanwhile gave the folder of another commit: then everything, in one commit.
    if not all((folder / file).is_file() for file in needed):
        folder = fetch(name, {file: sizes[file] for file in needed})
    return folder / needed[0] if name.is_gguf else folder


def find_config(model: str | Path, what: str = "--model") -> Path:
    """Where the shape of `model` can be read: the folder of its config.json, which alone is fetched where it is not in
    the local cache, or a GGUF file, of which the header alone is.

    Raises:
        InputError, CheckpointError: as `find_model`.
    """
    name = parse_name(model, what)
    if name is None:
        return user_path(model, what)
    folder = cached_snapshot(name.repo)
    if name.is_gguf:
        found = None if folder is None else _in_cache(name, folder)
        return found or header_file(name)
    if folder is not None and (folder / CONFIG).is_file():
        return folder
    sizes = list_files(name)
    if CONFIG not in sizes:
        needed_files(name, sizes)  # says what there is instead
    return fetch(name, {CONFIG: sizes[CONFIG]})


def _in_cache(name: HubName, folder: Path) -> Path | None:
    """The folder or file where the local cache holds its weights."""
    if name.is_gguf:
        found = meant_ggufs(name, cached_ggufs(folder))
        return folder / one_gguf(name, found) if found else None
    return folder if (folder / CONFIG).is_file() and not missing_weights(folder) else None


def _agree(name: HubName, size: int, ask: bool, consent: str) -> None:
    """Ask on the terminal whether to fetch.

    Raises:
        InputError: there is no terminal, or the answer is no.
    """
    told = f"{name} is not in the local Hugging Face cache"
    if not (ask and sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(f"{told}: fetch its {format_bytes(size)} with {consent}, or name a checkpoint folder")
    print(f"{told} ({short_path(cache_folder())}).\nFetch {format_bytes(size)} from the hub? [y/N] ", end="",
          file=sys.stderr, flush=True)  # fmt: skip
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(f"{name} was not fetched: answer y, give {consent}, or name a checkpoint folder")
