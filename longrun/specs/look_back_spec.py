"""What looking back from an answer holds, and that it fits where the plan has counted a chunk: without torch."""

from __future__ import annotations

from longrun.config.model_config import ModelConfig
from longrun.errors import PlanError

_TILE_BYTES = {"cpu": 2**21, "cuda": 2**25}


def look_back_room(
    config: ModelConfig, itemsize: int, chunk_size: int, device_type: str, seq_len: int
) -> tuple[int, int]:
    """How many tokens can look back at once over `seq_len` others, and the bytes of scores that may be held meanwhile.

    As many tokens as a chunk has, less those whose activations take the memory of the scores (at most a quarter of all)
    and of the sums, 4 bytes a token of the past.

    Args:
        itemsize: bytes of an activation element.

    Raises:
        PlanError: none can.
    """
    of_token = (config.hidden_size + 2 * config.q_size + 2 * config.kv_size) * itemsize
    tile = min(_TILE_BYTES[device_type], chunk_size * of_token // 4)
    room = chunk_size - -(-(4 * seq_len + tile) // of_token)
    if room < 1:
        raise PlanError(
            f"chunks of {chunk_size:,} tokens leave no memory for looking back over {seq_len:,} tokens: load the model "
            f"with a larger chunk_size"
        )
    return room, tile
