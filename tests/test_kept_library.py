"""A compiled library is code: loaded only where nobody else could have written it and no byte of it changed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longrun.kernels.kept_library import load_kept_library

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.cpp").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "a.so", folder / "a.cpp"], check=True)
    return folder / "a.so"


class Compiler:
    def __init__(self, built: Path) -> None:
        self.built, self.runs = built, 0

    def __call__(self, path: Path) -> None:
        self.runs += 1
        shutil.copy(self.built, path)


@pytest.fixture
def compiler(built) -> Compiler:
    return Compiler(built)


def load(folder: Path | None, compiler: Compiler, name: str = "a-0") -> list[str]:
    library, notices = load_kept_library(name, folder, compiler)
    assert isinstance(library, ctypes.CDLL) and library.answer() == 42
    return notices


def test_compiled_once_and_found_again(tmp_path, compiler):
    folder = tmp_path / "kernels"
    assert load(folder, compiler) == [] and load(folder, compiler) == []
    assert compiler.runs == 1 and folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"], "nothing else is left behind"
    load(folder, compiler, "a-1")
    assert compiler.runs == 2 and len(list(folder.iterdir())) == 2


def replaced(path: Path, content: bytes) -> None:
    """As another file: the one that this process has loaded must not change under it."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o700)


def torn(path: Path) -> None:
    replaced(path, path.read_bytes()[:100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replaced(path, bytes(data))


def group_writable(path: Path) -> None:
    path.chmod(0o775)


def given_away(path: Path) -> None:
    os.chown(path, 12345, 12345)


def linked_outside(path: Path) -> None:
    outside = path.parent.parent / "outside.so"
    shutil.move(path, outside)
    outside.chmod(0o777)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (torn, "is damaged"),
        (flipped, "is damaged"),
        (group_writable, "may be written by others"),
        (linked_outside, "may be written by others"),
        (given_away, "belongs to user 12345"),
    ],
)
def test_what_is_off_is_compiled_anew_with_a_notice(tmp_path, compiler, damage, words):
    if damage is given_away and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    load(tmp_path / "kernels", compiler)
    (kept,) = (tmp_path / "kernels").iterdir()
    damage(kept)
    (notice,) = load(tmp_path / "kernels", compiler)
    assert words in notice and "compiled again" in notice and str(kept) in notice
    assert compiler.runs == 2 and load(tmp_path / "kernels", compiler) == [] and compiler.runs == 2


def test_a_folder_of_ours_that_others_may_write_is_closed_and_one_of_another_user_not_used(tmp_path, compiler):
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert load(folder, compiler) == [] and folder.stat().st_mode & 0o022 == 0
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        (notice,) = load(folder, compiler)
        assert "belongs to user 12345" in notice and "compiled at every start" in notice and compiler.runs == 2


def test_without_a_folder_it_is_compiled_for_this_process(tmp_path, compiler, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "kernels", tmp_path / "file"):
        notices = load(folder, compiler)
        assert len(notices) == (folder is not None) and all("compiled at every start" in one for one in notices)
    assert compiler.runs == 3 and not list(scratch.iterdir())


def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(tmp_path, built):
    code = (
        "import sys, shutil, pathlib\nfrom longrun.kernels.kept_library import load_kept_library\n"
        f"library, notices = load_kept_library('a-0', pathlib.Path({str(tmp_path / 'k')!r}), "
        f"lambda path: shutil.copy({str(built)!r}, path))\nassert library.answer() == 42 and not notices, notices"
    )
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
