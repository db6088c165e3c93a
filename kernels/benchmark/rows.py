"""Dispatch and combine beside their peers.

Each peer has its own order of rows, so what is compared is the row of each choice of each token, (T, K, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark.case import Case, logits
from kernels.benchmark.cost import costs
from kernels.benchmark.peer import Call, Peer, clone_of, module, on_gpu
from kernels.combine import combine
from kernels.dispatch import dispatch
from kernels.routing import Routing, route

MEGABLOCKS_BLOCK = 128  # rows to whose multiple its block-sparse path pads an expert


@dataclass(frozen=True)
class Rows:
    """`order_N`: choices t * K + k sorted by expert, as all peers but ours place them; `place_TK` its
    inverse; `y_TKD` what the experts give back for each choice."""

    case: Case
    x_TD: Tensor
    y_TKD: Tensor
    weight_TK: Tensor
    routing: Routing
    order_N: Tensor
    expert_N: Tensor
    counts_E: Tensor
    place_TK: Tensor


def rows(case: Case, device: torch.device, dtype: torch.dtype) -> Rows:
    group_T = torch.zeros(case.tokens, dtype=torch.int64, device=device)
    routing = route(logits(case, device), case.choices, group_T=group_T, num_groups=1)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(case.tokens, case.width, generator=generator).to(device, dtype)
    y_TKD = x_TD[:, None] * torch.arange(1, case.choices + 1, device=device, dtype=dtype)[:, None]
    expert_N = routing.expert_TK.flatten()
    order_N = torch.argsort(expert_N, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(case.rows, device=device)
    return Rows(
        case,
        x_TD.requires_grad_(),
        y_TKD,
        routing.weight_TK.detach().requires_grad_(),
        routing,
        order_N,
        expert_N[order_N],
        F.one_hot(expert_N, case.experts).sum(0),
        place_N.view(case.tokens, case.choices),
    )


def dispatched(function: Callable[[], Any], given: Rows, place_TK: Tensor) -> Call:
    """A Call of dispatch whose result has the row of each choice at `place_TK`."""
    return Call(function, {"x": given.x_TD}, lambda y_ND: {"row of each choice": y_ND[place_TK]})


def combined(function: Callable[[Tensor], Tensor], given: Rows, place_TK: Tensor, num_rows: int) -> Call:
    """A Call of combine on rows of which each choice has one at `place_TK`."""
    y_ND = given.y_TKD.new_zeros(num_rows, given.case.width)
    y_ND[place_TK] = given.y_TKD
    y_ND.requires_grad_()
    return Call(
        lambda: function(y_ND),
        {"y": y_ND, "weight": given.weight_TK},
        lambda out_TD: {"sum of each token": out_TD},
        lambda grads: {"y": grads["y"][place_TK], "weight": grads["weight"]},
    )


# -------------------------------------------------------------------------------------------- ours and torch


def our_dispatch(given: Rows) -> Call:
    plan = given.routing
    return dispatched(
        lambda: dispatch(given.x_TD, plan.row_token_N, plan.token_row_TK), given, plan.token_row_TK
    )


def indexed_dispatch(given: Rows) -> Call:
    token_N = given.order_N // given.case.choices
    return dispatched(lambda: given.x_TD.index_select(0, token_N), given, given.place_TK)


def compiled_dispatch(given: Rows) -> Call:
    token_N = given.order_N // given.case.choices
    select = torch.compile(lambda x_TD, token_N: x_TD.index_select(0, token_N), dynamic=False)
    return dispatched(lambda: select(given.x_TD, token_N), given, given.place_TK)


def our_combine(given: Rows) -> Call:
    plan = given.routing

    def function(y_ND: Tensor) -> Tensor:
        return combine(y_ND, given.weight_TK, plan.row_token_N, plan.token_row_TK)

    return combined(function, given, plan.token_row_TK, given.case.rows)


def residual_combined(function: Callable[[Tensor, Tensor], Tensor], given: Rows, place_TK: Tensor) -> Call:
    """Of a function of (rows, residual)."""
    alone = combined(lambda y_ND: function(y_ND, given.x_TD), given, place_TK, given.case.rows)
    return replace(
        alone,
        leaves={**alone.leaves, "residual": given.x_TD},
        comparable_gradients=lambda grads: {
            **alone.comparable_gradients(grads), "residual": grads["residual"],
        },
    )  # fmt: skip


def our_residual(given: Rows) -> Call:
    plan = given.routing
    return residual_combined(
        lambda y_ND, x_TD: combine(y_ND, given.weight_TK, plan.row_token_N, plan.token_row_TK, x_TD),
        given,
        plan.token_row_TK,
    )


def our_addition(given: Rows) -> Call:
    plan = given.routing
    return residual_combined(
        lambda y_ND, x_TD: x_TD + combine(y_ND, given.weight_TK, plan.row_token_N, plan.token_row_TK),
        given,
        plan.token_row_TK,
    )


def weighted_sum(y_ND: Tensor, weight_TK: Tensor, place_TK: Tensor) -> Tensor:
    return (y_ND[place_TK] * weight_TK[..., None]).sum(1).to(y_ND.dtype)


def gathered_combine(given: Rows) -> Call:
    return combined(
        lambda y_ND: weighted_sum(y_ND, given.weight_TK, given.place_TK),
        given,
        given.place_TK,
        given.case.rows,
    )


def compiled_combine(given: Rows) -> Call:
    function = torch.compile(weighted_sum, dynamic=False)
    return combined(
        lambda y_ND: function(y_ND, given.weight_TK, given.place_TK), given, given.place_TK, given.case.rows
    )


def weighted_sum_and_residual(
    y_ND: Tensor, weight_TK: Tensor, place_TK: Tensor, residual_TD: Tensor
) -> Tensor:
    return residual_TD + weighted_sum(y_ND, weight_TK, place_TK)


def gathered_residual(given: Rows) -> Call:
    return residual_combined(
        lambda y_ND, x_TD: weighted_sum_and_residual(y_ND, given.weight_TK, given.place_TK, x_TD),
        given,
        given.place_TK,
    )


def compiled_residual(given: Rows) -> Call:
    function = torch.compile(weighted_sum_and_residual, dynamic=False)
    return residual_combined(
        lambda y_ND, x_TD: function(y_ND, given.weight_TK, given.place_TK, x_TD), given, given.place_TK
    )


def added_combine(given: Rows) -> Call:
    """The other way round: each row is added to its token, in fp32 (atomics on a GPU)."""
    token_N = given.order_N // given.case.choices

    def function(y_ND: Tensor) -> Tensor:
        weighted_ND = y_ND * given.weight_TK.flatten()[given.order_N, None]
        out_TD = weighted_ND.new_zeros(given.case.tokens, given.case.width)
        return out_TD.index_add_(0, token_N, weighted_ND).to(y_ND.dtype)

    return combined(function, given, given.place_TK, given.case.rows)


def clone(given: Rows) -> Call:
    return clone_of(*costs(given.case, given.x_TD.element_size()), given.x_TD.device)


# ------------------------------------------------------------------------------------------------- DeepSpeed


def native_slots(given: Rows) -> tuple[Tensor, int]:
    """(slot of each choice (K, T), slots of an expert): as its gates give them where nothing is dropped."""
    capacity = int(given.counts_E.max())
    begin_E = given.counts_E.cumsum(0) - given.counts_E
    slot_TK = given.routing.expert_TK * capacity + given.place_TK - begin_E[given.routing.expert_TK]
    return slot_TK.t().contiguous(), capacity


def native_dispatch(given: Rows) -> Call:
    """deepspeed.moe.layer.MoE: experts of equal capacity, here that of the fullest expert."""
    moe = module("deepspeed", "deepspeed.moe.sharded_moe")
    slot_KT, capacity = native_slots(given)
    return dispatched(
        lambda: moe._sparse_encode(given.x_TD, slot_KT, given.case.experts, capacity).flatten(0, 1),
        given,
        slot_KT.t(),
    )


def native_combine(given: Rows) -> Call:
    moe = module("deepspeed", "deepspeed.moe.sharded_moe")
    slot_KT, capacity = native_slots(given)
    return combined(
        lambda y_ND: moe._sparse_decode(y_ND, slot_KT, given.weight_TK.t(), given.case.tokens),
        given,
        slot_KT.t(),
        given.case.experts * capacity,
    )


def autoep_dispatch(given: Rows) -> Call:
    """AutoEP: a row for each choice in the order of the experts, then these again, padded."""
    layer = module("deepspeed", "deepspeed.module_inject.auto_ep_layer")

    def function() -> Tensor:
        routed_ND = given.x_TD[given.order_N // given.case.choices]
        return layer.permute_by_local_expert(routed_ND, given.counts_E)[0]

    return dispatched(function, given, autoep_permutation(given)[1])


def autoep_permutation(given: Rows) -> tuple[Tensor, Tensor]:
    """(index of the sorted row in each padded row, padded row of each choice)."""
    layer = module("deepspeed", "deepspeed.module_inject.auto_ep_layer")
    empty_ND = given.x_TD.detach().new_zeros(given.case.rows, 1)
    source = layer.permute_by_local_expert(empty_ND, given.counts_E)[1]
    owned = (source >= 0) & (source < given.case.rows)
    padded_N = torch.empty_like(given.order_N)
    padded_N[source[owned].long()] = owned.nonzero()[:, 0]
    return source, padded_N[given.place_TK]


def autoep_combine(given: Rows, *, fused: bool = False) -> Call:
    layer = module("deepspeed", "deepspeed.module_inject.auto_ep_layer")
    source, place_TK = autoep_permutation(given)
    shape = (1, given.case.tokens, given.case.width)
    given_by_name: dict[str, Any] = {
        "top_scores": given.weight_TK,
        "token_indices_sorted": given.order_N,
        "top_k": given.case.choices,
        "shape": shape,
    }
    if fused:
        on_gpu(given.x_TD)
        restore = module(
            "deepspeed", "deepspeed.ops.triton_ops.autoep_fused_token_ops"
        ).fused_weighted_restore
    else:
        restore = layer.combine_from_routed
        given_by_name |= {"score_apply": "post", "combine_impl": "weighted_sum"}

    def function(y_ND: Tensor) -> Tensor:
        routed_ND = layer.unpermute_by_local_expert(y_ND, source, given.case.rows)
        return restore(routed_ND, **given_by_name)[0]

    return combined(function, given, place_TK, source.shape[0])


def fused_autoep_combine(given: Rows) -> Call:
    return autoep_combine(given, fused=True)


# ------------------------------------------------------------------------------------------------ MegaBlocks


def megablocks_bins(given: Rows) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, int]:
    """((sorted choices, their experts, ends, padded ends), padded row of each choice, padded rows)."""
    on_gpu(given.x_TD)
    ends_E = given.counts_E.cumsum(0)
    padded_E = -(-given.counts_E // MEGABLOCKS_BLOCK) * MEGABLOCKS_BLOCK
    shift_E = (padded_E.cumsum(0) - padded_E) - (ends_E - given.counts_E)
    bins = (given.order_N.int(), given.expert_N.int(), ends_E.int(), padded_E.cumsum(0).int())
    return bins, given.place_TK + shift_E[given.routing.expert_TK], int(padded_E.sum())


def megablocks_dispatch(given: Rows) -> Call:
    operations = module("megablocks", "megablocks.ops")
    bins, place_TK, _ = megablocks_bins(given)
    return dispatched(
        lambda: operations.padded_gather(given.x_TD, *bins, given.case.choices), given, place_TK
    )


def megablocks_combine(given: Rows) -> Call:
    operations = module("megablocks", "megablocks.ops")
    (order, expert, ends, padded), place_TK, num_rows = megablocks_bins(given)

    def function(y_ND: Tensor) -> Tensor:
        weight_N = given.weight_TK.flatten()
        return operations.padded_scatter(y_ND, order, expert, weight_N, ends, padded, given.case.choices)

    return combined(function, given, place_TK, num_rows)


DISPATCH = (
    Peer("ours", our_dispatch),
    Peer("torch.clone, as many bytes", clone),
    Peer("torch index_select", indexed_dispatch),
    Peer("torch index_select, compiled", compiled_dispatch, compiles=True),
    Peer("DeepSpeed native", native_dispatch),
    Peer("DeepSpeed AutoEP", autoep_dispatch),
    Peer("MegaBlocks padded_gather", megablocks_dispatch),
)
COMBINE = (
    Peer("ours", our_combine),
    Peer("torch.clone, as many bytes", clone),
    Peer("torch index, sum", gathered_combine),
    Peer("torch index, sum, compiled", compiled_combine, compiles=True),
    Peer("torch index_add", added_combine),
    Peer("DeepSpeed native", native_combine),
    Peer("DeepSpeed AutoEP", autoep_combine),
    Peer("DeepSpeed AutoEP, fused", fused_autoep_combine),
    Peer("MegaBlocks padded_scatter", megablocks_combine),
)
COMBINE_RESIDUAL = (
    Peer("ours", our_residual),
    Peer("ours, then an addition", our_addition),
    Peer("torch.clone, as many bytes", clone),
    Peer("torch index, sum, addition", gathered_residual),
    Peer("torch index, sum, addition, compiled", compiled_residual, compiles=True),
)
