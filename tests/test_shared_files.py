"""Files that several processes may want at once: whole or not at all, one owner, no trace of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longrun.errors import HeadMapError, InputError
from longrun.files.whole_file import fresh_path, leftovers, write_whole
from longrun.lab.needle_results import RESULTS_FILE, SweepResults
from longrun.lab.quality.results import QualityResults
from longrun.patterns.head_map import HeadMap

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"first")
    write_whole(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second" and names(tmp_path) == ["a"]

    def fails(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)
    assert path.read_bytes() == b"second" and names(tmp_path) == ["a"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    (tmp_path / "a").symlink_to(outside)
    write_whole(tmp_path / "a", b"new")
    assert outside.read_text() == "years of work" and not (tmp_path / "a").is_symlink()


def test_leftovers_are_those_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    mine, aside = fresh_path(path), fresh_path(path, "old")
    for left in (mine, aside, fresh_path(tmp_path / "b"), tmp_path / ".a.new", tmp_path / ".a.0123.new"):
        left.touch()
    assert leftovers(path) == [mine] and leftovers(path, "old") == [aside]
    assert leftovers(tmp_path / "nowhere" / "a") == []


@pytest.mark.parametrize("aside", [True, False])
def test_a_head_map_whose_writer_was_killed_is_taken_back(tmp_path: Path, aside: bool) -> None:
    """Between the two renames the map stands under another name; before them only a new folder lies about."""
    target, first, second = tmp_path / "map", HeadMap.full(2, 2), HeadMap.uniform(2, 2, 0.5)
    first.save(target)
    (target / "notes.txt").write_text("mine")
    if aside:
        target.rename(fresh_path(target, "old"))
    fresh_path(target).mkdir()
    second.save(target, force=True)
    assert HeadMap.load(target) == second and (target / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["map"]


def test_what_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from longrun.errors import LongrunError;"
        "from longrun.files.folder_lock import FolderLock;"
        "locks = [FolderLock(Path(name), 'it', LongrunError, 'wait', 'no') for name in sys.argv[1:]];"
        "print(flush=True); time.sleep(60)"
    )
    owned = [tmp_path / ".map.lock", tmp_path / "sweep" / f".{RESULTS_FILE}.lock"]
    other = subprocess.Popen([sys.executable, "-c", code, *map(str, owned)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        said = rf"in use by process {other.pid} on"
        with pytest.raises(HeadMapError, match=said):
            HeadMap.full(2, 2).save(tmp_path / "map")
        with pytest.raises(InputError, match=said):
            SweepResults.open(tmp_path / "sweep", {}, force=True)
        with pytest.raises(InputError, match=said):
            QualityResults.open(tmp_path / "sweep", {}, [], force=True)
    finally:
        other.kill()
        other.communicate()
    HeadMap.full(2, 2).save(tmp_path / "map")
    SweepResults.open(tmp_path / "sweep", {}).write()


def test_results_are_one_run_s_until_it_ends(tmp_path: Path) -> None:
    (tmp_path / f".{RESULTS_FILE}.0123456789ab.new").write_text("half")
    results = SweepResults.open(tmp_path, {"seed": 0})
    with pytest.raises(InputError, match="in use by another owner in this process"):
        SweepResults.open(tmp_path, {"seed": 0})
    results.write()
    del results
    assert names(tmp_path) == [RESULTS_FILE]
    with pytest.raises(InputError, match="seed"):
        SweepResults.open(tmp_path, {"seed": 1})
    SweepResults.open(tmp_path, {"seed": 0})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HeadMapError, match="cannot be written"):
            HeadMap.full(2, 2).save(tmp_path / "map")
    finally:
        tmp_path.chmod(0o700)
