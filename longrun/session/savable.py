"""What saving and loading need of a session, so that the store knows no more of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from longrun.cache.dual import DualCache
from longrun.session.manifest import SessionIdentity


class Savable(Protocol):
    """`longrun.session.session.Session` as the store sees it."""

    identity: SessionIdentity
    extra: dict[str, Any]

    @property
    def cache(self) -> DualCache: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def sparse_tokens(self) -> int: ...
    def snapshot(self) -> dict[str, Tensor]: ...
    def restore(
        self, token_ids: Tensor, logits: Tensor | None, generator_state: Tensor, extra: dict[str, Any],
        sparse_tokens: int = 0,
    ) -> None: ...  # fmt: skip
