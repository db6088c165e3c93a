"""Vectors of length 1 and the nearest of K codes, which follow them (BEiT v2, Peng et al. 2022, section 2.1;
van den Oord et al. 2017).

A code is a running mean of the vectors it is nearest to, brought back to length 1 in each step. The first
batch places the codes by k-means on the sphere. Codes that hardly any vector is nearest to are given to
vectors that are far from their code.

On several ranks the counts and sums of a step are added over all ranks, and where codes are placed anew the
vectors of all ranks are looked at, so every rank keeps the same code book: that of one process with the
whole batch.

Shape suffixes: N vector, K code, W width of a code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve import random

# Of the k-means that places the codes: draws of the vectors it starts from, and its own rounds.
SEEDINGS, ROUNDS = 32, 10


def _keep(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a batch in equal parts. `all_reduce_sum` adds up their tensors."""

    rank: int = 0
    number: int = 1
    all_reduce_sum: Callable[[Tensor], Tensor] = _keep

    def gather(self, rows_NW: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        if self.number == 1:
            return rows_NW
        whole = rows_NW.new_zeros(self.number, *rows_NW.shape)
        whole[self.rank] = rows_NW
        return self.all_reduce_sum(whole).flatten(0, 1)


ALONE = Ranks()


@dataclass(frozen=True)
class Quantised:
    """`vectors` are the codes' in the forward pass and pass the gradient on to what was quantised (straight
    through); `distance` is the mean squared difference of the two, with a gradient for the latter only."""

    vectors_NW: Tensor
    codes_N: Tensor
    distance: Tensor


class Quantiser(nn.Module):
    """Buffers: `codes_KW`, of length 1; `use_K`, running mean of the number of vectors in a step that a code
    is nearest to; `steps`, number of updates so far."""

    codes_KW: Tensor
    use_K: Tensor
    steps: Tensor

    def __init__(self, codes: int, width: int, *, decay: float, revive_below: float, seed: int = 0):
        super().__init__()
        self.decay, self.revive_below, self.seed = decay, revive_below, seed
        self.register_buffer("codes_KW", torch.zeros(codes, width))
        self.register_buffer("use_K", torch.zeros(codes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def nearest(self, unit_NW: Tensor) -> Tensor:
        """int64 (N,): the code of the largest cosine, the first of equal ones. Of vectors of length 1 that is
        the nearest one."""
        return (unit_NW.float() @ self.codes_KW.T).argmax(-1)

    def forward(self, x_NW: Tensor) -> Quantised:
        """(N, W) of any length; in fp32, as a rounded cosine picks other codes."""
        unit_NW = F.normalize(x_NW.float(), dim=-1)
        codes_N = self.nearest(unit_NW.detach())
        code_NW = F.embedding(codes_N, self.codes_KW)
        vectors_NW = unit_NW + (code_NW - unit_NW).detach()
        return Quantised(vectors_NW, codes_N, (unit_NW - code_NW).square().mean())

    @torch.no_grad()
    def place(self, x_NW: Tensor, ranks: Ranks = ALONE) -> None:
        """K-means with cosines over the vectors of all ranks, started from some that are far apart."""
        unit_NW = ranks.gather(F.normalize(x_NW.float(), dim=-1))
        codes, device = len(self.codes_KW), unit_NW.device
        place_N = torch.arange(len(unit_NW), device=device)
        first = random.uniform(self._seed(unit_NW, -1), place_N).argmax()
        self.codes_KW.copy_(unit_NW[first].expand_as(self.codes_KW))
        dead_K = torch.arange(codes, device=device) > 0
        size = -(-codes // SEEDINGS)
        for draw, begin in enumerate(range(1, codes, size)):
            some_K = dead_K & (torch.arange(codes, device=device) < begin + size)
            self.codes_KW.copy_(self._replaced(unit_NW, dead_K, some_K, -2 - draw))
            dead_K &= ~some_K
        for round_ in range(ROUNDS):
            count_K, sum_KW = self._sums(unit_NW, self.nearest(unit_NW), ALONE)
            dead_K = count_K == 0
            self.codes_KW.copy_(torch.where(dead_K[:, None], self.codes_KW, F.normalize(sum_KW, dim=-1)))
            if round_ < ROUNDS - 1:
                moved_KW = self._replaced(unit_NW, dead_K, dead_K, -2 - SEEDINGS - round_)
                self.codes_KW.copy_(moved_KW)
        self.use_K.copy_(count_K)

    @torch.no_grad()
    def update(self, x_NW: Tensor, codes_N: Tensor, ranks: Ranks = ALONE) -> None:
        """Moves the codes to the vectors of the step and gives dead codes to others.

        code <- decay * code + (1 - decay) * mean, and both the mean and the result are made of length 1; a
        code that no vector is nearest to stays.
        """
        unit_NW = F.normalize(x_NW.float(), dim=-1)
        count_K, sum_KW = self._sums(unit_NW, codes_N, ranks)
        moved_KW = self.codes_KW.lerp(F.normalize(sum_KW, dim=-1), 1 - self.decay)
        used_K1 = (count_K > 0)[:, None]
        self.codes_KW.copy_(torch.where(used_K1, F.normalize(moved_KW, dim=-1), self.codes_KW))
        self.use_K.lerp_(count_K, 1 - self.decay)
        if self.revive_below:
            even = len(x_NW) * ranks.number / len(self.use_K)
            dead_K = self.use_K < self.revive_below * even
            # The host has to know: the vectors of all ranks are fetched for it.
            if bool(dead_K.any()):
                whole_NW = ranks.gather(unit_NW)
                self.codes_KW.copy_(self._replaced(whole_NW, dead_K, dead_K, int(self.steps)))
                # Time to find its vectors.
                self.use_K.masked_fill_(dead_K, even)
        self.steps += 1

    def _sums(self, unit_NW: Tensor, codes_N: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Of each code over all ranks: ((K,) number of its vectors, (K, W) their sum)."""
        rows = torch.cat([unit_NW, torch.ones_like(unit_NW[:, :1])], dim=1)
        # Not index_add_, which adds by atomics, in another order each time: the gradient of an embedding.
        table = torch.ops.aten.embedding_dense_backward(rows, codes_N, len(self.codes_KW), -1, False)
        table = ranks.all_reduce_sum(table)
        return table[:, -1], table[:, :-1]

    def _replaced(self, unit_NW: Tensor, dead_K: Tensor, some_K: Tensor, draw: int) -> Tensor:
        """The codes with `some_K` of the dead ones replaced by different vectors, drawn without replacement
        with a chance that grows with the distance from the nearest code that is alive (k-means++)."""
        cosine_NK = (unit_NW @ self.codes_KW.T).masked_fill(dead_K, -1.0)
        distance_N = (1 - cosine_NK.amax(-1)).clamp_min(1e-7)
        place_N = torch.arange(len(unit_NW), device=unit_NW.device)
        # The largest of log weight + Gumbel noise are such a draw (Efraimidis and Spirakis 2006).
        chance_N = distance_N.log() + random.gumbel(self._seed(unit_NW, draw), place_N)
        number = min(len(some_K), len(unit_NW))
        drawn_N = chance_N.topk(number).indices
        which_K = some_K.cumsum(0) - 1
        # Fewer vectors than codes: those without one stay as they are.
        given_K1 = (some_K & (which_K < number))[:, None]
        return torch.where(given_K1, unit_NW[drawn_N[which_K.clamp(0, number - 1)]], self.codes_KW)

    def _seed(self, like: Tensor, draw: int) -> Tensor:
        seed, counter = torch.tensor([self.seed, draw], dtype=torch.int64, device=like.device)
        return random.mix(seed, counter)
