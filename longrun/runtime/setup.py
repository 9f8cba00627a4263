"""What a runtime is made of: the checked model, how its memory is planned, and what stands in memory."""

from __future__ import annotations

from dataclasses import dataclass

from longrun.config.key_biases import KeyBiases
from longrun.model.folder import ModelFolder
from longrun.plan.budget import Budget
from longrun.plan.plan import ChosenSplit, Plan, make_plan
from longrun.runtime.backend import Parts
from longrun.runtime.shared import Shared
from longrun.session.manifest import SessionIdentity
from longrun.specs.cache_spec import MARKS

_UNFUSED = "the GPU kernels are for int4 and k5v3 pages; this run uses plain torch there, which is slower"


@dataclass(frozen=True)
class Setup:
    """Made by `longrun.runtime.load`, changed by `longrun.runtime.derive`.

    Attributes:
        budget: memory, formats and chunk size, with the options that win over a file.
        plan: for the context that was asked for.
        identity: what a saved session must have been made with.
        shared: what is shared with other runtimes over the same weights.
        device_share, compiled_kernels, marks, serves: see `longrun.load`.
        model_notices, split_notices: sentences for a person, of the model in memory and of its head split.
        key_biases: of the model's files; None where it has none.
    """

    model: ModelFolder
    budget: Budget
    chosen: ChosenSplit
    plan: Plan
    identity: SessionIdentity
    parts: Parts
    shared: Shared
    device_share: float
    compiled_kernels: bool
    model_notices: tuple[str, ...] = ()
    split_notices: tuple[str, ...] = ()
    key_biases: KeyBiases | None = None
    marks: int = MARKS
    serves: bool = False

    @property
    def notices(self) -> list[str]:
        """Sentences that a person should be shown once."""
        unfused = self.plan.device_type == "cuda" and not self.plan.attention.fused
        left_out = [note for note in self.plan.notes if note not in self.chosen.notes]
        unfused_notice = [_UNFUSED] if unfused else []
        return [*self.plan.warnings, *left_out, *self.split_notices, *self.model_notices, *unfused_notice]

    def taken(self) -> tuple[int, int]:
        """Bytes on the device and in the host pool that other sessions and weights hold now."""
        return self.shared.taken_beside(self.parts.decoder)

    def plan_session(self, capacity: int, more_bytes: int = 0) -> Plan:
        """The plan of one more session of `capacity` tokens on top of all that is taken and `more_bytes` on the device.

        Raises:
            PlanError: as `longrun.plan.plan.make_plan`.
        """
        on_device, on_host = self.taken()
        budget = self.budget.override(host_bytes=max(0, self.budget.host_bytes - on_host))
        return make_plan(
            self.model.config, budget, capacity, split=self.chosen, device_type=self.plan.device_type,
            reserved_bytes=on_device + more_bytes, device_share=self.device_share, gpu_kernels=self.compiled_kernels,
            key_biases=self.key_biases, marks=self.marks, serves=self.serves,
        )  # fmt: skip
