"""Whether a head map was made for the model that runs with it. A map of the same shape fits any model, silently."""

from __future__ import annotations

from pathlib import Path

from longrun.model.fingerprint import model_fingerprint, weights_fingerprint
from longrun.patterns.head_map import HeadMap


def other_model_notices(head_map: HeadMap, fingerprint: str, model_dir: Path, adapter: Path | None) -> tuple[str, ...]:
    """A sentence for a person where the map names other weights or another adapter; none where it names no model.

    Fingerprints sample the weights (`model_fingerprint`), so this takes a moment, however large the model is. Where
    the map tells weights and config.json apart, another config.json alone (a longer window, say) is not mentioned.

    Args:
        fingerprint: `model_fingerprint` of `model_dir` with the adapter.
        model_dir: the checkpoint loaded.
        adapter: folder of the adapter loaded, or None.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read.
    """
    origin = head_map.origin
    if origin is None or origin.model_fingerprint == fingerprint:
        return ()
    with_its_adapter = model_fingerprint(model_dir, origin.adapter_sha256)
    same_weights = with_its_adapter == origin.model_fingerprint or (
        origin.weights_fingerprint is not None and origin.weights_fingerprint == weights_fingerprint(model_dir)
    )
    if same_weights and with_its_adapter == fingerprint:
        return ()
    if same_weights:
        difference = "adapters"
    else:
        difference = "weights or config.json" if origin.weights_fingerprint is None else "weights"
    named = origin.adapter_sha256 is not None or adapter is not None
    made = origin.model + (_with_adapter(origin.adapter) if named else "")
    loaded = model_dir.resolve().name + (_with_adapter(adapter and adapter.resolve().name) if named else "")
    return (
        f"head map {origin.folder} was made for {made} and not for {loaded} (the {difference} differ), so it may keep "
        f"the wrong heads: give one made with this model by python -m longrun.patterns identify, or auto",
    )


def _with_adapter(name: str | None) -> str:
    return " without an adapter" if name is None else f" with adapter {name}"
