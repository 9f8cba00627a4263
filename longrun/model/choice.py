"""What the options --model and --adapter mean together: the demo model comes with its adapter, any other with none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longrun.hub.find import find_model
from longrun.model.demo import demo_adapter, demo_model
from longrun.paths import user_path

NO_ADAPTER = "none"
"""As an adapter's folder: none, also where one would be taken by itself. (A folder of that name is `./none`.)"""

DEMO_CONTEXT = 32_000
"""Tokens that a chat makes room for where it took the demo model's adapter by itself and was asked for no context: the
adapter's own window is so long that room for it would take most of a small machine's memory."""


@dataclass(frozen=True)
class ModelChoice:
    """A model to load.

    Attributes:
        model_dir: checkpoint folder, or a GGUF file.
        adapter: adapter folder, or None.
        notice: a sentence for a person, where an adapter is used that nobody named.
    """

    model_dir: Path
    adapter: Path | None
    notice: str | None = None


def choose_model(model: str | Path | None, adapter: str | Path | None, download: bool = False) -> ModelChoice:
    """The model and the adapter to load.

    Args:
        model: checkpoint folder, or a name on the Hugging Face hub; None is the demo model, which is made where it is
            not there yet.
        adapter: adapter folder; "none" is no adapter; None is the one that ships for the demo model where that is
            loaded without being named, otherwise none.
        download: fetch a model of the hub without asking.

    Raises:
        CheckpointError: the demo model cannot be made, or its adapter is incomplete; the hub does not have the model.
        InputError: no path and no name on the hub, or nobody agreed to the download.
    """
    named = None if adapter is None or str(adapter) == NO_ADAPTER else user_path(adapter, "--adapter")
    if model is not None:
        return ModelChoice(find_model(model, download), named)
    shipped = demo_adapter() if adapter is None else None
    notice = None
    if shipped is not None:
        notice = f"the demo model is loaded with its adapter {shipped.name}: --adapter none leaves it out"
    return ModelChoice(demo_model(), shipped or named, notice)
