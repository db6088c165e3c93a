"""Who this process is among the others, and the few collectives the loop needs.

Created from what the launcher put into the environment (`deepspeed`, `torchrun`), or as the one
process of a run without a launcher. Tensor and expert parallelism will add their degrees here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eve.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Topology:
    """Data parallelism only: `rank` and `world_size` are those of the batch."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> Topology:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK; without them this is the only process.

        Joins the process group where the launcher started more than one process. Raises UserError
        where a launcher started more processes on a machine than it has devices.
        """
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"process {local_rank} of this machine has no device: it has "
                    f"{torch.cuda.device_count()}; start as many processes as devices"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        topology = cls(rank, world_size, local_rank, device)
        if world_size > 1:
            topology.join()
        return topology

    def join(self) -> None:
        """Makes the process group, once. DeepSpeed's engine wants one even for a single process."""
        if dist.is_initialized():
            return
        cuda = self.device.type == "cuda"
        # A launcher gives an address to meet at; a single process meets nobody.
        store = dist.HashStore() if self.world_size == 1 else None  # pyright: ignore
        # DeepSpeed asks for this one by name.
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(minutes=30),
            device_id=self.device if cuda else None,
        )

    @staticmethod
    def leave() -> None:
        """Ends the process group, once at the end of the process: DeepSpeed keeps groups of its own in it."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks; the tensor stays as it is."""
        if self.world_size == 1:
            return tensor
        return self.all_reduce_sum(tensor.clone()) / self.world_size

    def gather_objects(self, item: Item) -> list[Item]:
        """The items of all ranks in their order, on every rank. Synchronises the host."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def raise_together(self, error: UserError | None) -> None:
        """Every rank raises the first user error of any rank, or none does."""
        sentences = self.gather_objects(None if error is None else str(error))
        for sentence in sentences:
            if sentence is not None:
                raise UserError(sentence)

    def on_rank_0(self, action: Callable[[], None]) -> None:
        """Runs it on rank 0; a user error of it is raised on every rank."""
        error = None
        if self.rank == 0:
            try:
                action()
            except UserError as mistake:
                error = mistake
        self.raise_together(error)

    def describe(self) -> str:
        """One line for the console."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"cpu, {torch.get_num_threads()} threads"
        return f"{self.world_size} process{'es' if self.world_size > 1 else ''} on {device}"
