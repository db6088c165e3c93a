"""Routers: which expert a token goes to. A router returns; it never stashes.

`shared` and `modality` need no gate: their plan is a property of the token layout, built once a
batch. `topk` learns: g(x) = softmax(W (x + b_modality)), the k largest (EVE, section "modality-aware
routing"). Shape suffixes: T token, D width, E expert, K choice, N row, M modality, G group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import FeedForward
from eve.moe import losses
from eve.moe.plan import RouterOutput, RouterStats, RoutingPlan
from eve.packing import Rows, TokenLayout
from eve.tokens import Tokens


def shared_plan(layout: TokenLayout) -> RoutingPlan:
    """One expert takes all tokens as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M[1:])


def modality_plan(layout: TokenLayout) -> RoutingPlan:
    """Expert 0 takes the image tokens, expert 1 the text tokens, as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M)


class TopKRouter(nn.Module):
    """A learned gate over one pool of experts.

    Balance and capacity are those of groups of `group_size` samples (GShard, section 3.2), so that they do
    not depend on how a batch was cut into micro-batches and over devices.
    """

    def __init__(self, width: int, config: FeedForward, layer: int, tokens: Tokens):
        super().__init__()
        self.config = config
        self.layer = layer
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.modality_vector: nn.Parameter | None = None
        if config.modality_vector != "none":
            self.modality_vector = nn.Parameter(torch.empty(2, width))
            self.modality_vector.no_weight_decay = True  # pyright: ignore

    def forward(self, x_TD: Tensor, rows: Rows, layout: TokenLayout) -> RouterOutput:
        """`x_TD` are the tokens `rows` of the layout; the plan is for them, losses and counts are of all."""
        config = self.config
        # Devices that share the batch each treat all logits alike, as a group may lie on several.
        logits_TE = self.tokens.gather_own(self._logits(x_TD, rows), layout)
        probability_TE = torch.softmax(logits_TE, dim=-1)
        # Ties and order as of torch.topk on the logits: softmax can merge two logits into one value.
        expert_TK = logits_TE.topk(config.k, dim=-1).indices
        weight_TK = probability_TE.gather(1, expert_TK)
        num_groups = -(-layout.num_samples // config.group_size)
        group_T = layout.sample_T // config.group_size
        kept_TK = self._kept(expert_TK, group_T, num_groups)
        if kept_TK is not None:
            weight_TK = weight_TK * kept_TK
        if config.renormalise:
            # After drops, as GShard and DeepSpeed do it.
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        own = slice(rows.begin, rows.begin + x_TD.shape[0])
        plan = plan_rows(expert_TK[own], config.num_experts, None if kept_TK is None else kept_TK[own])
        plan = RoutingPlan(plan.offsets_E, plan.row_token_N, plan.token_row_TK, weight_TK[own])
        group_TG = F.one_hot(group_T, num_groups).float()
        return self._report(plan, logits_TE, probability_TE, expert_TK, kept_TK, group_TG, layout)

    def _logits(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """fp32 whatever the precision of the model: near-ties decide where a token goes."""
        weight_ED = self.weight.float()
        logits_TE = F.linear(x_TD.float(), weight_ED)
        if self.modality_vector is not None:
            # W (x + b) = W x + W b: two vectors of E numbers instead of T x D additions.
            shift_ME = F.linear(self.modality_vector.float(), weight_ED)
            image, text = logits_TE.split([rows.num_image, rows.num_text])
            logits_TE = torch.cat([image + shift_ME[0], text + shift_ME[1]])
        return logits_TE

    def _kept(self, expert_TK: Tensor, group_T: Tensor, num_groups: int) -> Tensor | None:
        config = self.config
        factor = config.capacity_factor if self.training else config.capacity_factor_eval
        if factor == 0:
            return None
        slots_G = count(group_T, num_groups).double() * (factor * config.k / config.num_experts)
        # A product such as 1.1 * 10 is a little more than 11.
        capacity_G = (slots_G - 1e-9).ceil().long().clamp_min(config.min_capacity)
        return within_capacity(expert_TK, config.num_experts, group_T, capacity_G)

    def _report(
        self,
        plan: RoutingPlan,
        logits_TE: Tensor,
        probability_TE: Tensor,
        expert_TK: Tensor,
        kept_TK: Tensor | None,
        group_TG: Tensor,
        layout: TokenLayout,
    ) -> RouterOutput:
        config = self.config
        num_experts, num_choices = config.num_experts, config.k
        tokens_G = group_TG.sum(0).clamp_min(1)
        # Sums over a group as products with its one-hot: in a fixed order, forward and backward.
        first_GE = group_TG.t() @ F.one_hot(expert_TK[:, 0], num_experts).float()
        balance = losses.load_balance(first_GE, group_TG.t() @ probability_TE, tokens_G).mean()
        z_loss = losses.z_loss(logits_TE, group_TG, tokens_G).mean()
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


def within_capacity(expert_TK: Tensor, num_experts: int, group_T: Tensor, capacity_G: Tensor) -> Tensor:
    """(T, K) bool: the choice finds a slot of its expert among those of its group.

    Choices queue in the order: all first choices by token, then all second choices (GShard). Choices past
    the capacity of the group are dropped, dropped first choices included in the count.
    """
    num_groups, num_choices = capacity_G.shape[0], expert_TK.shape[1]
    queue_N = (expert_TK * num_groups + group_T[:, None]).t().reshape(-1)
    counts_Q = count(queue_N, num_experts * num_groups)
    order_N = torch.argsort(queue_N, stable=True)
    place_N = _inverse(order_N) - (counts_Q.cumsum(0) - counts_Q)[queue_N]
    return place_N.view(num_choices, -1).t() < capacity_G[group_T][:, None]


def plan_rows(expert_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> RoutingPlan:
    """The plan (without weights) of tokens that chose `expert_TK`; None keeps all choices.

    Rows of an expert are in the order: all first choices by token, then all second choices. No host
    synchronisation: the number of rows is always T * K, those of dropped choices come last.
    """
    num_tokens, num_choices = expert_TK.shape
    choice_N = expert_TK.t().reshape(-1)  # first choices of all tokens, then second choices
    if kept_TK is not None:
        choice_N = choice_N.where(kept_TK.t().reshape(-1), num_experts)
    order_N = torch.argsort(choice_N, stable=True)
    row_N = _inverse(order_N)
    if kept_TK is not None:
        row_N = row_N.where(choice_N < num_experts, -1)
    offsets_E = count(choice_N, num_experts + 1)[:-1].cumsum(0)
    row_token_N = order_N % num_tokens if num_tokens else order_N
    token_row_TK = row_N.view(num_choices, num_tokens).t().contiguous()
    return RoutingPlan(offsets_E.to(torch.int32), row_token_N, token_row_TK)


def _inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return inverse_N


def count(index: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, without the host synchronisation of torch.bincount."""
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index, torch.ones_like(index))
