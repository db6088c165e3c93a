"""The seam between objectives that compare samples with one another and the ranks that hold them.

The pool of a pass is the samples of that pass on all data-parallel ranks, numbered rank after rank: the order
of the global batch. Every rank passes as many samples, and calls the same methods in the same order.

Shape suffixes: B sample of this rank, N sample of the pool, D width, R rank,
K row that a rank wants, X anything.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eve.packing import to_device


class Pool(Protocol):
    """`size` ranks, of which this is number `rank`."""

    size: int
    rank: int

    def gather(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (N, D): the rows of all ranks. Its gradient is the sum of what all ranks' losses give."""
        ...

    def fetch(self, x_BX: Tensor, wanted_RK: np.ndarray) -> Tensor:
        """(B, X) -> (K, X): rows of the pool by number, without a gradient. Line r, known to all, says which
        rank r gets."""
        ...


class WholePool:
    """One process holds all samples."""

    size, rank = 1, 0

    def gather(self, x_BD: Tensor) -> Tensor:
        return x_BD

    def fetch(self, x_BX: Tensor, wanted_RK: np.ndarray) -> Tensor:
        return x_BX.index_select(0, to_device(torch.from_numpy(wanted_RK[0]), x_BX.device))
