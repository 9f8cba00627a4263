"""A call into compiled code with fixed arguments, made once and run for every token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor


class PreparedCall(partial):
    """A function with its arguments; what it reads are the contents that the tensors have when it is called.

    Args:
        tensors: whose memory the arguments point to: alive, and in their places, as long as this object.
    """

    _tensors: tuple[Tensor | None, ...]

    def __new__(
        cls, function: Callable[..., Any], *arguments: Any, tensors: tuple[Tensor | None, ...] = ()
    ) -> PreparedCall:
        call = super().__new__(cls, function, *arguments)
        call._tensors = tensors
        return call


def addresses(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    """Where their memory begins; None for None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
