"""What runtimes over the same weights share, and what they hold together."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from longrun.model.decoder import Decoder
from longrun.session.session import Session

if TYPE_CHECKING:
    from longrun.kernels.gpu_kernels import GpuKernels


class Shared:
    """One for a loaded model and everything that was derived from it.

    Attributes:
        compiled: a session was made: the GPU's kernels and libraries stand in memory.
    """

    def __init__(self) -> None:
        self.compiled = False
        self._decoders: weakref.WeakSet[Decoder] = weakref.WeakSet()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._gpu_kernels: dict[str, GpuKernels] = {}

    def add_decoder(self, decoder: Decoder) -> None:
        """Count its weights for as long as it lives; those that decoders share count once."""
        self._decoders.add(decoder)

    def add_session(self, session: Session) -> None:
        """Count its memory for as long as it lives."""
        self._sessions.add(session)

    def gpu_kernels(self, head_dim: int, kv_format: str) -> GpuKernels:
        """The kernels for pages of this format, compiled once.

        Raises:
            ConfigError: as `longrun.kernels.gpu_kernels.load_gpu_kernels`.
        """
        if kv_format not in self._gpu_kernels:
            from longrun.kernels.gpu_kernels import load_gpu_kernels

            self._gpu_kernels[kv_format] = load_gpu_kernels(head_dim, kv_format)
        return self._gpu_kernels[kv_format]

    def taken_beside(self, decoder: Decoder) -> tuple[int, int]:
        """Bytes on the device and in the host pool that are not of `decoder`: sessions that are alive, and weights
        that only other decoders hold."""
        weights = {id(tensor): tensor.nbytes for each in self._decoders for tensor in each.tensors()}
        own = {id(tensor) for tensor in decoder.tensors()}
        on_device = sum(size for key, size in weights.items() if key not in own)
        plans = [session.plan for session in self._sessions]
        on_device += sum(
            sum(p.cache.device_bytes().values()) + p.attention.scratch_bytes() + p.attention.decode_bytes()
            for p in plans
        )
        return on_device, sum(sum(p.cache.host_bytes().values()) for p in plans)
