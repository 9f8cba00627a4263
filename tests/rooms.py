"""The rooms of the sources: which modules stand in each, and what they may import.

The table is the one in docs/architecture.md, as `python tests/rooms.py` prints it; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "triton"}


@dataclass(frozen=True)
class Room:
    """Modules that may import the same things.

    Attributes:
        modules: patterns of module names; a module belongs to the first room of the table that has a matching one.
        rooms: rooms it may import; `base` and itself always.
        packages: packages of others that it may import.
        light: importing any of its modules, and calling into it, must not load one of `HEAVY`.
    """

    name: str
    modules: tuple[str, ...]
    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    light: bool = False


ROOMS = (
    Room(
        "base",
        (
            "longrun.allocation",
            "longrun.arguments",
            "longrun.cli",
            "longrun.errors",
            "longrun.files",
            "longrun.files.*",
            "longrun.interrupts",
            "longrun.paths",
            "longrun.pictures",
            "longrun.units",
        ),
        light=True,
    ),
    Room("formats", ("longrun.quant.*_format",), light=True),
    Room("weight kernels", ("longrun.kernels.weight_dequantize",), ("formats",), ("torch", "triton")),
    Room("quant", ("longrun.quant.*",), ("weight kernels", "formats"), ("torch", "bitsandbytes")),
    Room("kernels", ("longrun.kernels.*",), ("quant", "formats"), ("torch", "triton")),
    Room(
        "head maps",
        (
            "longrun.patterns.head_map",
            "longrun.patterns.head_map_folder",
            "longrun.patterns.head_split",
            "longrun.patterns.reach_allocation",
            "longrun.patterns.reach_losses",
            "longrun.patterns.baseline_maps",
        ),
        light=True,
    ),
    Room(
        "head map tools",
        (
            "longrun.patterns.head_map_picture",
            "longrun.patterns.head_map_table",
            "longrun.patterns.compare_maps",
            "longrun.patterns.identify_settings",
            "longrun.patterns.identify_progress",
        ),
        ("head maps",),
        ("rich", "matplotlib"),
        light=True,
    ),
    Room("config", ("longrun.config", "longrun.config.*"), packages=("gguf",), light=True),
    Room("hub", ("longrun.hub", "longrun.hub.*"), packages=("huggingface_hub",), light=True),
    Room(
        "machine",
        ("longrun.machine", "longrun.machine.host_memory", "longrun.machine.processor", "longrun.machine.speeds"),
        packages=("psutil",),
        light=True,
    ),
    Room("measuring", ("longrun.machine.measure",), ("machine",), ("torch",)),
    Room("specs", ("longrun.specs", "longrun.specs.*"), ("machine", "config", "formats"), light=True),
    Room(
        "plan",
        ("longrun.plan", "longrun.plan.*"),
        ("specs", "machine", "hub", "config", "head maps", "formats"),
        ("rich",),
        light=True,
    ),
    Room(
        "cache",
        ("longrun.cache", "longrun.cache.*"),
        ("machine", "kernels", "quant", "specs", "formats"),
        ("torch", "numpy"),
    ),
    Room(
        "documents",
        ("longrun.documents", "longrun.documents.*"),
        packages=("pathspec", "markdownify", "pypdf"),
        light=True,
    ),
    Room(
        "text", ("longrun.text", "longrun.text.*"), ("machine",), ("tokenizers", "transformers", "jinja2", "llguidance")
    ),
    Room("attention interface", ("longrun.attention.interface",), packages=("torch",)),
    Room(
        "attention",
        ("longrun.attention", "longrun.attention.*"),
        ("attention interface", "cache", "kernels", "quant", "specs", "formats"),
        ("torch", "numpy"),
    ),
    Room(
        "model",
        ("longrun.model", "longrun.model.*"),
        ("attention interface", "quant", "text", "specs", "hub", "config", "formats"),
        ("torch", "numpy", "gguf", "tokenizers", "transformers", "huggingface_hub"),
    ),
    Room(
        "engine",
        ("longrun.engine", "longrun.engine.*"),
        ("model", "attention", "attention interface", "cache", "specs"),
        ("torch",),
    ),
    Room(
        "session",
        ("longrun.session", "longrun.session.*"),
        ("engine", "cache", "plan", "specs"),
        ("torch", "safetensors"),
    ),
    Room("needles", ("longrun.needles", "longrun.needles.*"), ("text",), ("transformers",)),
    Room(
        "trainers",
        (
            "longrun.patterns.identify",
            "longrun.patterns.identify_checkpoint",
            "longrun.patterns.gates",
            "longrun.patterns.gate_texts",
            "longrun.patterns.gated_attention",
            "longrun.patterns.reconstruction",
            "longrun.patterns.reconstruction_*",
            "longrun.patterns.reach",
            "longrun.patterns.reach_measure",
        ),
        (
            "attention",
            "attention interface",
            "specs",
            "needles",
            "text",
            "documents",
            "model",
            "kernels",
            "hub",
            "config",
            "head map tools",
            "head maps",
        ),
        ("torch", "transformers", "safetensors"),
    ),
    Room(
        "runtime",
        ("longrun.runtime", "longrun.runtime.*"),
        (
            "trainers",
            "session",
            "engine",
            "documents",
            "text",
            "model",
            "attention",
            "cache",
            "kernels",
            "plan",
            "machine",
            "specs",
            "hub",
            "config",
            "head map tools",
            "head maps",
            "formats",
        ),
        ("torch", "transformers", "psutil"),
    ),
    Room(
        "chat",
        ("longrun.chat", "longrun.chat.*"),
        ("runtime", "session", "engine", "documents", "text", "model", "plan", "measuring", "specs", "hub", "formats"),
        ("rich", "prompt_toolkit", "transformers"),
    ),
    Room(
        "server",
        ("longrun.server", "longrun.server.*"),
        ("runtime", "session", "engine", "documents", "text", "model", "plan", "specs", "head maps"),
        (
            "rich",
            "transformers",
            "pydantic",
            "fastapi",
            "starlette",
            "anyio",
            "sse_starlette",
            "uvicorn",
            "prometheus_client",
        ),
    ),
    Room(
        "patterns command",
        ("longrun.patterns.__main__",),
        ("trainers", "hub", "head map tools", "head maps"),
        ("rich",),
    ),
    Room(
        "lab",
        ("longrun.lab", "longrun.lab.*"),
        (
            "chat",
            "runtime",
            "session",
            "engine",
            "needles",
            "text",
            "attention",
            "attention interface",
            "cache",
            "kernels",
            "quant",
            "specs",
            "config",
            "head maps",
            "formats",
        ),
        ("torch", "numpy", "matplotlib", "rich", "tokenizers", "transformers"),
    ),
    Room("package", ("longrun",), ("runtime", "session", "plan", "head maps"), light=True),
)


def room_of(module: str) -> Room | None:
    return next((room for room in ROOMS if any(fnmatchcase(module, pattern) for pattern in room.modules)), None)


def table() -> str:
    """The table of rooms as docs/architecture.md prints it."""
    lines = ["| room | modules | may import | packages |", "|---|---|---|---|"]
    for room in ROOMS:
        modules = ", ".join(f"`{name.removeprefix('longrun.')}`" for name in room.modules)
        allowed = ", ".join(room.rooms) or "-"
        packages = ", ".join(room.packages) or "-"
        lines.append(f"| {room.name}{' (light)' if room.light else ''} | {modules} | {allowed} | {packages} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
