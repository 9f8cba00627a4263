"""What decides a map that is measured here: settings, their defaults by method and device; progress, ranks as scores.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longrun.arguments import MAX_SEED, integer, number
from longrun.errors import InputError, quoted
from longrun.paths import user_path
from longrun.patterns.head_split import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, check_window
from longrun.patterns.reach_losses import ReachLosses

METHODS = ("gates", "reconstruction", "reach")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16")

DEFAULTS: Mapping[tuple[str, str], Mapping[str, int]] = {
    ("gates", "cpu"): {"context": 1024, "min_context": 512, "steps": 80},
    ("gates", "cuda"): {"context": 32768, "min_context": 1024, "steps": 400},
    ("reconstruction", "cpu"): {"context": 1024, "min_context": 1024, "steps": 2},
    ("reconstruction", "cuda"): {"context": 16384, "min_context": 16384, "steps": 4},
    ("reach", "cpu"): {"context": 8192, "min_context": 8192, "steps": 1},
    ("reach", "cuda"): {"context": 32768, "min_context": 32768, "steps": 1},
}
"""By (method, device). `gates`: training steps on contexts drawn between min_context and context. `reconstruction`:
texts of `context` tokens that are read and repeated, one a step; `reach`: texts that are read; min_context is not
used."""

FIRST_PROMPT = "\n\nRepeat the previous context exactly.\n\n"
NEXT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with: "
"""What asks a model to repeat what it has read, in the methods without training."""

SHORTEST_CONTEXT = 128
LEARNING_RATE = 0.02
SHORTEST_WAY = 1.6
"""The least steps * highest learning rate: with warm-up and decay about 1.3, by which a gate can move in all."""


@dataclass(frozen=True)
class IdentifySettings:
    """What to measure, and how. None stands for a default that `resolved` fills in by method and device.

    Attributes:
        model_dir: checkpoint folder (config.json, safetensors, tokenizer).
        adapter: folder of a LoRA adapter that is merged into the checkpoint first: model and adapter are measured.
        yarn: factor by which the model's window is stretched, or None; see `ModelConfig.stretched`.
        out: folder for the map; `out` + ".partial" holds the progress of an unfinished run.
        method: "gates" (trained, patterns/gates.py), "reconstruction" (scored, patterns/reconstruction.py) or "reach"
            (losses by reach, patterns/reach.py).
        sink_size, recent_size: the window of a streaming head: positions < sink_size and the last recent_size tokens,
            itself included.
        context: longest text in tokens, pass keys and questions included; at least 128.
        min_context: shortest one (gates).
        steps: training steps, or texts to score.
        seed: decides the texts, their places and everything drawn.
        text_files: UTF-8 text files to read instead of the default text.
        device: "cpu" or "cuda".
        dtype: of weights and activations, "float32" or "bfloat16"; gates and scores are float32 always.
        learning_rate: of the gates, AdamW's highest: 0.02, or 1.6 / steps in runs so short that a gate could not get
            from 1 to 0 otherwise.
        regularization: weight of mean |gate| in the gates' loss.
        num_keys: pass keys a text (gates), fewer where the text is too short for them.
        save_every: steps between two writings of the progress.
        force: overwrite another map, and drop the progress of other settings.
    """

    model_dir: str
    out: str
    method: str = "gates"
    sink_size: int = DEFAULT_SINK_SIZE
    recent_size: int = DEFAULT_RECENT_SIZE
    context: int | None = None
    min_context: int | None = None
    steps: int | None = None
    seed: int = 0
    text_files: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    learning_rate: float | None = None
    regularization: float = 0.05
    num_keys: int = 10
    save_every: int = 5
    force: bool = False
    adapter: str | None = None
    yarn: float | None = None

    def resolved(self, cuda_available: bool) -> IdentifySettings:
        """The same settings with every None filled in.

        Raises:
            InputError: an unknown method, device or dtype, no GPU for "cuda", or a number out of its range.
            HeadMapError: sink_size < 0 or recent_size < 1.
        """
        device = self.device or ("cuda" if cuda_available else "cpu")
        dtype = self.dtype or ("bfloat16" if device == "cuda" else "float32")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("device", device, DEVICES),
            ("dtype", dtype, DTYPES),
        ):
            if value not in known:
                raise InputError(f"{name} {quoted(value)} is unknown: use {' or '.join(known)}")
        if device == "cuda" and not cuda_available:
            raise InputError("device cuda was asked for and torch finds no GPU: use --device cpu")
        check_window(self.sink_size, self.recent_size, "identify")
        defaults = DEFAULTS[self.method, device]
        context = defaults["context"] if self.context is None else self.context
        min_context = min(defaults["min_context"], context) if self.min_context is None else self.min_context
        steps = defaults["steps"] if self.steps is None else self.steps
        for name, value, least in (
            ("context", context, SHORTEST_CONTEXT),
            ("min_context", min_context, SHORTEST_CONTEXT),
            ("steps", steps, 1),
            ("num_keys", self.num_keys, 1),
            ("save_every", self.save_every, 1),
        ):
            integer(value, name, least)
        integer(self.seed, "seed", 0, MAX_SEED)
        if min_context > context:
            raise InputError(f"min_context {min_context:,} is longer than context {context:,}: give a shorter one")
        rate = max(LEARNING_RATE, SHORTEST_WAY / steps) if self.learning_rate is None else self.learning_rate
        number(rate, "learning rate", 0, above=True)
        number(self.regularization, "regularization", 0)
        folders = {
            "model_dir": str(user_path(self.model_dir, "model folder")),
            "out": str(user_path(self.out, "head map folder")),
            "adapter": None if self.adapter is None else str(user_path(self.adapter, "adapter")),
            "text_files": tuple(str(user_path(name, "text")) for name in self.text_files),
        }
        return replace(
            self,
            **folders,
            context=context,
            min_context=min_context,
            steps=steps,
            device=device,
            dtype=dtype,
            learning_rate=rate,
        )

    def deciding(self) -> dict[str, Any]:
        """What decides the result, as JSON types: all but where it is written and when it is saved.

        The folders of model and adapter and the text's files are left out: their fingerprints stand for them.
        """
        data = asdict(self)
        for name in ("model_dir", "adapter", "out", "text_files", "save_every", "force"):
            del data[name]
        if self.yarn is None:  # as in maps of before
            del data["yarn"]
        return data


@dataclass(frozen=True)
class IdentifyProgress:
    """Where a run is.

    Attributes:
        step, num_steps: steps finished and in all.
        loss: of the last step, where the method has one.
        num_low: heads that score below 0.5 now.
        num_heads: all heads.
        tokens: tokens of the last step's text.
    """

    step: int
    num_steps: int
    loss: float | None = None
    num_low: int | None = None
    num_heads: int | None = None
    tokens: int | None = None


OnProgress = Callable[[IdentifyProgress], None]


@dataclass(frozen=True)
class MethodResult:
    """What a method found.

    Attributes:
        scores: [num_layers][num_kv_heads], clipped to [0, 1] when the map is made.
        facts: JSON types for the `identification` of the map's config.json, such as the last losses.
        reach_losses: of method "reach".
        notices: sentences that a person should be shown.
    """

    scores: Sequence[Sequence[float]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    reach_losses: ReachLosses | None = None
    notices: tuple[str, ...] = ()


def rank_scores(raw: Sequence[Sequence[float]]) -> list[list[float]]:
    """Raw scores [num_layers][num_kv_heads] by rank: 1 for the best head down to 0, evenly spaced and all different.

    Ties go to the lower (layer, head). A threshold t so keeps the 1 - t best heads, as a retrieval ratio does.
    """
    order = sorted((-score, layer, head) for layer, row in enumerate(raw) for head, score in enumerate(row))
    ranked = [[0.0] * len(row) for row in raw]
    for place, (_, layer, head) in enumerate(order):
        ranked[layer][head] = 1.0 - place / max(1, len(order) - 1)
    return ranked
