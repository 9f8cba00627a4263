"""The rooms of the sources: which modules stand in each, and what they may import.

The table is the one in docs/architecture.md, as `python tests/rooms.py` prints it; a test holds the two together.
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
            "longrun.errors",
            "longrun.arguments",
            "longrun.units",
            "longrun.paths",
            "longrun.pictures",
            "longrun.user_files",
            "longrun.cli",
            "longrun.folder_lock",
            "longrun.whole_file",
            "longrun.interrupts",
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
    Room("config", ("longrun.config", "longrun.config_*"), light=True),
    Room(
        "specs",
        ("longrun.cache.spec", "longrun.attention.spec", "longrun.model_bytes", "longrun.processor"),
        ("config", "formats"),
        light=True,
    ),
    Room(
        "plan",
        ("longrun.budget", "longrun.budgets", "longrun.placement", "longrun.plan", "longrun.plan_*"),
        ("specs", "config", "head maps", "formats"),
        ("rich",),
        light=True,
    ),
    Room("host memory", ("longrun.cache.host_memory",), packages=("psutil",)),
    Room(
        "cache",
        ("longrun.cache", "longrun.cache.*"),
        ("host memory", "kernels", "quant", "specs", "formats"),
        ("torch", "psutil"),
    ),
    Room(
        "text",
        (
            "longrun.encode_text",
            "longrun.text_encoder",
            "longrun.chat_template",
            "longrun.template_child",
            "longrun.text_stream",
            "longrun.turn_end",
        ),
        ("host memory",),
        ("tokenizers", "transformers", "jinja2"),
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
        ("attention interface", "quant", "text", "specs", "config", "formats"),
        ("torch", "numpy", "transformers", "huggingface_hub"),
    ),
    Room("sampling", ("longrun.sampling",), packages=("torch",)),
    Room(
        "engine",
        (
            "longrun.engine",
            "longrun.decode_graph",
            "longrun.session",
            "longrun.session_keeper",
            "longrun.store",
            "longrun.store_*",
            "longrun.synthetic_session",
            "longrun.token_ids",
        ),
        ("model", "attention", "attention interface", "cache", "plan", "sampling"),
        ("torch", "safetensors"),
    ),
    Room("documents", ("longrun.documents",), light=True),
    Room("needles", ("longrun.needles", "longrun.needle_words"), ("text",), ("transformers",)),
    Room("long tasks", ("longrun.long_tasks", "longrun.long_words"), ("text",), ("numpy", "transformers")),
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
        ),
        ("needles", "text", "documents", "model", "kernels", "config", "head map tools", "head maps"),
        ("torch", "transformers", "safetensors"),
    ),
    Room(
        "auto head map",
        ("longrun.auto_head_map",),
        ("trainers", "model", "cache", "host memory", "config", "head map tools", "head maps"),
        ("torch",),
    ),
    Room(
        "runtime",
        ("longrun.runtime", "longrun.backend", "longrun.gpu_checks", "longrun.memory_checks", "longrun.head_map_check"),
        (
            "auto head map",
            "engine",
            "text",
            "model",
            "attention",
            "cache",
            "host memory",
            "kernels",
            "plan",
            "specs",
            "config",
            "head maps",
        ),
        ("torch", "transformers", "psutil"),
    ),
    Room(
        "chat",
        (
            "longrun.chat",
            "longrun.chat_*",
            "longrun.answer",
            "longrun.conversation",
            "longrun.progress",
            "longrun.report",
        ),
        ("documents", "text", "runtime", "auto head map", "engine", "model", "plan", "sampling", "formats"),
        ("rich", "transformers"),
    ),
    Room(
        "results",
        ("longrun.report_env", "longrun.needle_results", "longrun.needle_report"),
        packages=("rich", "matplotlib", "torch"),
    ),
    Room(
        "patterns command",
        ("longrun.patterns.__main__",),
        ("trainers", "head map tools", "head maps"),
        ("rich",),
    ),
    Room(
        "planted",
        ("longrun.planted", "longrun.planted_*", "longrun.shard_writer"),
        ("needles", "head maps"),
        ("torch", "tokenizers"),
    ),
    Room(
        "quality",
        ("longrun.quality", "longrun.quality.*"),
        ("needles", "text", "runtime", "engine", "attention", "cache", "quant", "head maps", "formats"),
        ("torch", "numpy", "matplotlib", "transformers"),
    ),
    Room("package", ("longrun",), ("runtime", "engine", "plan", "head maps"), light=True),
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
