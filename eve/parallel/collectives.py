"""Collectives with a gradient, on rows of packed tokens.

Each is a pair of operations that are each other's transpose, so the backward of one is the other:

    forward             backward
    nothing             all-reduce           into a layer whose outputs are cut (Megatron's f)
    all-reduce          nothing              out of a layer whose inputs are cut (Megatron's g)
    all-gather          reduce-scatter       the same two under sequence parallelism
    reduce-scatter      all-gather
    slice               all-gather           from what all ranks hold alike to a share of it
    all-gather          slice                and back
    all-to-all          all-to-all           tokens to their experts and back

Shares of T rows over n ranks differ by one row at most; where they do, the collective is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shares(num_rows: int, size: int) -> list[int]:
    """Rows of each rank: [4, 3, 3] for 10 rows on 3 ranks."""
    return [num_rows // size + (rank < num_rows % size) for rank in range(size)]


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum, in a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def all_gather_rows(x_TD: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """The rows of all ranks in their order; rank r has counts[r]."""
    longest = max(counts)
    if x_TD.shape[0] < longest:
        x_TD = torch.cat([x_TD, x_TD.new_zeros(longest - x_TD.shape[0], *x_TD.shape[1:])])
    gathered = x_TD.new_empty(longest * len(counts), *x_TD.shape[1:])
    _all_gather(gathered, x_TD.contiguous(), group=group)
    if min(counts) == longest:
        return gathered
    return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])


def gather_over_ranks(x: Tensor, size: int, group: Any) -> Tensor:
    """The tensors of all ranks, of one shape, along a new first axis."""
    gathered = x.new_empty(size, *x.shape)
    _all_gather(gathered.view(-1), x.contiguous().view(-1), group=group)
    return gathered


def reduce_scatter_rows(x_TD: Tensor, counts: Sequence[int], rank: int, group: Any) -> Tensor:
    """This rank's rows of the sum over ranks."""
    longest = max(counts)
    if min(counts) < longest:
        padded = x_TD.new_zeros(longest * len(counts), *x_TD.shape[1:])
        for r, part in enumerate(x_TD.split(list(counts))):
            padded[r * longest : r * longest + counts[r]] = part
        x_TD = padded
    out = x_TD.new_empty(longest, *x_TD.shape[1:])
    _reduce_scatter(out, x_TD.contiguous(), group=group)
    return out[: counts[rank]]


def own_rows(x_TD: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    return x_TD.narrow(0, sum(counts[:rank]), counts[rank])


class CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad, ctx.group), None


class ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        # In place: it is the fresh output of a product, which no backward needs.
        x = x.contiguous()
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class GatherIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int, group: Any) -> Tensor:
        ctx.to = counts, rank, group
        return all_gather_rows(x, counts, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return reduce_scatter_rows(grad, *ctx.to), None, None, None


class ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int, group: Any) -> Tensor:
        ctx.to = counts, group
        return reduce_scatter_rows(x, counts, rank, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather_rows(grad, *ctx.to), None, None, None


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int, group: Any) -> Tensor:
        ctx.to = counts, group
        return own_rows(x, counts, rank).clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather_rows(grad, *ctx.to), None, None, None


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int, group: Any) -> Tensor:
        ctx.to = counts, rank
        return all_gather_rows(x, counts, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return own_rows(grad, *ctx.to), None, None, None


class AllToAll(torch.autograd.Function):
    """Rows for rank r are the next sends[r] of x; receives[r] come from it."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
        ctx.to = receives, sends, group
        return _exchange(x_ND, sends, receives, group)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad_ND, *ctx.to), None, None, None


def _exchange(x_ND: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
    out = x_ND.new_empty(sum(receives), *x_ND.shape[1:])
    dist.all_to_all_single(out, x_ND.contiguous(), receives, sends, group=group)
    return out


class SumGradients(torch.autograd.Function):
    """Nothing forward; the gradients of all tensors are summed in one all-reduce, in fp32, backward.

    Where one of the tensors was not used on this rank, its part of the sum is zero.
    """

    @staticmethod
    def forward(ctx, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = torch.cat([grad.float().reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad).to(grad.dtype) for part, grad in zip(parts, grads, strict=True))
