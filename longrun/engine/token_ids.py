"""Token ids in whatever shape a caller has them: a list, a range, an array, a tensor."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longrun.errors import InputError, quoted

_TAKES = "give token ids as a list of int, or a 1-D array or tensor of integers"


def token_id_tensor(token_ids: Any, vocab_size: int) -> Tensor:
    """The ids as a new or shared int64 tensor [n] on the CPU.

    Args:
        token_ids: a sequence of integers of any type, an array (numpy's protocol) or a tensor on any device.
        vocab_size: ids lie below it.

    Raises:
        InputError: something else (a dictionary, a text, a set, an iterator), floats or bools, more than one dimension,
            no id at all, or one outside the vocabulary.
    """
    if isinstance(token_ids, Tensor):
        ids = _from_tensor(token_ids)
    elif hasattr(token_ids, "dtype") and hasattr(token_ids, "__array__"):
        ids = _from_array(token_ids.__array__())
    elif isinstance(token_ids, Sequence) and not isinstance(token_ids, str | bytes | bytearray | memoryview | Mapping):
        ids = _from_sequence(token_ids)
    else:
        more = ": give its input_ids" if "input_ids" in _keys(token_ids) else ""
        raise InputError(f"token ids cannot be taken from a {type(token_ids).__name__}{more}; {_TAKES}")
    if len(ids) == 0:
        raise InputError("no tokens were given: at least one is needed")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InputError(f"token id {bad} is outside the model's vocabulary of {vocab_size:,}")
    return ids


def _from_tensor(ids: Tensor) -> Tensor:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex() or ids.is_quantized:
        raise InputError(f"token ids are a tensor of {ids.dtype}: {_TAKES}")
    _check_dimensions(ids.dim(), tuple(ids.shape))
    if ids.layout != torch.strided:
        raise InputError(f"token ids are a tensor with layout {ids.layout}: {_TAKES}")
    try:
        return ids.detach().to("cpu", torch.int64)
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(f"token ids cannot be read from this tensor ({quoted(str(error))}): {_TAKES}") from None


def _from_array(ids: Any) -> Tensor:
    if ids.dtype.kind not in "iu" and ids.size:
        raise InputError(f"token ids are an array of {ids.dtype}: {_TAKES}")
    _check_dimensions(ids.ndim, ids.shape)
    return torch.from_numpy(ids.astype("int64"))


def _from_sequence(ids: Sequence[Any]) -> Tensor:
    try:
        if bool in set(map(type, ids)):
            raise TypeError
        found = array("q", ids)
    except (TypeError, OverflowError, ValueError, RuntimeError):
        index, bad = next((i, one) for i, one in enumerate(ids) if not _is_id(one))
        if isinstance(bad, int) and not isinstance(bad, bool):
            raise InputError(f"token id {quoted(bad)} is outside the model's vocabulary") from None
        raise InputError(
            f"token id {index} is {quoted(bad)} of type {type(bad).__name__}, not an integer: {_TAKES}"
        ) from None
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)


def _is_id(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and bool(array("q", [value]) or True)
    except (TypeError, OverflowError, ValueError, RuntimeError):
        return False


def _check_dimensions(dimensions: int, shape: tuple[int, ...]) -> None:
    if dimensions != 1:
        one = " for one row, give ids[0];" if dimensions == 2 and shape[0] == 1 else ""
        raise InputError(f"token ids have the shape {quoted(list(shape))}, not one dimension:{one} {_TAKES}")


def _keys(value: Any) -> Any:
    return value.keys() if isinstance(value, Mapping) else ()
