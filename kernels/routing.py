"""Routing: logits of the gate -> choices, their weights, the rows of the experts, auxiliary losses.

Per token: scores (softmax or sigmoid of the logits), the k experts of the largest logits (plus noise, if
given; of equals the lower index). Per group of tokens: slots of each expert, load balance, z-loss. Choices
queue in the order: all first choices by token, then all second choices (GShard); a choice past the capacity
of its group and expert is dropped, and dropped ones count as well. Rows of an expert lie together, in that
order.

Dataflow, B blocks of BLOCK_T tokens; two launches, with a capacity three; no host synchronisation, no
atomics. The kernels are in routing_kernels.py, the backward is in routing_backward.py:

    choose      logits -> expert_TK, score_TK; of each block the counts by choice, group and expert, and
                the sums over tokens that the losses need
    fit         with a capacity: place of a choice = counts of the blocks before + rank in its block
                -> kept_TK, and the counts of kept choices by block
    place       row of a choice = start of its expert + counts of the blocks before + rank in its block
                -> token_row_TK, row_token_N, offsets_E, weight_TK; further programs sum the losses

Instead of a launch that scans, each program sums the counts of the blocks before its own: B K E numbers out
of the L2 cache. The groups of a block are a range lo..hi of its tokens' groups: one or two where samples lie
together. Backward is one launch that makes the scores again from the logits: nothing else of size T E is
kept.

Bytes: logits read once forward and once backward, T E 4 (4 MB at T 32,768, E 32), and T K 8 of each index:
7 MB, 2 microseconds; what it costs is the launches.

Shape suffixes: T token, E expert, K choice, G group, N row, B block of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import divide_up, use_triton
from kernels.routing_backward import EPSILON, route_backward, scores
from kernels.routing_kernels import (
    WARPS,
    blocks_of,
    choose_kernel,
    fit_kernel,
    place_kernel,
    tile_of,
)

Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


@dataclass(frozen=True)
class Routing:
    """Attributes, for T tokens whose rows `own` are dispatched here:
    expert_TK: int64, the experts of each token, best first.
    weight_TK: fp32 with gradient; 0 for a dropped choice.
    kept_TK: bool.
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
    sigmoid: bool = False,
    renormalise: bool = True,
    align: int = 1,
    own: tuple[int, int] | None = None,
) -> Routing:
    """
    Args:
        logits_TE: fp32.
        group_T: int64, group of each token, below `num_groups`.
        modality_T: int64, modality of each token, below `num_modalities`, to count by; None counts all.
        capacity_G: int64, slots of each expert for a group; None drops nothing.
        noise_TE: added to the logits where experts are chosen, not in their scores.
        sigmoid: scores are sigmoids; for balance and entropy they are divided by their sum over experts.
        renormalise: weights are divided by the sum over a token's kept choices.
        align: each expert's rows are filled up to a multiple of it.
        own: begin and number of the tokens whose rows are placed; None places all.
    """
    begin, num_own = own or (0, logits_TE.shape[0])
    found = _route(
        logits_TE, noise_TE, group_T, capacity_G, num_groups, num_choices, sigmoid, renormalise, align, begin,
        num_own, modality_T, num_modalities,
    )  # fmt: skip
    return Routing(*found[:10], entropy=found[10].detach())


# ---------------------------------------------------------------------------------------------- definition


def route_definition(
    logits_TE: Tensor,
    noise_TE: Tensor | None,
    group_T: Tensor,
    capacity_G: Tensor | None,
    num_groups: int,
    num_choices: int,
    sigmoid: bool,
    renormalise: bool,
    align: int,
    begin: int,
    num_own: int,
    modality_T: Tensor | None,
    num_modalities: int,
) -> Outputs:
    (num_tokens, num_experts), device = logits_TE.shape, logits_TE.device
    chosen_TE = logits_TE if noise_TE is None else logits_TE + noise_TE
    expert_TK = (
        torch.sort(chosen_TE, dim=-1, descending=True, stable=True).indices[:, :num_choices].contiguous()
    )
    score_TE, share_TE = scores(logits_TE, sigmoid)
    kept_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if capacity_G is not None:
        queue_N = (expert_TK * num_groups + group_T[:, None]).t().reshape(-1)
        counts_Q = count(queue_N, num_experts * num_groups)
        place_N = inverse(torch.argsort(queue_N, stable=True)) - (counts_Q.cumsum(0) - counts_Q)[queue_N]
        kept_TK = (place_N.view(num_choices, num_tokens).t() < capacity_G[group_T][:, None]).contiguous()
    weight_TK = score_TE.gather(1, expert_TK) * kept_TK
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(EPSILON)

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
    first_GE = group_TG.t() @ F.one_hot(expert_TK[:, 0], num_experts).to(logits_TE.dtype)
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
        expert_TK, weight_TK, kept_TK, ends_E.to(torch.int32), row_token_N[:-1].contiguous(), token_row_TK,
        balance_G, z_loss_G, counts_Q.view(num_modalities, num_experts), dropped_M, entropy, first_GE,
        tokens_G,
    )  # fmt: skip


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
    num_groups: int,
    num_choices: int,
    sigmoid: bool,
    renormalise: bool,
    align: int,
    begin: int,
    num_own: int,
    modality_T: Tensor | None,
    num_modalities: int,
) -> Outputs:
    if not use_triton(logits_TE) or logits_TE.shape[0] == 0:
        return route_definition(
            logits_TE, noise_TE, group_T, capacity_G, num_groups, num_choices, sigmoid, renormalise, align,
            begin, num_own, modality_T, num_modalities,
        )  # fmt: skip
    (num_tokens, num_experts), k = logits_TE.shape, num_choices
    outputs = _empty(logits_TE, num_groups, k, align, num_own, num_modalities)
    expert, weight, kept, offsets, row_token, token_row, balance, z_loss, choices, drops, *others = outputs
    entropy, first, tokens = others
    tile = tile_of(num_experts)
    num_blocks = divide_up(num_tokens, tile["BLOCK_T"])

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TE.device)

    score = torch.empty_like(weight)
    counts, group_counts = new(num_blocks, k, num_experts), new(num_blocks, num_groups, k, num_experts)
    share_sums = new(num_blocks, num_groups, num_experts, dtype=torch.float32)
    scalar_sums, ranges = new(num_blocks, num_groups + 1, dtype=torch.float32), new(num_blocks, 2)
    tallies = new(num_blocks, num_modalities, num_experts + 1)
    group_T, end = group_T.contiguous(), begin + num_own
    modality_T = None if modality_T is None else modality_T.contiguous()
    shape = {"E": num_experts, "K": k, **tile, "num_warps": WARPS}
    choose_kernel[(num_blocks,)](
        logits_TE.contiguous(), None if noise_TE is None else noise_TE.contiguous(), group_T, modality_T,
        expert, score, kept, group_counts, counts, share_sums, scalar_sums, ranges, tallies, num_tokens,
        num_groups, begin, end, M=num_modalities, SIGMOID=sigmoid, **shape,
    )  # fmt: skip
    if capacity_G is not None:
        fit_kernel[(num_blocks,)](
            group_T, modality_T, expert, capacity_G.contiguous(), group_counts, ranges, kept, counts, tallies,
            num_tokens, num_groups, num_blocks, begin, end, M=num_modalities, **blocks_of(num_experts),
            **shape,
        )  # fmt: skip
    place_kernel[(num_blocks + num_groups,)](
        expert, score, None if capacity_G is None else kept, counts, group_counts, share_sums, scalar_sums,
        ranges, tallies, weight, token_row, row_token, offsets, balance, z_loss, entropy, first, tokens,
        choices, drops, num_tokens,
        num_groups, num_blocks, begin, end, row_token.shape[0], divide_up(row_token.shape[0], num_blocks),
        EPSILON, M=num_modalities, ALIGN=align, RENORMALISE=renormalise, **blocks_of(num_experts), **shape,
    )  # fmt: skip
    return outputs


def _empty(
    logits_TE: Tensor, num_groups: int, num_choices: int, align: int, num_own: int, num_modalities: int
) -> Outputs:
    num_tokens, num_experts = logits_TE.shape

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TE.device)

    real = logits_TE.dtype
    return (
        new(num_tokens, num_choices),
        new(num_tokens, num_choices, dtype=real),
        new(num_tokens, num_choices, dtype=torch.bool),
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
    logits_TE, noise_TE, group_T, capacity_G, num_groups, num_choices, sigmoid, renormalise, align, begin,
        num_own, modality_T, num_modalities,
):  # fmt: skip
    return _empty(logits_TE, num_groups, num_choices, align, num_own, num_modalities)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, group_T, _, _, _, ctx.sigmoid, ctx.renormalise, *_ = inputs
    expert_TK, _, kept_TK, *_, first_GE, tokens_G = output
    ctx.save_for_backward(logits_TE, group_T, expert_TK, kept_TK, first_GE, tokens_G)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    _, grad_weight_TK, _, _, _, _, grad_balance_G, grad_z_loss_G, *_ = grads
    grad_TE = route_backward(
        grad_weight_TK, grad_balance_G, grad_z_loss_G, *ctx.saved_tensors, ctx.sigmoid, ctx.renormalise
    )
    return grad_TE, *[None] * 12


_route.register_autograd(_backward, setup_context=_save)
