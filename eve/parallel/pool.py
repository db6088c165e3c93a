"""eve.objectives.pool.Pool over the data-parallel ranks: tensor ranks hold the same samples.

Shape suffixes: B sample of this rank, N sample of all ranks, D width, R rank,
K row that a rank wants, X anything.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eve.objectives.pool import Pool, WholePool
from eve.packing import to_device
from eve.parallel.collectives import GatherIn
from eve.parallel.topology import Topology


class DataPool:
    """Ranks of equal tensor_rank, which hold the other samples of the step."""

    def __init__(self, topology: Topology):
        self.size, self.rank, self.group = topology.data, topology.data_rank, topology.data_group

    def gather(self, x_BD: Tensor) -> Tensor:
        return GatherIn.apply(x_BD, [len(x_BD)] * self.size, self.rank, self.group)  # pyright: ignore

    def fetch(self, x_BX: Tensor, wanted_RK: np.ndarray) -> Tensor:
        """Each row goes from its rank to those that want it, and nowhere else."""
        size, device = len(x_BX), x_BX.device
        owner_RK = wanted_RK // size
        rows = [wanted_K[owner_K == self.rank] for wanted_K, owner_K in zip(wanted_RK, owner_RK, strict=True)]
        sent = x_BX.index_select(
            0, to_device(torch.from_numpy(np.concatenate(rows) - self.rank * size), device)
        )
        received = x_BX.new_empty(wanted_RK.shape[1], *x_BX.shape[1:])
        receives = np.bincount(owner_RK[self.rank], minlength=self.size).tolist()
        dist.all_to_all_single(received, sent, receives, [len(part) for part in rows], group=self.group)
        # They come rank after rank, and of each in the order in which they were asked for.
        place_K = np.argsort(np.argsort(owner_RK[self.rank], kind="stable"))
        return received.index_select(0, to_device(torch.from_numpy(place_K), device))


def pool_of(topology: Topology) -> Pool:
    return WholePool() if topology.data == 1 else DataPool(topology)
