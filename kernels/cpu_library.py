"""A C++ source of this folder as a library: built once per machine with the compiler found there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from longrun.errors import InputError
from longrun.kernels.kept_library import load_kept_library
from longrun.paths import cache_dir as users_cache_dir

Built = TypeVar("Built")

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-std=c++17")
_TIMEOUT_S = 120


class KernelUnavailable(Exception):
    """The compiled kernels cannot be built or loaded on this machine; the message says why."""


def built_or_none(
    build: Callable[[Path | None], tuple[Built, list[str]]], without: str, notices: list[str]
) -> Built | None:
    """What `build` compiles for the CPU and keeps in a folder, or None; `notices` gets what is wrong, and `without`:
    what follows."""
    found: list[str] = []
    try:
        folder = users_cache_dir() / "kernels"
    except InputError as error:
        folder, found = None, [f"{error}: until then the CPU kernels are compiled at every start"]
    try:
        kernels, kept_notices = build(folder)
        found += kept_notices
    except KernelUnavailable as error:
        kernels = None
        found.append(f"compiled CPU kernels are off ({error}): {without}")
    notices += [notice for notice in found if notice not in notices]
    return kernels


def source_of(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


class CpuKernel:
    """A source of this folder, compiled. torch must be imported before, so that the library binds to the OpenMP runtime
    that torch loaded: one thread pool.

    Args:
        cache_dir: keeps the compiled library; None, or one that cannot: it is compiled for this process alone.
        more_flags: for the compiler, after its usual ones: to leave instructions out.

    Attributes:
        source: its name, without .cpp.
        notices: what was wrong with a kept library or its folder.

    Raises:
        KernelUnavailable: no compiler, or the build failed.
    """

    source: ClassVar[str]

    def __init__(self, cache_dir: Path | None, more_flags: tuple[str, ...] = ()) -> None:
        self._lib, self.notices = _load(self.source, cache_dir, more_flags)

    def _function(self, name: str, *types: type, returns: type | None = None) -> Callable[..., Any]:
        """A function of the library that takes these."""
        function = getattr(self._lib, name)
        function.argtypes, function.restype = types, returns
        return function


def _load(name: str, cache_dir: Path | None, more_flags: tuple[str, ...]) -> tuple[ctypes.CDLL, list[str]]:
    """The library of `name`.cpp, and the notices."""
    source = source_of(name)
    flags = (*_FLAGS, *more_flags)
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelUnavailable("no C++ compiler found (g++, clang++ or $CXX)")
    key = hashlib.sha256("\0".join((source.read_text(), compiler, *flags, _cpu_name())).encode()).hexdigest()[:16]

    def compile_to(path: Path) -> None:
        command = [compiler, *flags, "-o", str(path), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelUnavailable(f"building with {compiler} failed: {error}") from error
        if done.returncode:
            raise KernelUnavailable(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")

    try:
        return load_kept_library(f"{name}-{key}", cache_dir, compile_to)
    except OSError as error:
        raise KernelUnavailable(f"the compiled library cannot be loaded: {error}") from error


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
