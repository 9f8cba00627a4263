"""Host memory that is available: within the limits of the containers around, and without any."""

import psutil
import pytest

from longrun.machine import host_memory

STAT = "anon 5\ninactive_file 300\nactive_file 200\ntotal_inactive_file 300\ntotal_active_file 200\n"


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/a/b\n", "a", ("memory.max", "memory.current")),
        ("4:cpu,memory:/a/b\n0::/\n", "memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/host/path/not/mounted/here\n", "", ("memory.max", "memory.current")),
    ],
)
def test_a_container_leaves_its_limit_less_its_usage(tmp_path, monkeypatch, own, folder, names):
    """The group above the own one counts too; file cache gives way; a group without a limit says `max`."""
    (tmp_path / "own").write_text(own)
    group = tmp_path / "mount" / folder
    (group / "b").mkdir(parents=True)
    for place, limit in ((group, "10000"), (group / "b", "max")):
        (place / names[0]).write_text(limit + "\n")
        (place / names[1]).write_text("1500\n")
        (place / "memory.stat").write_text(STAT)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "mount")
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory.available_bytes() == 10000 - (1500 - 500)
    (group / names[0]).write_text("900")
    assert host_memory.available_bytes() == 0
    (group / names[0]).write_text("max")
    assert host_memory.available_bytes() > 10**6


def test_the_mark_above_which_a_container_is_throttled_counts(tmp_path, monkeypatch):
    for name, value in (("max", "10000"), ("high", "7000"), ("current", "1500"), ("stat", STAT)):
        (tmp_path / f"memory.{name}").write_text(value)
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory.available_bytes() == 7000 - 1000


def test_a_limit_above_what_is_mounted_counts(tmp_path, monkeypatch):
    """Version 1 says in every group what the groups above allow."""
    group = tmp_path / "memory"
    group.mkdir()
    for name, value in (("limit_in_bytes", "9000"), ("usage_in_bytes", "1500")):
        (group / f"memory.{name}").write_text(value)
    (group / "memory.stat").write_text(STAT + "hierarchical_memory_limit 4000\n")
    (tmp_path / "own").write_text("4:memory:/docker/abc\n")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "own")
    assert host_memory.available_bytes() == 4000 - 1000


def test_without_cgroups_psutil_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 12345})())
    assert host_memory.available_bytes() == 12345
