"""What runtimes over the same weights share, and what they hold together."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from longrun.model.decoder import Decoder
from longrun.plan.plan import Plan
from longrun.session.session import Session

if TYPE_CHECKING:
    from longrun.kernels.gpu_kernels import GpuKernels
    from longrun.quant.digest_format import DigestFormat


class Shared:
    """One for a loaded model and everything that was derived from it.

    Attributes:
        compiled: a session was made: the GPU's kernels and libraries stand in memory.
    """

    def __init__(self) -> None:
        self.compiled = False
        self._decoders: weakref.WeakSet[Decoder] = weakref.WeakSet()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._gpu_kernels: dict[tuple[str, DigestFormat | None], GpuKernels] = {}

    def add_decoder(self, decoder: Decoder) -> None:
        """Count its weights for as long as it lives; those that decoders share count once."""
        self._decoders.add(decoder)

    def add_session(self, session: Session) -> None:
        """Count its memory for as long as it lives."""
        self._sessions.add(session)

    def gpu_kernels(self, plan: Plan) -> GpuKernels:
        """The kernels for pages and selection of this plan, whatever the context; compiled once.

        Raises:
            ConfigError: as `longrun.kernels.gpu_kernels.load_gpu_kernels`.
        """
        page_format, selection = plan.cache.page_format, plan.attention.selection
        digest = None if selection is None else selection.digest_format(page_format)
        key = page_format.name, digest
        if key not in self._gpu_kernels:
            from longrun.kernels.gpu_kernels import load_gpu_kernels

            self._gpu_kernels[key] = load_gpu_kernels(page_format.head_dim, page_format.name, digest=digest)
        return self._gpu_kernels[key]

    def taken_beside(self, decoder: Decoder) -> tuple[int, int]:
        """Bytes on the device and in the host pool that are not of `decoder`: sessions that are alive, and weights
        that only other decoders hold."""
        weights = {id(tensor): tensor.nbytes for each in self._decoders for tensor in each.tensors()}
        own = {id(tensor) for tensor in decoder.tensors()}
        on_device = sum(size for key, size in weights.items() if key not in own)
        plans = [session.plan for session in self._sessions]
        on_device += sum(sum(p.cache.device_bytes().values()) + p.attention.allocated_bytes() for p in plans)
        return on_device, sum(sum(p.cache.host_bytes().values()) for p in plans)
