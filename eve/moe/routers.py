"""Routers: which expert a token goes to. A router returns; it never stashes.

`shared` and `modality` need no gate: their plan is a property of the token layout, built once a
batch. `topk` learns: g(x) = softmax(W (x + b_modality)), the k largest (EVE, section "modality-aware
routing"). Shape suffixes: T token, D width, E expert, K choice, N row, M modality.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import FeedForward
from eve.moe import losses
from eve.moe.plan import RouterOutput, RouterStats, RoutingPlan
from eve.packing import TokenLayout


def shared_plan(layout: TokenLayout) -> RoutingPlan:
    """One expert takes all tokens as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M[1:])


def modality_plan(layout: TokenLayout) -> RoutingPlan:
    """Expert 0 takes the image tokens, expert 1 the text tokens, as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M)


class TopKRouter(nn.Module):
    """A learned gate over one pool of experts."""

    def __init__(
        self, width: int, config: FeedForward, layer: int, mean_over_ranks: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self.config = config
        self.layer = layer
        self.mean_over_ranks = mean_over_ranks
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.modality_vector: nn.Parameter | None = None
        if config.modality_vector != "none":
            self.modality_vector = nn.Parameter(torch.empty(2, width))
            self.modality_vector.no_weight_decay = True  # pyright: ignore

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> RouterOutput:
        config = self.config
        logits_TE = self._logits(x_TD, layout)
        probability_TE = torch.softmax(logits_TE, dim=-1)
        # Ties and order as of torch.topk on the logits: softmax can merge two logits into one value.
        expert_TK = logits_TE.topk(config.k, dim=-1).indices
        weight_TK = probability_TE.gather(1, expert_TK)
        capacity = self._capacity(x_TD.shape[0])
        plan = plan_rows(expert_TK, config.num_experts, capacity)
        kept_TK = None if capacity is None else plan.token_row_TK >= 0  # pyright: ignore
        if kept_TK is not None:
            weight_TK = weight_TK * kept_TK
        if config.renormalise:
            # After drops, as GShard and DeepSpeed do it.
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        plan = RoutingPlan(plan.offsets_E, plan.row_token_N, plan.token_row_TK, weight_TK)
        return self._report(plan, logits_TE, probability_TE, expert_TK, kept_TK, layout)

    def _logits(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """fp32 whatever the precision of the model: near-ties decide where a token goes."""
        weight_ED = self.weight.float()
        logits_TE = F.linear(x_TD.float(), weight_ED)
        if self.modality_vector is not None:
            # W (x + b) = W x + W b: two vectors of E numbers instead of T x D additions.
            shift_ME = F.linear(self.modality_vector.float(), weight_ED)
            image, text = logits_TE.split([layout.num_image, layout.num_text])
            logits_TE = torch.cat([image + shift_ME[0], text + shift_ME[1]])
        return logits_TE

    def _capacity(self, num_tokens: int) -> int | None:
        config = self.config
        factor = config.capacity_factor if self.training else config.capacity_factor_eval
        if factor == 0:
            return None
        return max(config.min_capacity, math.ceil(factor * config.k * num_tokens / config.num_experts))

    def _report(
        self,
        plan: RoutingPlan,
        logits_TE: Tensor,
        probability_TE: Tensor,
        expert_TK: Tensor,
        kept_TK: Tensor | None,
        layout: TokenLayout,
    ) -> RouterOutput:
        config = self.config
        num_experts, num_choices = config.num_experts, config.k
        first_E = count(expert_TK[:, 0], num_experts).float()
        # Shares of the tokens of all ranks, so that the loss does not depend on how many there are.
        # Evaluation may run on one rank alone and must not wait for the others.
        mean_E = self.mean_over_ranks(first_E) if self.training else first_E
        tokens = mean_E.sum().clamp_min(1)
        balance = losses.load_balance(mean_E, probability_TE.sum(0), tokens)
        z_loss = losses.z_loss(logits_TE, tokens)
        aux_loss = config.load_balance_weight * balance
        if config.z_loss_weight:
            aux_loss = aux_loss + config.z_loss_weight * z_loss
        with torch.no_grad():
            modality_TK = layout.modality_T[:, None].expand(-1, num_choices)
            counts_ME = count((modality_TK * num_experts + expert_TK).flatten(), 2 * num_experts)
            tokens_M = count(layout.modality_T, 2)
            dropped_M = torch.zeros_like(tokens_M)
            if kept_TK is not None:
                dropped_M = dropped_M.scatter_add(0, modality_TK.flatten(), (~kept_TK).long().flatten())
            entropy = -(probability_TE * torch.log_softmax(logits_TE, dim=-1)).sum()
        stats = RouterStats(
            layer=self.layer,
            counts_ME=counts_ME.view(2, num_experts),
            dropped_M=dropped_M,
            tokens_M=tokens_M,
            entropy=entropy,
            load_balance=balance.detach(),
            z_loss=z_loss.detach(),
        )
        return RouterOutput(plan, aux_loss, stats)


def plan_rows(expert_TK: Tensor, num_experts: int, capacity: int | None = None) -> RoutingPlan:
    """The plan (without weights) of tokens that chose `expert_TK`.

    Rows of an expert are in the order: all first choices by token, then all second choices. With a
    capacity, the choices past it are dropped in that order (GShard), dropped first choices included
    in the count. No host synchronisation: the number of rows is always T * K.
    """
    num_tokens, num_choices = expert_TK.shape
    choice_N = expert_TK.t().reshape(-1)  # first choices of all tokens, then second choices
    counts_E = count(choice_N, num_experts)
    order_N = torch.argsort(choice_N, stable=True)
    row_N = torch.empty_like(order_N)  # the row of each choice: the inverse of the order
    row_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    if capacity is None:
        offsets_E = counts_E.cumsum(0)
    else:
        kept_E = counts_E.clamp_max(capacity)
        offsets_E = kept_E.cumsum(0)
        place_N = row_N - (counts_E.cumsum(0) - counts_E)[choice_N]  # place in the queue of its expert
        row_N = torch.where(place_N < capacity, (offsets_E - kept_E)[choice_N] + place_N, -1)
        # Rows that nobody owns take token 0: they lie past the last offset and are not computed.
        num_rows = order_N.shape[0]
        owner = order_N.new_zeros(num_rows + 1)
        owner[torch.where(row_N >= 0, row_N, num_rows)] = torch.arange(num_rows, device=order_N.device)
        order_N = owner[:-1]
    row_token_N = order_N % num_tokens if num_tokens else order_N
    token_row_TK = row_N.view(num_choices, num_tokens).t().contiguous()
    return RoutingPlan(offsets_E.to(torch.int32), row_token_N, token_row_TK)


def count(index: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, without the host synchronisation of torch.bincount."""
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index, torch.ones_like(index))
