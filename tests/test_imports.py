"""Import directions: every module belongs to a room, and a room imports only rooms below it.

The table is in rooms.py. What is planned without torch is checked twice: by following imports through the sources, and
by importing it in a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from import_directions import LINKED, ROOT, circles, direction_violations, heavy_chains, project_sources
from rooms import HEAVY, ROOMS, room_of, table


def test_every_module_has_a_room_and_imports_only_what_the_table_allows() -> None:
    sources = project_sources()
    assert {
        "longrun",
        "longrun.quant.page_codec",
        "longrun.kernels.page_view",
        "longrun.runtime.runtime",
    } <= sources.keys()
    assert direction_violations(sources) == []


def test_planning_does_not_reach_torch_through_any_chain_of_imports() -> None:
    assert heavy_chains(project_sources()) == []


def test_the_table_only_points_down_and_holds_no_empty_room() -> None:
    modules = project_sources()
    for position, room in enumerate(ROOMS):
        below = {other.name for other in ROOMS[:position]}
        assert set(room.rooms) <= below, f"{room.name} imports a room that stands above it"
        assert any(room_of(module) is room for module in modules), f"no module is in room {room.name}"
        if room.light:
            assert not HEAVY & set(room.packages), room.name


def test_light_modules_load_no_heavy_package_in_a_fresh_process() -> None:
    light = [m for m in sorted(project_sources()) if (room := room_of(m)) and room.light and "__main__" not in m]
    assert "longrun.plan.command" in light
    code = f"import sys\nfor name in {light!r}: __import__(name)\nprint(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_linked_rooms_are_no_top_level_packages() -> None:
    """An `__init__.py` would make `kernels` a top-level package that hides the library of that name."""
    for name in LINKED:
        link = ROOT / "longrun" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert not list((ROOT / name).rglob("__init__.py"))


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert table() in text, f"put this table into docs/architecture.md:\n{table()}"


def test_no_modules_import_each_other() -> None:
    sources = project_sources()
    assert circles(sources) == []
    made_up = {
        "longrun.a": "import longrun.b",
        "longrun.b": "def later():\n    from longrun.c import x",
        "longrun.c": "",
    }
    assert circles(made_up) == []
    made_up["longrun.c"] = "if TYPE_CHECKING:\n    from longrun.a import y"
    assert circles(made_up) == ["longrun.a and longrun.b and longrun.c import each other"]
