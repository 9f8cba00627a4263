"""Large files in parts, and back."""

from __future__ import annotations

import os

import pytest

from longrun.errors import InputError
from scripts.training import file_parts


def test_parts_join_to_the_same_file(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(os.urandom(10_000))
    parts = file_parts.split(file, tmp_path / "parts", 4096)
    assert [part.stat().st_size for part in parts] == [4096, 4096, 1808]
    file_parts.join(tmp_path / "parts", "model.bin", tmp_path / "there" / "model.bin")
    assert (tmp_path / "there" / "model.bin").read_bytes() == file.read_bytes()
    parts[1].write_bytes(b"x" * 4096)
    with pytest.raises(InputError, match="not what was split"):
        file_parts.join(tmp_path / "parts", "model.bin", tmp_path / "there" / "other.bin")
    parts[2].unlink()
    with pytest.raises(InputError, match="bring all"):
        file_parts.join(tmp_path / "parts", "model.bin", tmp_path / "there" / "other.bin")
    assert [path.name for path in (tmp_path / "there").iterdir() if not path.name.startswith(".")] == ["model.bin"]
