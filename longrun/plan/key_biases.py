"""What a plan says about key biases that are too large for its page format."""

from __future__ import annotations

from longrun.config.key_biases import KeyBiases
from longrun.quant.kv_format import PageFormat

# Motion of the biases within a page, RMS a channel, from which on a format loses about twice what it loses without:
# docs/experiments.md, "Key biases".
MOTION_LIMITS = {"int4": 2.0, "k5v3": 4.0}


def key_bias_warnings(biases: KeyBiases | None, page_format: PageFormat) -> list[str]:
    """A sentence where the biases move further within a page than its format stands; otherwise nothing."""
    limit = MOTION_LIMITS.get(page_format.name)
    if biases is None or limit is None:
        return []
    motion = biases.motion(page_format.page_size)
    if motion <= limit:
        return []
    return [
        f"this model's key biases turn by {motion:.1f} a channel within a page, and beyond {limit:g} "
        f"{page_format.name} pages lose more than twice what they lose otherwise: use bf16 pages (kv_format bf16, "
        f"--kv bf16)"
    ]
