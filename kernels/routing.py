"""Routing: logits of the gate -> choices, their weights, the rows of the experts, auxiliary losses.

Per token: scores (softmax or sigmoid of the logits) and the k experts of the largest logits, of equals the
one of the lower index; noise, if given, is added to the logits where the choices after the first are made.
Per group of tokens: slots of each expert, load balance, z-loss. With a capacity the choices of a group queue
for each expert's slots; those past the capacity are dropped, and dropped ones count as well. The orders:

    sequence    first choices by token, then second choices by token (GShard)
    priority    first choices, then second ones; of each the tokens of larger `priority_T` first, or of the
                larger first score where none is given (batch priority, V-MoE); of equals the lower token
    position    all choices by token (DeepSpeed's topkgating)
    score       all choices by their score, descending (the same, its other policy)

Definition and kernels round scores differently, in the last bit: where two choices differ by no more than
that, the orders priority (without `priority_T`) and score may queue them differently, and with a capacity
drop another one. Each path by itself is deterministic.

A logit of -inf is an expert that a token cannot choose: no score, no gradient. There must be k others.
Rows of an expert lie together, first choices by token, then second choices.

Dataflow, B blocks of BLOCK_T tokens; two launches, with a capacity three; no host synchronisation, no
atomics. The kernels are in routing_kernels.py and routing_fit.py, the backward is in routing_backward.py:

    choose      logits -> expert_TK, score_TK; of each block the counts by choice, group and expert, and
                the sums over tokens that the losses need
    fit         with a capacity: place of a choice = counts of the blocks before + rank in its block, or
                comparisons with those of its group where the order is not the sequence
                -> place_TK, kept_TK, and the counts of kept choices by block
    place       row of a choice = start of its expert + counts of the blocks before + rank in its block
                -> token_row_TK, row_token_N, offsets_E, weight_TK; further programs sum the losses

Instead of a launch that scans, each program sums the counts of the blocks before its own: B K E numbers out
of the L2 cache. The groups of a block are a range lo..hi of its tokens' groups: one or two where samples lie
together. Backward is one launch that makes the scores again from the logits: nothing else of size T E is
kept.

Bytes: logits read once forward and once backward, T E 4 (4 MB at T 32,768, E 32), and T K 8 of each index:
7 MB, 2 microseconds; what it costs is the launches. That leaves out the tables (B, G, K, E), where a
block writes those of its own groups alone, K E 4 bytes each (256 at K 2, E 32).

Shape suffixes: T token, E expert, K choice, G group, N row, M modality, B block of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import divide_up, use_triton
from kernels.routing_backward import route_backward, scores
from kernels.routing_fit import ORDERS, fit_kernel, fit_sorted_kernel
from kernels.routing_kernels import (
    EPSILON,
    RENORMALISE,
    WARPS,
    blocks_of,
    choose_kernel,
    place_kernel,
    tile_of,
)

Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]  # fmt: skip


@dataclass(frozen=True)
class Routing:
    """Attributes, for T tokens whose rows `own` are dispatched here:
    expert_TK: int64, the experts of each token, best first.
    weight_TK: fp32 with gradient; 0 for a dropped choice.
    kept_TK: bool.
    place_TK: int32, place of each choice in the queue of its group and expert, dropped ones included; with
        no capacity there are no queues, and no such rows.
    offsets_E: int32, end of each expert's rows, padding included.
    row_token_N, token_row_TK: int64, for the own tokens, as kernels/dispatch.py takes them. Of the rows
        past the last offset row_token_N is 0.
    balance_G, z_loss_G: fp32 with gradient; 1 is the balance of a group that is balanced.
    counts_ME: int64, choices of each modality that named each expert, before drops.
    dropped_M: int64, choices of each modality that were dropped.
    entropy: fp32 scalar without gradient, sum over tokens of the entropy of the scores, in nats.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor
    place_TK: Tensor
    offsets_E: Tensor
    row_token_N: Tensor
    token_row_TK: Tensor
    balance_G: Tensor
    z_loss_G: Tensor
    counts_ME: Tensor
    dropped_M: Tensor
    entropy: Tensor


def route(
    logits_TE: Tensor,
    num_choices: int,
    *,
    group_T: Tensor,
    num_groups: int,
    modality_T: Tensor | None = None,
    num_modalities: int = 1,
    capacity_G: Tensor | None = None,
    noise_TE: Tensor | None = None,
    priority_T: Tensor | None = None,
    order: str = "sequence",
    sigmoid: bool = False,
    renormalise: str = "after_drops",
    balance_all: bool = False,
    align: int = 1,
    own: tuple[int, int] | None = None,
) -> Routing:
    """
    Args:
        logits_TE: fp32; on a CPU fp64, too.
        group_T: int64, group of each token, below `num_groups`.
        modality_T: int64, modality of each token, below `num_modalities`, to count by; None counts all.
        capacity_G: int64, slots of each expert for a group; None drops nothing.
        noise_TE: added to the logits where the choices after the first are made, not in the scores.
        priority_T: fp32, for the order "priority".
        order: of the queues, see above.
        sigmoid: scores are sigmoids; for balance and entropy they are divided by their sum over experts, or
            by EPSILON where it is less.
        renormalise: "none", or weights are divided by the sum over a token's choices, "before_drops" (Tutel),
            or over its kept choices, "after_drops" (GShard, DeepSpeed).
        balance_all: the load balance counts all choices, divided by k, not the first ones.
        align: each expert's rows are filled up to a multiple of it.
        own: begin and number of the tokens whose rows are placed; None places all.
    """
    for name, value, known in (("order", order, ORDERS), ("renormalise", renormalise, RENORMALISE)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose {', '.join(known)}.")
    if not 1 <= num_choices <= logits_TE.shape[1]:
        raise ValueError(f"{num_choices} choices of {logits_TE.shape[1]} experts")
    exact = (torch.float32,) if use_triton(logits_TE) else (torch.float32, torch.float64)
    if logits_TE.dtype not in exact:
        raise ValueError(f"logits of routing are fp32, not {logits_TE.dtype}")
    begin, num_own = own or (0, logits_TE.shape[0])
    found = _route(
        logits_TE, noise_TE, group_T, capacity_G, priority_T, modality_T, num_groups, num_choices,
        num_modalities, order, sigmoid, renormalise, balance_all, align, begin, num_own,
    )  # fmt: skip
    return Routing(*found[:11], entropy=found[11].detach())


# ---------------------------------------------------------------------------------------------- definition


def route_definition(
    logits_TE: Tensor,
    noise_TE: Tensor | None,
    group_T: Tensor,
    capacity_G: Tensor | None,
    priority_T: Tensor | None,
    modality_T: Tensor | None,
    num_groups: int,
    num_choices: int,
    num_modalities: int,
    order: str,
    sigmoid: bool,
    renormalise: str,
    balance_all: bool,
    align: int,
    begin: int,
    num_own: int,
) -> Outputs:
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    ranked_TE = logits_TE
    if noise_TE is not None:
        first_T1 = logits_TE.argmax(-1, keepdim=True)  # of equals the lower index, as the sort below
        ranked_TE = (logits_TE + noise_TE).scatter(1, first_T1, float("inf"))
    expert_TK = torch.sort(ranked_TE, dim=-1, descending=True, stable=True).indices[:, :num_choices]
    expert_TK = expert_TK.contiguous()
    score_TE, share_TE = scores(logits_TE, sigmoid)
    raw_TK = score_TE.gather(1, expert_TK)
    kept_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    place_TK = expert_TK.new_empty(0, num_choices, dtype=torch.int32)
    if capacity_G is not None:
        order_N = queue_order(raw_TK, priority_T, order)
        queue_N = (expert_TK * num_groups + group_T[:, None]).t().reshape(-1)
        counts_Q = count(queue_N, num_experts * num_groups)
        sorted_N = torch.argsort(queue_N if order_N is None else queue_N[order_N], stable=True)
        place_N = inverse(sorted_N if order_N is None else order_N[sorted_N])
        place_N -= (counts_Q.cumsum(0) - counts_Q)[queue_N]
        place_TK = place_N.view(num_choices, num_tokens).t().to(torch.int32).contiguous()
        kept_TK = place_TK < capacity_G[group_T][:, None]
    weight_TK = raw_TK * kept_TK
    if renormalise != "none":
        sum_T1 = (weight_TK if renormalise == "after_drops" else raw_TK).sum(-1, keepdim=True)
        weight_TK = weight_TK / sum_T1.clamp_min(EPSILON)

    own = slice(begin, begin + num_own)
    choice_N = expert_TK[own].where(kept_TK[own], num_experts).t().reshape(-1)
    counts_E = count(choice_N, num_experts + 1)[:-1]
    ends_E = (-(-counts_E // align) * align).cumsum(0)
    # Where a queue of choices without padding begins, and where with it.
    shift_E = (ends_E - -(-counts_E // align) * align) - (counts_E.cumsum(0) - counts_E)
    order_N = torch.argsort(choice_N, stable=True)
    row_N = inverse(order_N) + F.pad(shift_E, (0, 1))[choice_N]
    row_N = row_N.where(choice_N < num_experts, -1)
    num_rows = num_own * num_choices + num_experts * (align - 1)
    rows_N = torch.arange(num_rows, device=device)
    row_token_N = torch.where(rows_N < ends_E[-1], -1, 0)
    # A last row takes the tokens of dropped choices and is cut off.
    row_token_N = F.pad(row_token_N, (0, 1))
    token_N = torch.arange(num_own, device=device).repeat(num_choices)
    row_token_N[row_N.where(row_N >= 0, num_rows)] = token_N
    token_row_TK = row_N.view(num_choices, num_own).t().contiguous()

    group_TG = F.one_hot(group_T, num_groups).to(logits_TE.dtype)
    tokens_G = group_TG.sum(0).clamp_min(1)
    balanced_TK = expert_TK if balance_all else expert_TK[:, :1]
    first_GE = group_TG.t() @ F.one_hot(balanced_TK, num_experts).sum(1).to(logits_TE.dtype)
    first_GE = first_GE / balanced_TK.shape[1]
    balance_G = num_experts * (first_GE * (group_TG.t() @ share_TE)).sum(-1) / tokens_G.square()
    z_loss_G = (torch.logsumexp(logits_TE, dim=-1).square() @ group_TG) / tokens_G
    modality_TK = (torch.zeros_like(group_T) if modality_T is None else modality_T)[:, None].expand_as(
        expert_TK
    )
    counts_Q = count((modality_TK * num_experts + expert_TK).flatten(), num_modalities * num_experts)
    dropped_M = torch.zeros(num_modalities, dtype=torch.int64, device=device)
    dropped_M.scatter_add_(0, modality_TK.flatten(), (~kept_TK).long().flatten())
    entropy = -torch.xlogy(share_TE, share_TE).sum()
    return (
        expert_TK, weight_TK, kept_TK, place_TK, ends_E.to(torch.int32),
        row_token_N[:-1].contiguous(), token_row_TK, balance_G, z_loss_G,
        counts_Q.view(num_modalities, num_experts), dropped_M, entropy, first_GE, tokens_G,
    )  # fmt: skip


def queue_order(score_TK: Tensor, priority_T: Tensor | None, order: str) -> Tensor | None:
    """The choices (numbered choice by choice) in the order in which they queue; None is as numbered."""
    if order == "sequence":
        return None
    num_tokens, num_choices = score_TK.shape
    number_TK = torch.arange(num_tokens * num_choices, device=score_TK.device).view(num_choices, -1).t()
    if order == "position":
        return number_TK.reshape(-1)
    if order == "score":
        return number_TK.reshape(-1)[torch.sort(score_TK.reshape(-1), descending=True, stable=True).indices]
    rank_T = score_TK[:, 0] if priority_T is None else priority_T
    return number_TK[torch.sort(rank_T, descending=True, stable=True).indices].t().reshape(-1)


def inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return inverse_N


def count(index_N: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, without the host synchronisation of torch.bincount."""
    zeros = torch.zeros(size, dtype=torch.int64, device=index_N.device)
    return zeros.scatter_add_(0, index_N, torch.ones_like(index_N))


# ------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op("eve_kernels::route", mutates_args=())
def _route(
    logits_TE: Tensor,
    noise_TE: Tensor | None,
    group_T: Tensor,
    capacity_G: Tensor | None,
    priority_T: Tensor | None,
    modality_T: Tensor | None,
    num_groups: int,
    num_choices: int,
    num_modalities: int,
    order: str,
    sigmoid: bool,
    renormalise: str,
    balance_all: bool,
    align: int,
    begin: int,
    num_own: int,
) -> Outputs:
    if not use_triton(logits_TE) or logits_TE.shape[0] == 0:
        return route_definition(
            logits_TE, noise_TE, group_T, capacity_G, priority_T, modality_T, num_groups, num_choices,
            num_modalities, order, sigmoid, renormalise, balance_all, align, begin, num_own,
        )  # fmt: skip
    (num_tokens, num_experts), k = logits_TE.shape, num_choices
    outputs = _empty(logits_TE, capacity_G, num_groups, k, num_modalities, align, num_own)
    (expert, weight, kept, place, offsets, row_token, token_row, balance, z_loss, choices, drops, entropy,
     first, tokens) = outputs  # fmt: skip
    tile, blocks = tile_of(num_experts), blocks_of(num_experts)
    num_blocks = divide_up(num_tokens, tile["BLOCK_T"])

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TE.device)

    score = torch.empty_like(weight)
    counts, group_counts = new(num_blocks, k, num_experts), new(num_blocks, num_groups, k, num_experts)
    share_sums = new(num_blocks, num_groups, num_experts, dtype=torch.float32)
    scalar_sums, ranges = new(num_blocks, num_groups + 1, dtype=torch.float32), new(num_blocks, 2)
    tallies = new(num_blocks, num_modalities, num_experts + 1)
    group_T, end = group_T.contiguous(), begin + num_own
    noise_TE, modality_T, priority_T = (
        None if tensor is None else tensor.contiguous() for tensor in (noise_TE, modality_T, priority_T)
    )
    shape = {"E": num_experts, "K": k, "M": num_modalities, **tile, "num_warps": WARPS}
    choose_kernel[(num_blocks,)](
        logits_TE.contiguous(), noise_TE, group_T, modality_T, expert, score, kept, group_counts, counts,
        share_sums, scalar_sums, ranges, tallies, num_tokens, num_groups, begin, end, EPSILON,
        SIGMOID=sigmoid, **shape,
    )  # fmt: skip
    if capacity_G is not None and order == "sequence":
        fit_kernel[(num_blocks,)](
            group_T, modality_T, expert, capacity_G.contiguous(), group_counts, ranges, place, kept, counts,
            tallies, num_tokens, num_groups, num_blocks, begin, end, **blocks, **shape,
        )  # fmt: skip
    elif capacity_G is not None:
        rounds, by = ORDERS[order]
        fit_sorted_kernel[(num_blocks,)](
            group_T, modality_T, expert, score, priority_T, capacity_G.contiguous(), ranges, place, kept,
            counts, tallies, num_tokens, num_blocks, begin, end, ROUNDS=rounds, BY=by,
            BLOCK_O=min(32, tile["BLOCK_T"]), **blocks, **shape,
        )  # fmt: skip
    place_kernel[(num_blocks + num_groups,)](
        expert, score, None if capacity_G is None else kept, counts, group_counts, share_sums, scalar_sums,
        ranges, tallies, weight, token_row, row_token, offsets, balance, z_loss, entropy, first, tokens,
        choices, drops, num_tokens, num_groups, num_blocks, begin, end, row_token.shape[0],
        divide_up(row_token.shape[0], num_blocks), EPSILON, ALIGN=align, RENORMALISE=RENORMALISE[renormalise],
        BALANCED=k if balance_all else 1, **blocks, **shape,
    )  # fmt: skip
    return outputs


def _empty(
    logits_TE: Tensor,
    capacity_G: Tensor | None,
    num_groups: int,
    num_choices: int,
    num_modalities: int,
    align: int,
    num_own: int,
) -> Outputs:
    num_tokens, num_experts = logits_TE.shape

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TE.device)

    real = logits_TE.dtype
    return (
        new(num_tokens, num_choices),
        new(num_tokens, num_choices, dtype=real),
        new(num_tokens, num_choices, dtype=torch.bool),
        new(0 if capacity_G is None else num_tokens, num_choices, dtype=torch.int32),
        new(num_experts, dtype=torch.int32),
        new(num_own * num_choices + num_experts * (align - 1)),
        new(num_own, num_choices),
        new(num_groups, dtype=real),
        new(num_groups, dtype=real),
        new(num_modalities, num_experts),
        new(num_modalities),
        new(dtype=real),
        new(num_groups, num_experts, dtype=real),
        new(num_groups, dtype=real),
    )


@_route.register_fake
def _(
    logits_TE, noise_TE, group_T, capacity_G, priority_T, modality_T, num_groups, num_choices, num_modalities,
    order, sigmoid, renormalise, balance_all, align, begin, num_own,
):  # fmt: skip
    return _empty(logits_TE, capacity_G, num_groups, num_choices, num_modalities, align, num_own)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, group_T = inputs[:3]
    ctx.sigmoid, ctx.renormalise = inputs[10:12]
    expert_TK, _, kept_TK, *_, first_GE, tokens_G = output
    ctx.save_for_backward(logits_TE, group_T, expert_TK, kept_TK, first_GE, tokens_G)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    _, grad_weight_TK, _, _, _, _, _, grad_balance_G, grad_z_loss_G, *_ = grads
    grad_TE = route_backward(
        grad_weight_TK, grad_balance_G, grad_z_loss_G, *ctx.saved_tensors, ctx.sigmoid, ctx.renormalise
    )
    return grad_TE, *[None] * 15


_route.register_autograd(_backward, setup_context=_save)
