"""Who this process is among the others: its place along the degrees of parallelism, and their groups.

Ranks are numbered tensor first: rank = data_rank * tensor + tensor_rank. The `tensor` ranks of a
group read the same samples and share each layer; ranks of equal tensor_rank hold the same part of the
model for other samples. The expert groups are `expert` consecutive ranks of the whole world, so they hold
the tensor ranks of one or more groups: experts are whole, tokens are split over tensor ranks before they
are sent.

    8 ranks, tensor 2, expert 4:   tensor groups  [0 1] [2 3] [4 5] [6 7]
                                   data groups    [0 2 4 6] [1 3 5 7]
                                   expert groups  [0 1 2 3] [4 5 6 7]     copies of an expert: [0 4] [1 5] ...

Created from what the launcher put into the environment (`deepspeed`, `torchrun`, SLURM's `srun`), or as
the one process of a run without a launcher. Methods named get_* are what DeepSpeed asks its `mpu`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eve.config import Model, Parallel
from eve.errors import UserError

Item = TypeVar("Item")

# Of a collective: a checkpoint on a slow disk takes minutes. A process that dies is noticed by watchdog.py.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Topology:
    """`tensor`, `expert`: degrees; `sequence`: tokens between layers are split over the tensor ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor: int = 1
    expert: int = 1
    sequence: bool = False
    # Process groups; None without tensor parallelism, and before `connected`.
    tensor_group: Any = None
    data_group: Any = None

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
            timeout=TIMEOUT,
            device_id=self.device if cuda else None,
        )

    @staticmethod
    def leave() -> None:
        """Ends the process group, once at the end of the process: DeepSpeed keeps groups of its own in it."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def arranged(self, parallel: Parallel, model: Model) -> Topology:
        """With the degrees of a recipe, not yet connected. Raises UserError where they do not fit."""
        check_degrees(parallel, model, self.world_size)
        return replace(
            self,
            tensor=parallel.tensor,
            expert=parallel.expert,
            sequence=parallel.sequence and parallel.tensor > 1,
        )

    def connected(self) -> Topology:
        """With the process groups of its degrees. All ranks call it together, once."""
        if self.tensor == 1:
            return self
        world, tensor = self.world_size, self.tensor
        ranks_of_tensor_groups = [list(range(first, first + tensor)) for first in range(0, world, tensor)]
        ranks_of_data_groups = [list(range(first, world, tensor)) for first in range(tensor)]
        tensor_groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in ranks_of_tensor_groups]
        data_groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in ranks_of_data_groups]
        return replace(
            self, tensor_group=tensor_groups[self.data_rank], data_group=data_groups[self.tensor_rank]
        )

    @property
    def data(self) -> int:
        """Number of shares that a batch is cut into."""
        return self.world_size // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    @property
    def is_counted(self) -> bool:
        """What the ranks of a tensor group know alike is counted on the first of them."""
        return self.tensor_rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

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
        line = f"{self.world_size} process{'es' if self.world_size > 1 else ''} on {device}"
        if self.tensor > 1 or self.expert > 1:
            sequence = " with sequence parallelism" if self.sequence else ""
            line += f": data {self.data} x tensor {self.tensor}{sequence}, expert {self.expert}"
        return line

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self.tensor_rank, self.world_size, self.tensor))

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data


def check_degrees(parallel: Parallel, model: Model, world_size: int) -> None:
    """Raises UserError, in one sentence, for degrees that do not fit the model or the number of processes."""
    tensor, expert = parallel.tensor, parallel.expert
    if world_size % tensor:
        raise UserError(f"parallel.tensor {tensor} does not divide the {world_size} processes")
    if world_size % expert:
        raise UserError(f"parallel.expert {expert} does not divide the {world_size} processes")
    if expert > 1 and expert % tensor:
        raise UserError(
            f"parallel.expert {expert} is not a multiple of parallel.tensor {tensor}: the devices that share "
            "a layer send their tokens to different experts"
        )
    sizes = {"model.heads": model.heads, "model.hidden": model.hidden}
    if model.decoder:
        sizes |= {"model.decoder.heads": model.decoder.heads}
    for key, size in sizes.items():
        if size % tensor:
            raise UserError(f"{key} {size} is not a multiple of parallel.tensor {tensor}")
    if tensor > 1 and model.sub_norm:
        raise UserError("model.sub_norm needs whole rows: parallel.tensor has to be 1")
    if any(ff.router in ("modality", "fusion") for ff in model.feed_forward) and model.hidden % (8 * tensor):
        raise UserError(
            f"model.hidden {model.hidden} over parallel.tensor {tensor} is not a multiple of 8 (rows of 16 "
            "bytes in bf16)"
        )
    pools = [ff.num_experts for ff in model.feed_forward if ff.router == "topk"]
    if expert > 1 and not pools:
        raise UserError(f"parallel.expert is {expert}, but no block of model.feed_forward has a topk router")
    for num_experts in pools:
        if num_experts % expert:
            raise UserError(f"num_experts {num_experts} is not a multiple of parallel.expert {expert}")
