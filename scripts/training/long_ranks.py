"""The processes of one training run, one a GPU, as torchrun starts them; one process alone needs none of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrun.errors import InputError


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Every method but `close` must be called by all of them, in the same order."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Join the others: over NCCL on GPU LOCAL_RANK for `cuda`, over gloo for `cpu`.

        Raises:
            InputError: more processes than GPUs.
        """
        world = world_size()
        if world == 1:
            return cls(0, 1, torch.device(device))
        if device == "cpu":
            dist.init_process_group("gloo")
            return cls(dist.get_rank(), world, torch.device("cpu"))
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"process {local} of this host has no GPU, there are {count}: lower --nproc-per-node")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
        return cls(dist.get_rank(), world, own)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place and bit for bit the same on all."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, said: bool) -> bool:
        """Whether one of them said so. Nobody returns before all have called it."""
        if self.world == 1:
            return said
        return self.sum(torch.tensor(float(said), device=self.device)).item() > 0

    def wait(self) -> None:
        """Return when all have called it."""
        self.any(False)

    def gather(self, value: Any) -> list[Any]:
        """What each of them holds, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def close(self) -> None:
        """Leave the others."""
        if self.world > 1:
            dist.destroy_process_group()
